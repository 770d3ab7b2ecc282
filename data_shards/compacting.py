"""Join the generations of a split to a new closed set, in another folder: the same samples, in fewer shards and files."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import webdataset

from deepskip.data_shards import storage, tiles
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.entries import STATISTICS, STORED, Member, SampleEntry, sample_table, schema_of
from deepskip.data_shards.index import Index, ShardEntry, save_index
from deepskip.data_shards.manifest import advance_of
from deepskip.data_shards.progress import Progress, no_progress
from deepskip.data_shards.sample import BadSample
from deepskip.data_shards.writer import half_written, own_entries, publish


def compact(
    split: str, out: Path, cache: storage.Cache, samples_per_shard: int = 256, progress: Progress = no_progress
) -> Index:
    """Write all samples of a split, in their order and byte by byte, into a new split.

    It has the statistics of generation 0, by which images are normalised, so a model sees the same images. A key that an
    earlier generation has gets the number of its generation.

    Args:
        split: Path or URL of the split.
        out: Folder of the new split, which must not exist.
        cache: Where copies of remote shards are kept.
        samples_per_shard: Number of samples in a shard.
        progress: Wraps the shards that are written.

    Returns:
        The index of the new split.

    Raises:
        FileExistsError: If the folder exists.
        BadSample: If a sample is not what the index says.
        BrokenShard: If a shard is missing or has changed.
        OSError: If a file cannot be written.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already; remove it or compact to another folder")
    shards = Shards(split, normalize="none", cache=cache)
    index = shards.index
    out.parent.mkdir(parents=True, exist_ok=True)
    with half_written(out) as temporary:
        entries: list[SampleEntry] = []
        written: list[ShardEntry] = []
        keys = unique_keys(index)
        parts = range(0, len(shards), samples_per_shard)
        for number, start in enumerate(progress(parts, len(parts))):
            path = temporary / f"shard-{number:06d}.tar"
            before = index.entries(list(range(start, min(start + samples_per_shard, len(shards)))))
            copy_samples(shards, before, keys, path)
            found = own_entries(path)
            for old, new in zip(before, found, strict=True):
                if (old.digest, old.image.format, old.mask.format) != (new.digest, new.image.format, new.mask.format):
                    raise BadSample(
                        index.shard_location(old.shard),
                        old.key,
                        "has other bytes than when it was indexed (xxh3 differs)",
                    )
            written.append(ShardEntry(path.name, path.stat().st_size, storage.file_sha256(path), len(found)))
            entries += found
        samples = sample_table(entries)
        if index.has_statistics:
            for name in STATISTICS:
                samples = samples.append_column(schema_of(index.bands).field(name), index.samples[name])
        joined = replace(
            index, shards=tuple(written), samples=samples, formats=STORED, base=None, source=None, generations=()
        )
        save_index(joined, temporary, advance_of(index.generations))
        publish(temporary, out)
    return replace(joined, location=str(out))


def unique_keys(index: Index) -> Iterator[str]:
    """Yield the key of each sample of a chain; a repeated one gets the number of its generation."""
    seen: set[str] = set()
    start = 0
    for each in index.generations:
        for key in index.keys(list(range(start, start + each.samples))):
            name = key
            while name in seen:
                name = f"{name}-{each.number}"
            seen.add(name)
            yield name
        start += each.samples


def copy_samples(shards: Shards, entries: list[SampleEntry], keys: Iterator[str], path: Path) -> None:
    """Copy samples to a new shard, under new keys.

    Args:
        shards: The split.
        entries: The samples.
        keys: Yields the new key of each.
        path: The shard to write.

    Raises:
        BrokenShard: If a shard is missing or has changed.
    """
    writer = webdataset.TarWriter(str(path), mtime=0, encoder=False)
    try:
        for entry in entries:
            descriptor = shards.open_shard(entry.shard)
            kinds = {"image": entry.image, "mask": entry.mask}
            writer.write(
                {"__key__": next(keys)}
                | {f"{kind}.{extension(member)}": read(descriptor, member) for kind, member in kinds.items()}
            )
    finally:
        writer.close()


def extension(member: Member) -> str:
    """Return the extension of a member of a new shard."""
    return "tif" if member.format == tiles.FORMAT else member.format


def read(descriptor: int, member: Member) -> bytes:
    """Return the bytes of a member of an open shard."""
    return os.pread(descriptor, member.length, member.offset)
