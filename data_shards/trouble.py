"""Report which resource a machine lacks, such as disk space, permissions, memory or file descriptors, and what to do."""

import errno
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Exit status of the program in these cases.
STATUS = 2
# A path that cannot be a file or folder, whatever the permissions.
NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
SHARED_MEMORY = "/dev/shm"  # noqa: S108
# What torch's messages say if shared memory is too small.
TOLD_OF_SHARED_MEMORY = (
    "Bus error",
    "shared memory",
    "unable to allocate shared",
    "unable to mmap",
    "unable to write to file </torch",
)
# What libraries' messages say if the system refuses threads or memory.
TOLD_OF_MEMORY = (
    "can't start new thread",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "failed to map segment",
    "not enough memory",
    # An import that ran out of memory.
    "returned NULL without setting an exception",
)


def in_words(error: BaseException | None, again: str = "the same command resumes") -> str | None:
    """Return a message about the resource that a machine lacks, if an error or one of its causes is due to that, else None.

    Args:
        error: The error.
        again: What happens when the same is run again, as the end of the message's last sentence.
    """
    while error is not None:
        if found := cause(error):
            what, cure = found
            return f"{what}. {cure}, and {again}."
        # Ray's errors keep their cause in a field.
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def cause(error: BaseException) -> tuple[str, str] | None:
    """Return the resource that one error says is lacking, and the remedy; None for any other error."""
    text = str(error)
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EMFILE:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many files are open{where}: this process may have {allowed}", "Allow more (ulimit -n 4096)"
    if number == errno.ENFILE:
        return f"this machine has too many files open{where}", "Close other programs"
    if number in (errno.ENOSPC, errno.EDQUOT) and SHARED_MEMORY not in text:
        return f"the disk is full{where}", "Free some space"
    if number == errno.EROFS:
        return f"nothing can be written{where}: the file system is read-only", "Choose another location"
    if number in (errno.EACCES, errno.EPERM):
        return f"permission denied{where}", "Give this user the permission, or choose another location"
    if isinstance(error, OSError) and number in NO_PLACE:
        return f"{os.strerror(number or 0).lower()}{where}", "Choose another location"
    if any(told in text for told in TOLD_OF_SHARED_MEMORY) or (number == errno.ENOSPC and SHARED_MEMORY in text):
        return (
            f"{SHARED_MEMORY} is too small: it has {shared_memory()}",
            "Make it larger (docker run --shm-size=2g), or load samples in the main process (--data.loader_workers 0)",
        )
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(told in text for told in TOLD_OF_MEMORY):
        return (
            f"there is not enough memory{limit()}",
            "Free some memory, or use smaller crops, batches or tiles, or fewer workers",
        )
    return None


def shared_memory() -> str:
    """Return the size of the shared memory as text."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return "none"
    return f"{found.f_blocks * found.f_frsize / 1e6:.0f} MB"


def limit() -> str:
    """Return the memory limit of this process as the end of a message; empty without a limit."""
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if allowed == resource.RLIM_INFINITY else f": this process may have {allowed / 1e6:.0f} MB (ulimit -v)"


@contextmanager
def told(again: str = "the same command resumes") -> Iterator[None]:
    """End the program with one line on stderr if the machine lacks a resource in the block; other errors pass through.

    Args:
        again: What happens when the same is run again, as the end of the message's last sentence.

    Raises:
        SystemExit: If the machine lacks a resource; with STATUS.
    """
    try:
        yield
    except Exception as error:
        if text := in_words(error, again):
            say(f"error: {text}")
            # Errors of the same cause while libraries shut down are not reported again.
            sys.unraisablehook = lambda _: None
            ended = SystemExit(STATUS)
            ended.add_note(text)
            raise ended from error
        raise


def passed_over(path: Path, reason: str) -> None:
    """Report on stderr that a file in a folder of images is skipped."""
    say(f"skipped {path}: it is {reason}")


def say(line: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
