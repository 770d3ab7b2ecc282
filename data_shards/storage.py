"""Files on a disk, on NFS or behind a URL (s3://, gs://, http://) through fsspec, with retries and a cache."""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import stat
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
# A path on this machine, or a URL.
Location = Path | str
T = TypeVar("T")
L = TypeVar("L", bound=Path | str)


class StorageError(OSError):
    """A remote file could not be read or written after all tries; the message says which, how often and why."""


class ChangedFile(StorageError):
    """A file does not match its entry in the index."""


class CacheFull(StorageError):
    """A file does not fit into the cache."""


class Unreached(StorageError):
    """A server did not answer, or refused for now; later it may."""


def is_remote(location: Location) -> bool:
    """Return whether a location is a URL of another machine; file:// is not."""
    return isinstance(location, str) and "://" in location and not location.startswith("file://")


def locate(location: Location) -> Location:
    """Return a remote URL unchanged, and anything else, also file://, as a Path."""
    return location if is_remote(location) else local(location)


def local(location: Location) -> Path:
    """Return the path on this machine of a location that is not remote; ~ is the user's own folder."""
    path = Path(str(location).removeprefix("file://"))
    return path.expanduser() if path.parts[:1] == ("~",) else path


def join(folder: L, *names: str) -> L:
    """Return the location of `names` in a folder, a path or string as the folder is one."""
    if isinstance(folder, Path):
        return folder.joinpath(*names)
    url = "://" in folder
    return "/".join((folder.rstrip("/"), *names)) if url else str(Path(folder, *names))  # type: ignore[return-value]


def name(location: Location) -> str:
    """Return the last part of a location."""
    return str(location).rstrip("/").rsplit("/", 1)[-1]


def read_bytes(location: Location) -> bytes:
    """Read a whole small file.

    Raises:
        FileNotFoundError: If the file does not exist.
        StorageError: If a remote file cannot be read after all tries.
        OSError: If a local file cannot be read.
    """
    if not is_remote(location):
        return local(location).read_bytes()
    fs, path = filesystem(location)
    content: bytes = with_retries(location, lambda: fs.cat_file(path))
    return content


def write_bytes(location: Location, data: bytes | bytearray | memoryview) -> None:
    """Write a file, whole or not at all, and make the folders above it; on an error, an older file stays.

    A remote file is uploaded under its final name: object stores show an upload only when it is complete. Half an upload that
    another kind of store may show has no valid checksum.

    Args:
        location: Path or URL of the file.
        data: Contents of the file.

    Raises:
        OSError: If the file cannot be written; a StorageError for a remote one.
    """
    if is_remote(location):
        fs, remote = filesystem(location)
        with_retries(location, lambda: fs.pipe_file(remote, bytes(data)))
        return
    with written_whole(local(location)) as temporary, temporary.open("wb") as file:
        file.write(data)


