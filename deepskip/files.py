"""Files that are written whole or not at all: on a disk, on NFS, or behind a URL (s3://, gs://, ...) through fsspec.

On a disk a file gets a temporary name, is synced, renamed within its folder, and the folder is synced; no lock and no time
stamp is relied on. Behind a URL it is uploaded under its own name: object stores show an upload when it is whole, and what
another store shows of half an upload has no valid checksum (deepskip.checkpoint).
"""

import contextlib
import errno
import os
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

TRIES = 6
FIRST_WAIT = 0.5
PART = ".part"

# a path on this machine, or a URL
Location = Path | str
T = TypeVar("T")


def locate(location: Location) -> Location:
    """Gives a URL as it is, and anything else, file:// too, as a Path."""
    return location if is_url(location) else Path(str(location).removeprefix("file://"))


def is_url(location: Location) -> bool:
    """Says whether a location is behind a URL and not on a disk."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def join(folder: Location, *names: str) -> Location:
    """Names something in a folder."""
    return "/".join((str(folder).rstrip("/"), *names)) if is_url(folder) else Path(locate(folder), *names)


def name(location: Location) -> str:
    """Gives the last part of a location."""
    return str(location).rsplit("/", 1)[-1]


def read(location: Location) -> bytes:
    """Reads a whole file; raises FileNotFoundError or another OSError."""
    if not is_url(location):
        return Path(location).read_bytes()
    store, path = remote(location)
    return with_retries(location, lambda: store.cat_file(path))


def write(location: Location, data: bytes | bytearray) -> None:
    """Writes a file and makes the folders above it; raises OSError, and then a file that was there before is still there."""
    if is_url(location):
        store, remote_path = remote(location)
        with_retries(location, lambda: store.pipe_file(remote_path, bytes(data)))
        return
    path = Path(location)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, where renames live; some network file systems do not know how, and need not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def names(folder: Location) -> list[str]:
    """Lists the names in a folder, sorted; [] where there is no folder."""
    try:
        if not is_url(folder):
            return sorted(os.listdir(folder))  # noqa: PTH208
        store, path = remote(folder)
        # others write there too
        store.invalidate_cache()
        found = with_retries(folder, lambda: store.ls(path, detail=False))
        return sorted(name(entry.rstrip("/")) for entry in found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def rename(location: Location, new: str) -> None:
    """Gives a file another name in its folder."""
    if is_url(location):
        store, path = remote(location)
        with_retries(location, lambda: store.mv(path, f"{path.rsplit('/', 1)[0]}/{new}"))
    else:
        Path(location).replace(Path(location).with_name(new))


def remove(location: Location) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if is_url(location):
            store, path = remote(location)
            with_retries(location, lambda: store.rm_file(path))
        else:
            Path(location).unlink()


def remove_leftovers(folder: Location) -> None:
    """Removes what killed writers left; nobody may be writing there. Half an upload is not seen, so there is none to remove."""
    if not is_url(folder):
        for part in Path(folder).glob(f".*{PART}"):
            part.unlink(missing_ok=True)


def remote(location: Location) -> tuple[Any, str]:
    """Gives fsspec's file system of a URL and the path in it; raises OSError that says what to install."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(str(location))
    except ImportError as error:
        raise OSError(f"{location} needs a package that is not installed: {error}. pip install '.[cloud]'") from error
    except ValueError as error:
        raise OSError(f"{location} is no URL that files can be at: {error}") from error


def with_retries(location: Location, action: Callable[[], T]) -> T:
    """Does something remote until it works, waiting twice as long each time; raises OSError when the tries are used up."""
    for attempt in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        # every file system has errors of its own
        except Exception as error:
            if attempt == TRIES - 1:
                raise OSError(f"{location}: {TRIES} tries, the last: {type(error).__name__}: {error}") from error
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25))
    raise AssertionError("unreachable")
