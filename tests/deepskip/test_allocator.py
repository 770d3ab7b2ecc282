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
for _ in range(4):
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
    # 64 MB are 16,384 pages. Addresses are drawn for each process; now and then the heap meets another mapping early
    assert min(faults("keep") for _ in range(3)) < 500
