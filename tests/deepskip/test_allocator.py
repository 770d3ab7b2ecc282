"""Memory that is freed stays with the process."""

import subprocess
import sys

PROGRAM = """
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


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_pages_are_not_fetched_again() -> None:
    # 64 MB are 16,384 pages
    assert faults("keep") < 500
