"""What a run remembers of its data, so that it notices when the data changes: a few numbers and digests of each split."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import xxhash

from deepskip.data_shards.index import Index, plain_labels, plain_number

# By the names of the entries of `identity_of`.
Identity = Mapping[str, str | int]
COUNTED = ("samples", "shards", "bands", "num_classes", "ignore_index")
SHAPING = {"bands", "num_classes"}
DIGESTED = ("contents", "statistics", "reading")


class OtherData(RuntimeError):
    """The data is not that of the training so far, or not the same on all ranks; the message says what differs."""


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
        contents.update(index.digests.tobytes())
    reading = asdict(index.reading) | {"nodata": plain_number(index.reading.nodata)}
    return {
        "samples": index.num_samples,
        "shards": len(index.shards),
        "bands": index.bands,
        "num_classes": index.num_classes,
        "ignore_index": index.ignore_index,
        "contents": contents.hexdigest(),
        "statistics": digest([index.mean, index.std]),
        "reading": digest([index.dtype, index.preparation["bands"], plain_labels(index.labels), reading]),
    }


def digest(value: Any) -> str:
    """Return a digest of plain values: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def differing(before: Mapping[str, Any], now: Mapping[str, Identity]) -> dict[str, list[str]]:
    """Return the names of the entries that differ, by split, without the splits in which none does.

    Args:
        before: Identities as a run recorded them. Runs of an earlier version recorded a digest of the shards for each split,
            which is compared with the entry "tars" if that is there.
        now: Identities by split.
    """
    found = {}
    for split, identity in now.items():
        earlier = before.get(split)
        if isinstance(earlier, Mapping):
            found[split] = [
                key
                for key in (*COUNTED, *DIGESTED)
                if key in earlier and key in identity and earlier[key] != identity[key]
            ]
        else:
            found[split] = ["tars"] if earlier is not None and identity.get("tars", earlier) != earlier else []
    return {split: keys for split, keys in found.items() if keys}


def changes(before: Mapping[str, Any], now: Mapping[str, Identity]) -> str:
    """Return in words what differs between the data of a run and that at the same location now; empty if nothing does.

    Args:
        before: As for `differing`.
        now: Identities by split.
    """
    return "; ".join(
        f"{split} has "
        + ", ".join(
            f"{key} {now[split][key]} instead of {before[split][key]}" if key in COUNTED else f"other {key}"
            for key in keys
        )
        for split, keys in differing(before, now).items()
    )


def name_of(data: Mapping[str, Identity]) -> str:
    """Return a short name of the data of a run: 12 hexadecimal digits."""
    return digest({split: [identity[key] for key in (*COUNTED, *DIGESTED)] for split, identity in data.items()})[:12]


def refusal(before: Mapping[str, Any], now: Mapping[str, Identity], accepted: str | None) -> str | None:
    """Return why a run cannot resume on the data as it is now, and how it can on purpose; None if nothing is against it.

    Args:
        before: As for `differing`.
        now: Identities by split.
        accepted: Name of changed data on which the run may resume.
    """
    keys = {key for found in differing(before, now).values() for key in found}
    if not keys or (accepted == name_of(now) and not keys & SHAPING):
        return None
    reason = f"was trained on other data ({changes(before, now)})"
    if keys & SHAPING:
        return f"{reason}, which its network does not fit"
    return f"{reason}; to resume on the data as it is now, give --data.accept {name_of(now)}"
