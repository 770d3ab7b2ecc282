"""Files wherever they lie: on a disk, on NFS, behind a URL (s3://, gs://, http://) through fsspec, with retries and a cache."""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

TRIES = 6
FIRST_WAIT = 0.5
PART = ".part"
DEFAULT_CACHE = "~/.cache/deepskip"
# a path on this machine, or a URL
Location = Path | str
T = TypeVar("T")
L = TypeVar("L", bound=Path | str)


class StorageError(OSError):
    """A remote file could not be read or written after all tries; says which, how often and why."""


class ChangedFile(StorageError):
    """A file is not, or is no longer, what its index says."""


class CacheFull(StorageError):
    """A file does not fit into the cache."""


def is_remote(location: Location) -> bool:
    """Says whether a location is a URL of another machine's."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def locate(location: Location) -> Location:
    """Gives a URL as it is, and anything else, file:// too, as a Path."""
    return location if is_remote(location) else local(location)


def local(location: Location) -> Path:
    """Gives the path on this machine of a location that is no URL of another's."""
    return Path(str(location).removeprefix("file://"))


def join(folder: L, *names: str) -> L:
    """Names something in a folder, local or URL, as a path or a string as the folder is one."""
    if isinstance(folder, Path):
        return folder.joinpath(*names)
    url = "://" in folder
    return "/".join((folder.rstrip("/"), *names)) if url else str(Path(folder, *names))  # type: ignore[return-value]


def name(location: Location) -> str:
    """Gives the last part of a location."""
    return str(location).rstrip("/").rsplit("/", 1)[-1]


def read_bytes(location: Location) -> bytes:
    """Reads a whole small file; raises FileNotFoundError or another OSError, StorageError when the tries are used up."""
    if not is_remote(location):
        return local(location).read_bytes()
    fs, path = filesystem(location)
    return with_retries(location, lambda: fs.cat_file(path))


def write_bytes(location: Location, data: bytes | bytearray | memoryview) -> None:
    """Writes a file, whole or not at all, and makes the folders above it; raises OSError, and one before it is still there.

    Behind a URL it is uploaded under its own name: object stores show an upload when it is whole, and what another store shows
    of half an upload has no valid checksum.
    """
    if is_remote(location):
        fs, remote = filesystem(location)
        with_retries(location, lambda: fs.pipe_file(remote, bytes(data)))
        return
    with written_whole(local(location)) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name for a file, which it has under its own, on the disk, when the block ends well, else is removed.

    The folders above it are made. It is synced, renamed within its folder, and the folder is synced; no lock and no time
    stamp is relied on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[BinaryIO]:
    """Opens a file of our own by os.open's flags, for bytes; raises OSError, for a symbolic link too.

    Whoever may write into a folder could lay a link there, through which another file would be written.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(
            errno.ELOOP, "is a symbolic link, through which nothing is written; remove it", str(path)
        ) from None
    with os.fdopen(descriptor, "r+b" if flags & os.O_RDWR else "wb", buffering=0) as file:
        yield file


def lock_file(path: Path) -> BinaryIO:
    """Opens a file to lock, which is made where there is none and keeps what it holds; raises OSError, as `opened`."""
    with opened(path, os.O_RDWR | os.O_CREAT) as file:
        return os.fdopen(os.dup(file.fileno()), "r+b", buffering=0)


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


def remove(location: Location) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(location):
            fs, path = filesystem(location)
            with_retries(location, lambda: fs.rm_file(path))
        else:
            local(location).unlink()


def rename(location: Location, new: str) -> None:
    """Gives a file another name in its folder."""
    if is_remote(location):
        fs, path = filesystem(location)
        with_retries(location, lambda: fs.mv(path, f"{path.rsplit('/', 1)[0]}/{new}"))
    else:
        local(location).replace(local(location).with_name(new))


def remove_leftovers(folder: Location) -> None:
    """Removes what killed writers left; nobody may be writing there. Half an upload is not seen, so there is none to remove."""
    if not is_remote(folder):
        for part in local(folder).glob(f".*{PART}"):
            part.unlink(missing_ok=True)


def exists(location: Location) -> bool:
    """Says whether a file is there."""
    if not is_remote(location):
        return local(location).is_file()
    fs, path = filesystem(location)
    return with_retries(location, lambda: bool(fs.isfile(path)))


def names(folder: Location) -> list[str]:
    """Lists the names in a folder, sorted; raises FileNotFoundError or NotADirectoryError where it is none."""
    if not is_remote(folder):
        return sorted(os.listdir(local(folder)))  # noqa: PTH208
    fs, path = filesystem(folder)
    # others write there too
    fs.invalidate_cache()
    return sorted(name(entry) for entry in with_retries(folder, lambda: fs.ls(path, detail=False)))


def filesystem(location: Location) -> tuple[Any, str]:
    """Gives fsspec's file system of a URL and the path in it; raises StorageError that says what to install."""
    import fsspec

    options: dict[str, Any] = {}
    location = str(location)
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
        raise StorageError(f"{location} is no URL that files can be at: {error}") from error
    return fs, path


def with_retries(location: Location, action: Callable[[], T]) -> T:
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
        with lock_file(mine.parent / ".lock") as lock:
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
    with lock_file(part) as file:
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


def download(location: Location, target: Path, size: int | None = None, sha256: str | None = None) -> None:
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
