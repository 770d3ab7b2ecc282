"""The chain of generations of a split: generation 0 is its index.json, and each later one a file manifest/NNNNNNNN.json.

A manifest has the fields of an index.json, and those that make the chain: its number, and the sha256 of the manifest before
it. It is written once and never changes. Readers need no lock: what they read is the beginning of any later chain.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from deepskip.data_shards import index_check, storage
from deepskip.data_shards.entries import SCHEMA, STORED
from deepskip.data_shards.origin import class_conflict

FOLDER = "manifest"
# Generation 0 of a split.
INDEX = "index.json"
FORMAT = "deepskip-generation"
VERSION = 1
# Manifests that are read at the same time.
READERS = 16
MAX_NUMBER = 10**8 - 1
# Properties that all generations of a chain share.
SHARED = ("bands", "num_classes", "ignore_index", "preparation", "labels")
# How `writer` wants images read whose pixels may be nan.
MISSING = {"alpha": "auto", "missing": True, "orientation": "auto", "nodata": "nan"}


def offsets(value: Any) -> bool:
    """Return whether a value maps names of sources to offsets, which are integers or texts."""
    return isinstance(value, dict) and all(
        index_check.text(name) and (index_check.text(found) or index_check.whole(0, index_check.MAX_COUNT)(found))
        for name, found in value.items()
    )


# How far a generation has read its sources.
ADVANCE = {
    "watermark": ("seconds since 1970, or null", index_check.nothing_or(index_check.finite)),
    "offsets": ("an object of integers and texts", offsets),
}
CHAIN = {
    "number": ("1 to 99999999", index_check.whole(1, MAX_NUMBER)),
    "previous": ("64 hexadecimal digits", index_check.digest),
    "commit": ("32 hexadecimal digits", lambda value: isinstance(value, str) and index_check.digest(value * 2)),
} | ADVANCE


class BrokenChain(ValueError):
    """A chain with a manifest that is missing, damaged or of another chain."""


@dataclass(frozen=True)
class Generation:
    """One generation of a split.

    Attributes:
        number: Its number, from 0.
        digest: sha256 of its manifest, as hexadecimal digits.
        raw: Contents of its manifest, or of index.json for generation 0.
    """

    number: int
    digest: str
    raw: dict[str, Any]

    @property
    def samples(self) -> int:
        """Return its number of samples."""
        return int(self.raw["samples"]["count"])

    @property
    def shards(self) -> int:
        """Return its number of shards."""
        return len(self.raw["shards"])

    @property
    def watermark(self) -> float | None:
        """Return the time up to which its source's data is in the chain, in seconds since 1970; None if it is not known."""
        found: float | None = self.raw.get("watermark")
        return found

    @property
    def offsets(self) -> dict[str, int | str]:
        """Return the offset in each source up to which its data is in the chain."""
        found: dict[str, int | str] = self.raw.get("offsets", {})
        return found


def advance_of(chain: Sequence[Generation]) -> dict[str, Any]:
    """Return the latest watermark of a chain, and the last offset in each source, as fields of a manifest.

    A watermark in the future is the mistake of a clock. It would be the latest one for ever, so it is not counted.
    """
    now = time.time()
    marks = [each.watermark for each in chain if each.watermark is not None and each.watermark <= now]
    last: dict[str, int | str] = {}
    for each in chain:
        last |= each.offsets
    return {"watermark": max(marks, default=None), "offsets": last}


def location_of(split: str, number: int) -> str:
    """Return the path or URL of a generation's manifest."""
    return storage.join(split, FOLDER, f"{number:08d}.json")


def first_generation(text: bytes, raw: dict[str, Any]) -> Generation:
    """Return generation 0 of a split.

    Args:
        text: Bytes of index.json.
        raw: Its contents, which have been checked apart from what `compact` adds.

    Raises:
        ValueError: If that is not valid.
    """
    index_check.check_fields(
        {"watermark": None, "offsets": {}} | {n: raw[n] for n in ADVANCE if n in raw}, ADVANCE, "it"
    )
    return Generation(0, hashlib.sha256(text).hexdigest(), raw)


