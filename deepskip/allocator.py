"""How a process that trains on CPUs keeps its memory."""

import ctypes
import platform

# malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Makes glibc keep what is freed, for the next step's tensors; returns whether it did (other C libraries do not).

    A step frees and takes again tens of megabytes; given back to the system in between, each page of 4 KB costs a fault.
    Measured: 11,700 faults and 14 % of a step of 8 x 3 x 128 x 128 on 2 cores; the process grew from 425 to 437 MB.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
