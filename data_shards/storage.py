"""Files wherever they lie: local paths, and s3://, gs://, http(s):// through fsspec with retries and a bounded disk cache."""

import contextlib
import fcntl
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

TRIES = 6
FIRST_WAIT = 0.25
PART = ".part"
DEFAULT_CACHE = "~/.cache/deepskip"
T = TypeVar("T")


class StorageError(OSError):
    """A remote file could not be read or written after all tries; says which, how often and why."""


class ChangedFile(StorageError):
    """A file is not, or is no longer, what its index says."""


class CacheFull(StorageError):
    """A file does not fit into the cache."""


def is_remote(location: str) -> bool:
    """Says whether a location is a URL of another machine's."""
    return "://" in location and not location.startswith("file://")


def join(folder: str, name: str) -> str:
    """Joins a folder, local or URL, and a name."""
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else str(Path(folder) / name)


def read_bytes(location: str) -> bytes:
    """Reads a whole small file; raises FileNotFoundError, or StorageError when the tries are used up."""
    if not is_remote(location):
        return Path(location.removeprefix("file://")).read_bytes()
    fs, path = filesystem(location)
    return with_retries(location, lambda: fs.cat_file(path))


def write_bytes(location: str, data: bytes | memoryview) -> None:
    """Writes a whole file or nothing: local ones through a rename, remote ones as one object."""
    if is_remote(location):
        fs, remote = filesystem(location)
        with_retries(location, lambda: fs.pipe_file(remote, bytes(data)))
        return
    path = Path(location.removeprefix("file://"))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove(location: str) -> None:
    """Removes a file; one that is gone already, or cannot be removed where only reading is allowed, is left."""
    with contextlib.suppress(OSError, NotImplementedError):
        if is_remote(location):
            fs, path = filesystem(location)
            fs.rm_file(path)
        else:
            Path(location.removeprefix("file://")).unlink()


def exists(location: str) -> bool:
    """Says whether a file is there."""
    if not is_remote(location):
        return Path(location.removeprefix("file://")).is_file()
    fs, path = filesystem(location)
    return with_retries(location, lambda: bool(fs.isfile(path)))


def list_files(folder: str, extension: str) -> list[str]:
    """Gives the names of a folder's files that end with an extension, sorted; raises FileNotFoundError for no folder."""
    if not is_remote(folder):
        return sorted(p.name for p in Path(folder.removeprefix("file://")).iterdir() if p.name.endswith(extension))
    fs, path = filesystem(folder)
    found = with_retries(folder, lambda: fs.ls(path, detail=False))
    return sorted(name for entry in found if (name := entry.rstrip("/").rsplit("/", 1)[-1]).endswith(extension))


def filesystem(location: str) -> tuple[Any, str]:
    """Gives fsspec's file system of a URL and the path in it; raises StorageError that says what to install."""
    import fsspec

    options: dict[str, Any] = {}
    if location.startswith(("http://", "https://")):
        import aiohttp

        # no limit on the whole of a large shard, but on silence
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)}
    try:
        fs, path = fsspec.core.url_to_fs(location, **options)
    except ImportError as error:
        raise StorageError(
            f"{location} needs a package that is not installed: {error}. pip install '.[cloud]'"
        ) from error
    except ValueError as error:
        raise StorageError(f"{location} is no URL that can be read: {error}") from error
    return fs, path


def with_retries(location: str, action: Callable[[], T]) -> T:
    """Does something remote until it works, waiting twice as long each time; gives its result.

    Raises FileNotFoundError and PermissionError at once, StorageError when the tries are used up.
    """
    started = time.monotonic()
    for attempt in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, PermissionError, ChangedFile, CacheFull):
            raise
        # each file system has errors of its own
        except Exception as error:
            permanent = getattr(error, "status", 500) in range(400, 500) and error.status not in (408, 425, 429)  # type: ignore[attr-defined]
            if permanent or attempt == TRIES - 1:
                raise StorageError(
                    f"{location} cannot be reached: {attempt + 1} tries in {time.monotonic() - started:.1f} s, "
                    f"the last: {type(error).__name__}: {error}. Check the address, the credentials and the network."
                ) from error
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25))
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Cache:
    """Copies of remote files on this machine's disk, shared by all its processes.

    folder: where. limit: bytes of all copies together; the least recently used go first. A copy bears the sha256 of its
    contents, and appears whole or not at all. Processes that want the same file wait for the one that fetches it; a process
    that is killed leaves a part that the next one to make room removes.
    """

    folder: Path
    limit: int

    def fetch(self, location: str, size: int, sha256: str) -> Path:
        """Gives the local copy of a remote file, fetching it where it is not there.

        Raises FileNotFoundError, ChangedFile where contents are not of that size and sha256, CacheFull, StorageError.
        """
        folder = self.folder.expanduser()
        path = folder / sha256
        part = folder / f"{sha256}.{size}{PART}"
        while not self._touch(path):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(part) as held:
                # whoever held the part before may have finished the file
                if held and not path.exists():
                    self._make_room(size, part)
                    download(location, part, size, sha256)
                    part.replace(path)
        return path

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int, mine: Path) -> None:
        if size > self.limit:
            raise CacheFull(f"a file of {size} bytes does not fit into the cache of {self.limit} at {self.folder}")
        with (mine.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies = []
            total = size
            for path in mine.parent.iterdir():
                if path == mine or path.name == ".lock" or (path.suffix == PART and remove_abandoned(path)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if path.suffix == PART:
                        # what it will have when it is whole
                        total += int(path.suffixes[-2][1:])
                    else:
                        total += status.st_size
                        copies.append((status.st_mtime, status.st_size, path))
            for _, freed, path in sorted(copies):
                if total <= self.limit:
                    break
                # who has it open can go on reading it
                path.unlink(missing_ok=True)
                total -= freed


@contextlib.contextmanager
def locked(part: Path) -> Iterator[bool]:
    """Creates and locks a file to download into; False where it was taken away while this waited for the lock.

    The lock ends with the process. What is still there under this name at the end is removed.
    """
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield same_file(file, part)
        finally:
            if same_file(file, part):
                part.unlink()


def same_file(file: BinaryIO, path: Path) -> bool:
    """Says whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove_abandoned(part: Path) -> bool:
    """Removes a part whose process is gone, and says whether there is none any more."""
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if same_file(file, part):
                part.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def download(location: str, target: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Copies a remote file over a local one, in one request where nothing breaks off.

    size, sha256: what it must have; None takes what comes. Raises FileNotFoundError, ChangedFile, StorageError.
    """
    fs, path = filesystem(location)

    def copy() -> None:
        fs.get_file(path, str(target))
        found = target.stat().st_size
        if size is not None and found < size and fs.info(path)["size"] == size:
            raise OSError(f"ended after {found} of {size} bytes")
        if size is not None and found != size:
            raise ChangedFile(f"{location} has {found} bytes where its index says {size}")

    with_retries(location, copy)
    if sha256 is not None and file_sha256(target) != sha256:
        raise ChangedFile(f"{location} has the right size but other contents than when it was indexed (sha256 differs)")


def file_sha256(path: Path) -> str:
    """Computes a file's sha256 as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
