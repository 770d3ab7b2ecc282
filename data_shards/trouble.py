"""What a machine is short of, in words: a full disk, no rights, no memory, no descriptors, and what to do about each."""

import errno
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# of the program then
STATUS = 2
# a path that cannot be a file or folder there, whatever rights there are
NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
SHARED_MEMORY = "/dev/shm"  # noqa: S108
# what torch says of it, whose workers die of it
TOLD_OF_SHARED_MEMORY = (
    "Bus error",
    "shared memory",
    "unable to allocate shared",
    "unable to mmap",
    "unable to write to file </torch",
)
# what libraries say of threads and memory that the system refused
TOLD_OF_MEMORY = (
    "can't start new thread",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "failed to map segment",
    "not enough memory",
    # of an import for which there was no room
    "returned NULL without setting an exception",
)


def in_words(error: BaseException | None, again: str = "the same command goes on") -> str | None:
    """Says what a machine is short of where an error, or what led to it, tells of that; None for any other error.

    again: what happens when the same is done again.
    """
    while error is not None:
        if found := cause(error):
            what, cure = found
            return f"{what}. {cure}, and {again}."
        # Ray's errors keep what they are of in a field
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def cause(error: BaseException) -> tuple[str, str] | None:
    """Gives what one error tells that a machine is short of, and the cure."""
    text = str(error)
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EMFILE:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many files are open{where}: this process may have {allowed}", "Allow more (ulimit -n 4096)"
    if number == errno.ENFILE:
        return f"this machine has too many files open{where}", "End other programs"
    if number in (errno.ENOSPC, errno.EDQUOT) and SHARED_MEMORY not in text:
        return f"the disk is full{where}", "Make room"
    if number == errno.EROFS:
        return f"nothing can be written{where}: the file system is read-only", "Name another place"
    if number in (errno.EACCES, errno.EPERM):
        return f"permission denied{where}", "Give this user the right, or name another place"
    if isinstance(error, OSError) and number in NO_PLACE:
        return f"{os.strerror(number or 0).lower()}{where}", "Name another place"
    if any(told in text for told in TOLD_OF_SHARED_MEMORY) or (number == errno.ENOSPC and SHARED_MEMORY in text):
        return (
            f"{SHARED_MEMORY} is too small: it has {shared_memory()}",
            "Give it more (docker run --shm-size=2g), or read in the process itself (--data.loader_workers 0)",
        )
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(told in text for told in TOLD_OF_MEMORY):
        return (
            f"there is not enough memory{limit()}",
            "Make room, or take smaller crops, batches or tiles, or fewer workers",
        )
    return None


def shared_memory() -> str:
    """Says how large the shared memory is."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return "none"
    return f"{found.f_blocks * found.f_frsize / 1e6:.0f} MB"


def limit() -> str:
    """Says how much memory this process may have, where it is told."""
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if allowed == resource.RLIM_INFINITY else f": this process may have {allowed / 1e6:.0f} MB (ulimit -v)"


@contextmanager
def told(again: str = "the same command goes on") -> Iterator[None]:
    """Ends the program with one line where a machine was short of something in the block."""
    try:
        yield
    except Exception as error:
        if text := in_words(error, again):
            say(f"error: {text}")
            # what goes wrong while libraries put themselves away, for the same reason, is not told again
            sys.unraisablehook = lambda _: None
            ended = SystemExit(STATUS)
            ended.add_note(text)
            raise ended from error
        raise


def passed_over(path: Path, reason: str) -> None:
    """Says that something in a folder of images is left out."""
    say(f"{path} is passed over: it is {reason}")


def say(line: str) -> None:
    """Says a line on stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