def temporary_beside(path: Path) -> Path:
    """Return a path next to another, hidden and with a name that nobody else chooses, for a file that is being written."""
    # A name has 255 bytes at most, and a letter 4.
    name = path.name if len(os.fsencode(path.name)) < 240 else path.name[:40]
    return path.with_name(f".{name}.{uuid.uuid4().hex[:8]}{PART}")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` when the block ends; on an error it is removed.

    The folders above it are made. The file is synced to disk, renamed within its folder, and the folder is synced. This needs
    no locks and no time stamps.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
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
    """Open a file for unbuffered binary access, but never through a symbolic link.

    Anyone with write access to a folder could place a link there, through which another file would be overwritten.

    Args:
        path: The file.
        flags: Flags of os.open.

    Yields:
        The open file.

    Raises:
        OSError: If the file cannot be opened or is a symbolic link.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(
            errno.ELOOP, "is a symbolic link, through which nothing is written; remove it", str(path)
        ) from None
    access = flags & os.O_ACCMODE
    with os.fdopen(
        descriptor, "rb" if access == os.O_RDONLY else "r+b" if access == os.O_RDWR else "wb", buffering=0
    ) as file:
        yield file


def lock_file(path: Path) -> BinaryIO:
    """Open a file for locking; it is created if needed, and its contents are kept.

    Raises:
        OSError: If the file cannot be opened or is a symbolic link.
    """
    with opened(path, os.O_RDWR | os.O_CREAT) as file:
        return os.fdopen(os.dup(file.fileno()), "r+b", buffering=0)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, which makes renames durable; file systems that do not support this are accepted."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(location: Location) -> None:
    """Remove a file if it exists."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(location):
            fs, path = filesystem(location)
            with_retries(location, lambda: fs.rm_file(path))
        else:
            local(location).unlink()


def rename(location: Location, new: str) -> None:
    """Rename a file within its folder."""
    if is_remote(location):
        fs, path = filesystem(location)
        with_retries(location, lambda: fs.mv(path, f"{path.rsplit('/', 1)[0]}/{new}"))
    else:
        local(location).replace(local(location).with_name(new))


def remove_leftovers(folder: Location) -> None:
    """Remove temporary files of killed writers from a folder, in which nobody may be writing; nothing is done for URLs."""
    if not is_remote(folder):
        for part in local(folder).glob(f".*{PART}"):
            part.unlink(missing_ok=True)


def exists(location: Location) -> bool:
    """Return whether a location is an existing file."""
    if not is_remote(location):
        return local(location).is_file()
    fs, path = filesystem(location)
    return with_retries(location, lambda: bool(fs.isfile(path)))


def size(location: Location) -> int:
    """Return the size of a file in bytes, before it is read.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is not a plain file, such as a pipe, which could be read for ever.
        StorageError: If a remote storage cannot be asked after all tries.
        OSError: As before.
    """
    if is_remote(location):
        fs, path = filesystem(location)
        told = with_retries(location, lambda: fs.info(path))
        if told.get("type", "file") != "file":
            raise ValueError(f"{location} is not a file")
        return int(told.get("size") or 0)
    found = local(location).stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{location} is not a plain file")
    return found.st_size


def names(folder: Location) -> list[str]:
    """Return the names in a folder, sorted.

    Raises:
        FileNotFoundError: If the folder does not exist.
        NotADirectoryError: If it is a file.
        StorageError: If a remote folder cannot be listed after all tries.
    """
    if not is_remote(folder):
        return sorted(os.listdir(local(folder)))  # noqa: PTH208
    fs, path = filesystem(folder)
    return sorted(name(entry) for entry in with_retries(folder, lambda: fs.ls(path, detail=False)))


def filesystem(location: Location) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it.

    Raises:
        StorageError: If a package is missing, which the message names, or the URL is not valid.
    """
    import fsspec

    # Other processes write there too: a file is looked for, not for its name in an earlier listing.
    options: dict[str, Any] = {"use_listings_cache": False}
    location = str(location)
    if location.startswith(("http://", "https://")):
        import aiohttp

        # A large shard may take any time, but not without receiving data.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)}
    try:
        fs, path = fsspec.core.url_to_fs(location, **options)
    except ImportError as error:
        raise StorageError(
            f"{location} needs a package that is not installed: {error}. pip install '.[cloud]'"
        ) from error
    except ValueError as error:
        raise StorageError(f"{location} is not a URL that files can be at: {error}") from error
    return fs, path


def with_retries(location: Location, action: Callable[[], T]) -> T:
    """Call an action until it succeeds, with a wait that doubles after each try, and return its result.

    Args:
        location: Location in messages.
        action: The action.

    Raises:
        FileNotFoundError: If the action raises it; without a retry, like PermissionError, ChangedFile and CacheFull.
        Unreached: If all tries fail.
        StorageError: If the server answers that a retry is useless.
    """
    started = time.monotonic()
    for attempt in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, PermissionError, ChangedFile, CacheFull):
            raise
        # Each file system raises errors of its own.
        except Exception as error:
            permanent = getattr(error, "status", 500) in range(400, 500) and error.status not in (408, 425, 429)  # type: ignore[attr-defined]
            if permanent or attempt == TRIES - 1:
                raise (StorageError if permanent else Unreached)(
                    f"{location} cannot be reached: {attempt + 1} tries in {time.monotonic() - started:.1f} s, "
                    f"the last: {type(error).__name__}: {error}. Check the address, the credentials and the network."
                ) from error
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25))
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Cache:
    """Copies of remote files on this machine's disk, shared by all its processes.

    A copy is named by the sha256 of its contents, and appears whole or not at all. Processes that need the same file wait for
    the one that fetches it. A killed process leaves a partial file, which the next process that makes room removes.

    Attributes:
        folder: Folder of the copies.
        limit: Largest size of all copies together in bytes; the least recently used are removed first.
    """

    folder: Path
    limit: int

    def fetch(self, location: str, size: int, sha256: str) -> Path:
        """Return the local copy of a remote file, which is fetched if it is missing.

        Args:
            location: URL of the file.
            size: Its size in bytes.
            sha256: sha256 of its contents, as hexadecimal digits.

        Raises:
            FileNotFoundError: If the remote file does not exist.
            ChangedFile: If it has another size or sha256.
            CacheFull: If it is larger than the cache.
            StorageError: If it cannot be reached after all tries.
        """
        folder = self.folder.expanduser()
        path = folder / sha256
        part = folder / f"{sha256}.{size}{PART}"
        while not self._touch(path, size):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(part) as held:
                # The process that held the lock before may have finished the file.
                if held and not path.exists():
                    self._make_room(size, part)
                    download(location, part, size, sha256)
                    with part.open("rb") as file:
                        os.fsync(file.fileno())
                    part.replace(path)
        return path

    def _touch(self, path: Path, size: int) -> bool:
        try:
            os.utime(path)
            if path.stat().st_size == size:
                return True
            # An earlier version, or a disk that lost power, left less.
            path.unlink()
        except FileNotFoundError:
            pass
        return False

    def _make_room(self, size: int, mine: Path) -> None:
        if size > self.limit:
            raise CacheFull(f"a file of {size} bytes does not fit into the cache of {self.limit} at {self.folder}")
        with lock_file(mine.parent / ".lock") as lock, flock(lock):
            copies = []
            total = size
            for path in mine.parent.iterdir():
                if path == mine or path.name == ".lock" or (path.suffix == PART and remove_abandoned(path)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if path.suffix == PART:
                        # Count the size that the file will have when it is complete.
                        total += int(path.suffixes[-2][1:])
                    else:
                        total += status.st_size
                        copies.append((status.st_mtime, status.st_size, path))
            for _, freed, path in sorted(copies):
                if total <= self.limit:
                    break
                # A process that has the copy open can continue to read it.
                path.unlink(missing_ok=True)
                total -= freed


@contextlib.contextmanager
def locked(part: Path) -> Iterator[bool]:
    """Create and lock a file to download into, and remove it at the end unless it was renamed.

    The lock ends with the process.

    Args:
        part: Path of the partial file.

    Yields:
        False if the file was removed or renamed while this process waited for the lock, else True.
    """
    with lock_file(part) as file, flock(file):
        try:
            yield same_file(file, part)
        finally:
            if same_file(file, part):
                part.unlink()


@contextlib.contextmanager
def flock(file: BinaryIO, more: int = 0) -> Iterator[None]:
    """Hold the lock of an open file.

    It is released explicitly. Closing the file would not do: a loader process that was forked meanwhile has it open too, and
    would wait for itself.

    Args:
        file: The file.
        more: Flags besides LOCK_EX.

    Raises:
        BlockingIOError: If another process holds it, with LOCK_NB.
    """
    fcntl.flock(file, fcntl.LOCK_EX | more)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def same_file(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove_abandoned(part: Path) -> bool:
    """Remove a partial file whose process has ended, and return whether it is gone."""
    try:
        # NFS locks exclusively only what is open for writing.
        with part.open("r+b") as file, flock(file, fcntl.LOCK_NB):
            if same_file(file, part):
                part.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def download(location: Location, target: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Copy a remote file to a local one, in a single request if the connection holds.

    Args:
        location: URL of the file.
        target: Local file to write; an existing one is overwritten.
        size: Expected size in bytes; None accepts any.
        sha256: Expected sha256, as hexadecimal digits; None accepts any.

    Raises:
        FileNotFoundError: If the remote file does not exist.
        ChangedFile: If its size or sha256 is not the expected one.
        StorageError: If it cannot be reached after all tries.
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
    """Compute the sha256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