def read_chain(split: str, chain: Sequence[Generation], stop: int | None = None) -> list[Generation]:
    """Read the generations that follow those that are known.

    Args:
        split: Path or URL of the split.
        chain: The known generations, with generation 0 at least.
        stop: Number of generations at which to stop; None reads all.

    Returns:
        All generations, in their order.

    Raises:
        BrokenChain: If a manifest is missing, damaged, of a later version, or does not continue the chain; or if there are
            fewer than `stop`.
        OSError: If a manifest cannot be read.
    """
    found = list(chain)
    names = {shard["name"] for generation in found for shard in generation.raw["shards"]}
    for text in _texts(split, len(found), stop):
        generation = checked(split, text, found[0].raw, found[-1])
        own = {shard["name"] for shard in generation.raw["shards"]}
        if own & names:
            raise BrokenChain(f"{location_of(split, generation.number)} names a shard of an earlier generation")
        names |= own
        found.append(generation)
    if stop is not None and len(found) < stop:
        raise BrokenChain(f"{split} has {len(found)} generations where {stop} are needed; the last ones are missing")
    return found


def checked(split: str, text: bytes, first: dict[str, Any], previous: Generation) -> Generation:
    """Return the generation of a manifest, which is checked.

    Args:
        split: Path or URL of the split.
        text: Bytes of the manifest.
        first: Fields of generation 0.
        previous: The generation before it.

    Raises:
        BrokenChain: If the manifest is damaged, of a later version, or does not continue the chain.
    """
    number = previous.number + 1
    path = location_of(split, number)
    raw = _parse(path, text)
    if (raw["number"], raw["previous"]) != (number, previous.digest):
        raise BrokenChain(
            f"{path} is generation {raw['number']} of another chain: the one before it has changed since (sha256 differs)"
        )
    if reason := conflict(first, raw):
        raise BrokenChain(f"{path}: {reason}")
    if len({shard["name"] for shard in raw["shards"]}) < len(raw["shards"]):
        raise BrokenChain(f"{path} names a shard twice")
    return Generation(number, hashlib.sha256(text).hexdigest(), raw)


def following(split: str, first: dict[str, Any], last: Generation, most: int) -> Iterator[Generation]:
    """Yield the generations after one that is known, as far as they are committed.

    If there are none, that takes one request, and no listing.

    Args:
        split: Path or URL of the split.
        first: Fields of generation 0.
        last: The generation that is known.
        most: Largest number of generations to yield.

    Raises:
        BrokenChain: As `checked`.
        OSError: If a manifest cannot be read.
    """
    for text in _probed(split, last.number + 1, last.number + 1 + most):
        last = checked(split, text, first, last)
        yield last


def _texts(split: str, first: int, stop: int | None) -> Iterator[bytes]:
    """Yield the bytes of manifests from number `first` to the end of the chain."""
    # One or two that follow those that are known need no listing.
    numbers = listed_numbers(split) if first == 1 else None
    if numbers is not None:
        if numbers != list(range(1, len(numbers) + 1)):
            missing = min(set(range(1, numbers[-1])) - set(numbers))
            raise BrokenChain(f"{location_of(split, missing)} is missing, and later generations are not")
        last = len(numbers) if stop is None else min(len(numbers), stop - 1)
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(lambda number: storage.read_bytes(location_of(split, number)), range(1, last + 1))
        return
    yield from _probed(split, first, stop)


def _probed(split: str, first: int, stop: int | None) -> Iterator[bytes]:
    """Yield the bytes of manifests from number `first`, asked for by their names, to the end of the chain or to `stop`."""
    number, together = first, 1
    with ThreadPoolExecutor(READERS) as pool:
        while stop is None or number < stop:
            end = number + together if stop is None else min(number + together, stop)
            for text in pool.map(lambda n: read_if_exists(split, n), range(number, end)):
                if text is None:
                    return
                yield text
            number, together = end, min(2 * together, READERS)


def listed_numbers(split: str) -> list[int] | None:
    """Return the numbers of a split's manifests in ascending order, or None if they cannot be listed."""
    if split.startswith(("http://", "https://")):
        return None
    try:
        names = storage.names(storage.join(split, FOLDER))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (PermissionError, NotImplementedError):
        return None
    return sorted(int(name[:8]) for name in names if len(name) == 13 and name[:8].isdigit() and name[8:] == ".json")


