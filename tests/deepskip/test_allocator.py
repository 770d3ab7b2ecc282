"""Freed memory stays with the process, or leaves it, as the allocator is told."""

import subprocess
import sys

FAULTS = """
import resource, sys
import torch
from deepskip.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
# what threads allocate in between splits the heap; it grows, in six rounds at most, until every hole is large enough
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**22) for _ in range(4)]
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""

HELD = """
import sys
import psutil, torch
from deepskip.allocator import give_back_freed_memory

if sys.argv[1] == "give back":
    assert give_back_freed_memory()
# once 16 MiB were freed, glibc takes blocks of that size from its heap
torch.ones(2**22)
before = psutil.Process().memory_info().rss
blocks, above = [], []
for _ in range(8):
    blocks.append(torch.ones(2**21))
    # what is held above them keeps them there
    above.append(torch.ones(2**14))
blocks.clear()
print(psutil.Process().memory_info().rss - before)
"""


def printed(program: str, how: str) -> int:
    done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_pages_are_not_fetched_again() -> None:
    # 64 MB are 16,384 pages.
    assert printed(FAULTS, "keep") < 500


def test_freed_blocks_leave_the_process() -> None:
    # 64 MiB were freed. The blocks above them hold half a MiB.
    assert printed(HELD, "give back") < 2**21 < 2**25 < printed(HELD, "leave")
