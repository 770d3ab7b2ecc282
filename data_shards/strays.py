"""Files in the folder of a split that no generation names: those of an append in progress, or of a writer that died."""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from deepskip.data_shards import manifest, storage
from deepskip.data_shards.appending import STAGING
from deepskip.data_shards.index import load_first

# Names that only appends choose: other files are not judged.
OWN = re.compile(r"shard-[0-9a-f]{32}-[0-9]{6}\.tar|\.?samples-[0-9a-f]{32}\.arrow(\.[0-9a-f]+\.part)?")
TEMPORARY = re.compile(r"\.[0-9]{8}\.json\.[0-9a-f]+\.part")


class Stray(NamedTuple):
    """A file, or a folder of an append, that is not part of a split.

    Attributes:
        location: Its path or URL.
        modified: When it was last written, in seconds since 1970.
    """

    location: str
    modified: float


def strays(split: str) -> list[Stray]:
    """Return what appends have left in a split, or are writing.

    Args:
        split: Path or URL of the split.

    Raises:
        MissingIndex: If there is no split.
        BrokenIndex: If its index is damaged.
        BrokenChain: If its chain is.
        OSError: If it cannot be listed.
    """
    # Files are listed first: what is committed after that is read as part of the chain.
    found = [*_listed(split, OWN), *_listed(storage.join(split, manifest.FOLDER), TEMPORARY)]
    chain = manifest.read_chain(split, [load_first(split)[0]])
    part = {shard["name"] for each in chain for shard in each.raw["shards"]}
    part |= {each.raw["samples"]["file"] for each in chain}
    return [each for each in found if storage.name(each.location) not in part]


def _listed(folder: str, pattern: re.Pattern[str]) -> Iterator[Stray]:
    if not storage.is_remote(folder):
        path = storage.local(folder)
        for each in sorted(path.iterdir()) if path.is_dir() else ():
            if pattern.fullmatch(each.name) or (pattern is OWN and each.name.startswith(STAGING)):
                # A writer may remove it at any moment.
                with contextlib.suppress(FileNotFoundError):
                    yield Stray(str(each), _modified(each))
        return
    fs, remote = storage.filesystem(folder)
    try:
        entries = storage.with_retries(folder, lambda: fs.ls(remote, detail=True))
    except FileNotFoundError:
        return
    for entry in entries:
        name = storage.name(entry["name"])
        if pattern.fullmatch(name):
            yield Stray(storage.join(folder, name), time_of(entry))


def _modified(path: Path) -> float:
    """Return when a file, or the newest of a folder, was last written."""
    files = [path, *(path.rglob("*") if path.is_dir() else ())]
    return float(max(each.stat().st_mtime for each in files))


def time_of(entry: dict[str, Any]) -> float:
    """Return when an object was written; the present if its store does not say."""
    for name in ("LastModified", "mtime", "updated", "last_modified"):
        found = entry.get(name)
        if isinstance(found, datetime):
            return float(found.timestamp())
        if isinstance(found, str):
            return datetime.fromisoformat(found.replace("Z", "+00:00")).timestamp()
    return time.time()


def remove(found: list[Stray], hours: float) -> list[Stray]:
    """Remove what is older than some hours, and return it; younger files may belong to an append in progress.

    Args:
        found: Files, from `strays`.
        hours: Their least age.

    Raises:
        OSError: If a file cannot be removed.
    """
    old = [each for each in found if each.modified < time.time() - 3600 * hours]
    for each in old:
        if not storage.is_remote(each.location) and storage.local(each.location).is_dir():
            shutil.rmtree(storage.local(each.location), ignore_errors=True)
        else:
            storage.remove(each.location)
    return old
