"""What determines the samples of a split and their order, as a few numbers and digests of its index."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash

from deepskip.data_shards.index import Index, plain_labels, plain_number


def identity_of(index: Index) -> dict[str, str | int]:
    """Return what determines the samples of a split and their order.

    Args:
        index: The index of the split.

    Returns:
        Counts as numbers, and as hexadecimal digits the digests "contents" of all samples in their order and their division
        into shards, "statistics" of mean and std, and "reading" of how images and masks are decoded. Shards that were packed
        again from the same samples have the same identity.
    """
    contents = xxhash.xxh3_128(index.shard_sizes.tobytes())
    if index.num_samples:
        contents.update(index.digests.data)
    reading = asdict(index.reading) | {"nodata": plain_number(index.reading.nodata)}
    return {
        "samples": index.num_samples,
        "shards": len(index.shards),
        "bands": index.bands,
        "num_classes": index.num_classes,
        "ignore_index": index.ignore_index,
        "contents": contents.hexdigest(),
        # As images are normalised by them: sums in another order give the same.
        "statistics": digest(np.array([index.mean, index.std], np.float32).tolist()),
        "reading": digest([index.dtype, index.preparation["bands"], plain_labels(index.labels), reading]),
    }


def digest(value: Any) -> str:
    """Return a digest of plain values: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
