"""Append a generation to a split: its shards first, under names of their own, and last its manifest, by an atomic commit.

Concurrency is optimistic. Of two writers that commit the same number, one succeeds. The other reads the chain again and commits
the next number. A writer that dies leaves files that are not part of the split (`strays`).
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from deepskip.data_shards import commit, index_check, storage
from deepskip.data_shards.index import (
    FILE,
    BrokenIndex,
    Index,
    MissingIndex,
    ShardEntry,
    load_first,
    load_index,
    load_samples,
    plain_fields,
    samples_file,
    save_index,
    tars_in,
)
from deepskip.data_shards.indexing import index_shards
from deepskip.data_shards.labels import AS_LABELS, listed
from deepskip.data_shards.manifest import (
    ADVANCE,
    FORMAT,
    VERSION,
    Generation,
    conflict,
    location_of,
    read_chain,
)
from deepskip.data_shards.progress import Progress, no_progress

STAGING = ".append-"
# Commits that find the number taken although no manifest of it can be read.
MAX_UNEXPLAINED = 20


class AppendError(ValueError):
    """Samples that cannot be appended to a split; the message says why."""


class Appended(NamedTuple):
    """The result of an append.

    Attributes:
        generation: The generation that holds the samples.
        repeated: Whether an earlier append had committed it, so that nothing was written now.
        chain: The generations of the split as last read, for the next append of this process.
    """

    generation: Generation
    repeated: bool
    chain: list[Generation]


def append_split(
    split: str,
    packed: Path,
    *,
    watermark: float | None = None,
    offsets: Mapping[str, int | str] | None = None,
    chain: list[Generation] | None = None,
    repeated_keys: bool = False,
    unlike: int = 0,
    cache: storage.Cache | None = None,
) -> Appended:
    """Append the samples of a packed split to another split, as its next generation.

    A source is committed once: if a generation was made of the same source (`Index.source`), that one is returned.

    Args:
        split: Path or URL of the split to append to, which has an index.json.
        packed: Folder of the samples, as `write_shards` makes it. Its shards are moved away if both are on this machine.
        watermark: Time up to which the source's data is in the chain after this, in seconds since 1970.
        offsets: For each source the offset up to which its data is in the chain after this.
        chain: Generations that were read before, of which then only later ones are read.
        repeated_keys: Whether samples may have keys of earlier ones. If not, the keys of all generations are read.
        unlike: Number of generations, from the first, that are known to have neither these keys nor this source.
        cache: Where the samples files of a remote split are kept.

    Raises:
        AppendError: If the samples do not fit those of generation 0, or a key is in the chain already.
        MissingIndex: If there is no split.
        BrokenIndex: If its index is damaged.
        BrokenChain: If its chain is.
        OSError: If a file cannot be written. It may be committed nevertheless if that was the last step: append it again.
    """
    chain = read_chain(split, chain or [load_first(split)[0]])
    index = load_index(packed)
    commit.require_conditional_put(storage.join(split, FILE))
    token = uuid.uuid4().hex
    index, placed = renamed(index, token)
    samples = samples_file(index.samples)
    name = f"samples-{token}.arrow"
    fields = plain_fields(index, name, samples) | {"watermark": watermark, "offsets": dict(offsets or {})}
    index_check.check_fields({field: fields[field] for field in ADVANCE}, ADVANCE, "the generation")
    if reason := conflict(chain[0].raw, fields):
        raise AppendError(f"the samples do not fit {split}: {reason}")
    keys = None if repeated_keys else index.samples["key"]
    if (before := look_for(split, chain[unlike:], index.source, keys, cache)) is not None:
        return Appended(before, True, chain)
    written = [storage.join(split, each) for each in (*placed.values(), name)]
    try:
        for old, new in placed.items():
            place(packed / old, storage.join(split, new))
        storage.write_bytes(storage.join(split, name), samples)
        require_whole(split, index)
    except BaseException:
        remove_all(written)
        raise
    unexplained = 0
    while unexplained < MAX_UNEXPLAINED:
        made = commit_next(split, chain, fields, token)
        if made is not None:
            return Appended(made, False, [*chain, made])
        known = len(chain)
        chain = read_chain(split, chain)
        try:
            before = look_for(split, chain[known:], index.source, keys, cache)
        except AppendError:
            remove_all(written)
            raise
        if before is not None:
            remove_all(written)
            return Appended(before, True, chain)
        if len(chain) == known:
            unexplained += 1
            time.sleep(storage.FIRST_WAIT)
    raise storage.StorageError(
        f"{location_of(split, len(chain))} can neither be written nor read; check the rights of {split}"
    )


def commit_next(split: str, chain: list[Generation], fields: dict[str, Any], token: str) -> Generation | None:
    """Commit the next generation of a chain, whose shards are in place; None if another writer has committed that number.

    Args:
        split: Path or URL of the split.
        chain: Generations that are known.
        fields: Fields of the manifest that do not depend on the chain.
        token: Unique name of the commit.

    Raises:
        OSError: If the manifest cannot be written.
    """
    number = len(chain)
    raw = {
        "format": FORMAT,
        "version": VERSION,
        "number": number,
        "previous": chain[-1].digest,
        "commit": token,
    } | fields
    text = json.dumps(raw).encode()
    if commit.create(location_of(split, number), text):
        return Generation(number, hashlib.sha256(text).hexdigest(), raw)
    return None


def look_for(
    split: str, chain: list[Generation], source: str | None, keys: pa.ChunkedArray | None, cache: storage.Cache | None
) -> Generation | None:
    """Return the generation that was made of a source, or None if there is none or the source has no name.

    Args:
        split: Path or URL of the split.
        chain: The generations to look at.
        source: Fingerprint of the source.
        keys: Keys that they must not have, or None.
        cache: Where the samples files of a remote split are kept.

    Raises:
        AppendError: If a key is in a generation of another source.
        ValueError: If its samples file is damaged.
        OSError: If it cannot be read.
    """
    for each in chain:
        if source is not None and each.raw["source"] == source:
            return each
    if keys is None:
        return None
    wanted = keys.combine_chunks()
    for each in chain:
        found = load_samples(split, each.raw, cache)["key"]
        repeated = found.filter(pc.is_in(found, value_set=wanted))
        if len(repeated):
            raise AppendError(
                f"{len(repeated)} samples have keys of generation {each.number} of {split}: {listed(repeated.to_pylist())}. "
                "To append them nevertheless: --repeated_keys"
            )
    return None


def renamed(index: Index, token: str) -> tuple[Index, dict[str, str]]:
    """Return an index whose shards have names that no other writer chooses, and the new name of each old one.

    Args:
        index: Index of the packed split.
        token: Unique name of the commit.
    """
    names = {shard.name: f"shard-{token}-{number:06d}.tar" for number, shard in enumerate(index.shards)}
    shards = tuple(ShardEntry(names[each.name], each.bytes, each.sha256, each.samples) for each in index.shards)
    return replace(index, shards=shards, base=None), names


def place(path: Path, location: str) -> None:
    """Move or upload a shard, durably, to a location that nobody else writes to.

    Raises:
        OSError: If that fails.
    """
    if storage.is_remote(location):
        fs, remote = storage.filesystem(location)
        storage.with_retries(location, lambda: fs.put_file(str(path), remote))
        return
    target = storage.local(location)
    shutil.move(path, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    storage.sync_folder(target.parent)


def require_whole(split: str, index: Index) -> None:
    """Raise OSError unless all shards are there: somebody may have removed them as those of a dead writer."""
    for shard in index.shards:
        if not storage.exists(storage.join(split, shard.name)):
            raise storage.StorageError(f"{shard.name} in {split} was removed before it was committed; append again")


def remove_all(locations: list[str]) -> None:
    """Remove files of an append that was not committed, as far as that is possible."""
    for location in locations:
        with contextlib.suppress(OSError, NotImplementedError):
            storage.remove(location)


@contextlib.contextmanager
def staging(split: str) -> Iterator[Path]:
    """Yield a temporary folder to pack into: in the split if it is on this machine, so that shards are renamed, not copied."""
    if storage.is_remote(split):
        folder = Path(tempfile.mkdtemp(prefix="deepskip-append-"))
    else:
        folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=storage.local(split)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pack_shards(
    shards: str, folder: Path, first: Index, *, workers: int | None = None, progress: Progress = no_progress,
    **options: Any,
) -> Index:  # fmt: skip
    """Copy the shards of another program into a folder and index them, to be read as those of a split.

    Args:
        shards: Folder or URL of the shards.
        folder: Folder to copy them to, which exists.
        first: Generation 0 of the split.
        workers: Number of processes; one a core by default.
        progress: Wraps the shards that are copied, then those that are read.
        options: As for `indexing.index_shards`: image, mask, on_bad_sample, say.

    Returns:
        The index of the copies.

    Raises:
        AppendError: If there are no shards, or what the values of their masks mean is not known.
        IndexingError: If the shards cannot be indexed.
        OSError: If they cannot be listed or copied.
    """
    try:
        names = tars_in(shards)
    except FileNotFoundError as error:
        raise AppendError(f"{shards} does not exist") from error
    if not names:
        raise AppendError(f"{shards} holds no .tar files")
    for name in progress(names, len(names)):
        source = storage.join(shards, name)
        if storage.is_remote(source):
            storage.download(source, folder / name)
        else:
            shutil.copyfile(storage.local(source), folder / name)
    how = first.labels
    known = False
    with contextlib.suppress(MissingIndex, BrokenIndex):
        theirs = load_index(shards)
        known = theirs.labels is None and theirs.ignore_index == first.ignore_index
    options |= {
        "labels": "binary" if (how.binary if how else first.num_classes == 1) else "classes",
        "num_classes": first.num_classes,
        "ignore_label": how.ignore_label if how else first.ignore_index if first.num_classes > 1 or known else None,
        "values": replace(how.values, ignore=None) if how else AS_LABELS,
        "bands": first.preparation["bands"],
        "reading": first.reading,
    }
    index = index_shards(str(folder), workers=workers, progress=progress, **options)
    source = hashlib.sha256("".join(sorted(each.sha256 for each in index.shards)).encode()).hexdigest()
    if how is None and index.labels is not None and first.num_classes == 1:
        raise AppendError(
            f"the masks of {shards} hold more than 0 and 1, and only an index that DeepSkip made would say what is foreground "
            "and what is ignored: append their files in place of the shards (--images, --masks)"
        )
    # What no mask or image of this generation shows is as in generation 0.
    labels = first.labels if index.labels is None else index.labels
    missing = first.reading.missing or index.reading.missing
    reading = first.reading if replace(index.reading, missing=missing) == first.reading else index.reading
    index = replace(index, labels=labels, reading=reading, source=source)
    save_index(index, folder)
    return index
