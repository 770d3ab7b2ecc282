"""Create a file under a name that must not exist: the atomic step of a commit, on a file system or an object store."""

import errno
import os
import uuid
from pathlib import Path

from deepskip.data_shards import storage

# What file systems without hard links answer.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP)
# Locations whose object store was seen to refuse a second writer.
_refusing: set[str] = set()


def create(location: str, data: bytes) -> bool:
    """Write a file that must not exist, whole or not at all; of several writers at once, one succeeds.

    On a file system it is a hard link to a synced temporary file, and on an object store a conditional put
    (If-None-Match: *). When it returns, the file is durable. Contents must differ between writers: a writer whose put
    succeeded, but whose answer was lost, recognises its file by them.

    Args:
        location: Path or URL of the file.
        data: Contents of the file.

    Returns:
        Whether this writer created the file; False if another did.

    Raises:
        OSError: If it cannot be written, or the file system has no hard links; a StorageError for a remote file. The file
            may exist nevertheless.
    """
    return (
        _create_remote(location, data) if storage.is_remote(location) else _create_local(storage.local(location), data)
    )


def _create_local(path: Path, data: bytes) -> bool:
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{storage.PART}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
            created = True
        except FileExistsError:
            # An NFS server may have made the link, and its answer was lost.
            created = path.samefile(temporary)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise storage.StorageError(
                f"{path.parent} is on a file system without hard links ({error.strerror}), on which two writers could "
                "overwrite each other; append on another file system or an object store"
            ) from error
    finally:
        temporary.unlink(missing_ok=True)
    storage.sync_folder(path.parent)
    return created


def make_folder(folder: Path) -> None:
    """Make a folder, if it does not exist, and sync its name to disk."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        storage.sync_folder(folder.parent)


def _create_remote(location: str, data: bytes) -> bool:
    # A conflict with a write in progress (409) is retried like a lost connection.
    return _put(location, data) or storage.read_bytes(location) == data


def _put(location: str, data: bytes) -> bool:
    fs, path = storage.filesystem(location)

    def put() -> bool:
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    try:
        return storage.with_retries(location, put)
    except storage.StorageError as error:
        if isinstance(error.__cause__, NotImplementedError):
            raise storage.StorageError(f"{location} cannot be written: its protocol has no uploads") from error
        raise


def require_conditional_put(location: str) -> None:
    """Raise StorageError if an object store overwrites a file that must not exist; asked once for each process and file.

    Some servers ignore the condition, and two writers would overwrite each other there.

    Args:
        location: URL of an existing file, which is written once more, unchanged, if the store ignores the condition. Nothing
            is done for a path.

    Raises:
        StorageError: If the condition is ignored or the store cannot be reached.
    """
    if not storage.is_remote(location) or location in _refusing:
        return
    if _put(location, storage.read_bytes(location)):
        raise storage.StorageError(
            f"the object store of {location} ignores conditional writes (If-None-Match: *), so two writers could overwrite "
            "each other; append to a store that has them, such as Amazon S3, or on a file system"
        )
    _refusing.add(location)
