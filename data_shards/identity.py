"""What determines the samples of a split and their order, as a few numbers and digests of its index."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash

from deepskip.data_shards.index import Index
from deepskip.data_shards.plain_values import plain_labels, plain_number


def identity_of(index: Index) -> dict[str, str | int]:
    """Return what determines the samples of a split and their order.

    Args:
        index: The index of the split.

    Returns:
        Counts as numbers, and as hexadecimal digits the digests "contents" of all samples in their order and their division
        into shards, "statistics" of mean and std, and "reading" of how images and masks are decoded. Shards that were packed
        again from the same samples have the same identity. A chain also has "generations", the contents of each of them in
        one text, so that one begins with the other if its chain does.
    """
    reading = asdict(index.reading) | {"nodata": plain_number(index.reading.nodata)}
    found: dict[str, str | int] = {
        "samples": index.num_samples,
        "shards": len(index.shards),
        "bands": index.bands,
        "num_classes": index.num_classes,
        "ignore_index": index.ignore_index,
        "contents": contents(index.shard_sizes, index.digests if index.num_samples else None),
        # As images are normalised by them: sums in another order give the same.
        "statistics": digest(np.array([index.mean, index.std], np.float32).tolist()),
        "reading": digest([index.dtype, index.preparation["bands"], plain_labels(index.labels), reading]),
    }
    if len(index.generations) > 1:
        found["generations"] = "".join(contents_of_generations(index))
    return found


def contents(shard_sizes: np.ndarray, digests: np.ndarray | None) -> str:
    """Return a digest of samples: 32 hexadecimal digits.

    Args:
        shard_sizes: Number of samples in each shard, (shards,) int64.
        digests: Digest of each sample, (samples,) uint64; None if there are none.
    """
    found = xxhash.xxh3_128(shard_sizes.tobytes())
    if digests is not None:
        found.update(digests.data)
    return found.hexdigest()


def contents_of_generations(index: Index) -> Iterator[str]:
    """Yield the digest "contents" of each generation of a chain; that of the first is the one it had as a closed set."""
    shards, samples = 0, 0
    for each in index.generations:
        digests = index.digests[samples : samples + each.samples] if each.samples else None
        yield contents(index.shard_sizes[shards : shards + each.shards], digests)
        shards, samples = shards + each.shards, samples + each.samples


def digest(value: Any) -> str:
    """Return a digest of plain values: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