def read_if_exists(split: str, number: int) -> bytes | None:
    """Return the contents of the manifest of a generation, or None if it does not exist.

    Without the right to list, S3 answers 403 for a file that does not exist. With expired credentials it does so for every
    file, so then index.json is asked for too.

    Args:
        split: Path or URL of the split.
        number: Number of the generation.

    Raises:
        OSError: If it cannot be read; a StorageError if access is denied to the whole split.
    """
    location = location_of(split, number)
    try:
        return storage.read_bytes(location)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        if not storage.is_remote(location):
            raise
        denied: OSError = error
    except storage.StorageError as error:
        status = getattr(error.__cause__, "status", None)
        if status in (404, 410):
            return None
        if status != 403:
            raise
        denied = error
    try:
        storage.read_bytes(storage.join(split, INDEX))
    except OSError as error:
        raise storage.StorageError(
            f"{split} cannot be read: access is denied ({denied}). Check the credentials"
        ) from error
    return None


def _parse(path: str, text: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"it is not a manifest of format {FORMAT}")
        if raw.get("version") != VERSION:
            shown = index_check.shown(raw.get("version"))
            raise ValueError(f"it has version {shown}; this reads {VERSION}. Install a later DeepSkip")
        index_check.check_index(raw, STORED)
        if missing := [name for name in CHAIN if name not in raw]:
            raise ValueError(f"it has no {', '.join(missing)}")
        index_check.check_fields({name: raw[name] for name in CHAIN}, CHAIN, "it")
    except (ValueError, RecursionError) as error:
        raise BrokenChain(f"{path} cannot be read: {error}") from error
    return raw


def conflict(first: dict[str, Any], raw: dict[str, Any]) -> str | None:
    """Return why a generation cannot follow in a chain, or None.

    Images are normalised by the statistics of generation 0, whatever those of later generations are.

    Args:
        first: Fields of generation 0.
        raw: Fields of the new generation.
    """
    for name in SHARED:
        if first[name] != raw[name]:
            hint = (
                "; shards of the program that made it would fit: --shards" if name == "labels" and not raw[name] else ""
            )
            return (
                f"{name} is {index_check.shown(raw[name])}, but {index_check.shown(first[name])} in generation 0{hint}"
            )
    if first["dtype"] == "uint8" and raw["dtype"] != "uint8":
        return f"its images are {raw['dtype']}, but uint8 in generation 0"
    classes, others = ((fields.get("origin") or {}).get("classes", ()) for fields in (raw, first))
    if raw["num_classes"] > 1 and (reason := class_conflict(classes, others, "generation 0")):
        return reason
    before, now = first.get("reading"), raw.get("reading")
    if before != now and not (now is None and before == MISSING):
        if now == MISSING and before is None:
            return "images have pixels without a value (nan), but none do in generation 0"
        return f"reading is {index_check.shown(now)}, but {index_check.shown(before)} in generation 0"
    if raw["base"] is not None or first["base"] is not None:
        where = "its" if raw["base"] is not None else "generation 0's"
        return f"{where} shards are not next to the index, but at {raw['base'] or first['base']}"
    return None


def join_tables(tables: Sequence[pa.Table], formats: Sequence[Sequence[str]]) -> pa.Table:
    """Join the samples of generations to one table, whose formats refer to STORED.

    Args:
        tables: The samples of each generation.
        formats: Formats that the format columns of each refer to.

    Returns:
        One table, each column in one piece. It has statistics if all tables have them.
    """
    names = SCHEMA.names if any(len(table.schema) == len(SCHEMA) for table in tables) else tables[0].column_names
    parts = []
    for table, known in zip(tables, formats, strict=True):
        part = table.select(names)
        codes = np.array([STORED.index(name) for name in known], np.uint8)
        for kind in ("image_format", "mask_format"):
            column = part.column_names.index(kind)
            part = part.set_column(column, SCHEMA.field(kind), pa.array(codes[part[kind].to_numpy()]))
        parts.append(part)
    return pa.concat_tables(parts).combine_chunks()
