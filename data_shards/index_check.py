"""Validate indexes, which may be untrusted: the fields of the JSON, and that each sample lies within its shard."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepskip.data_shards.labels import KINDS, WHITE_IS_ZERO
from deepskip.data_shards.pictures import ALPHA, ORIENTATION

# Larger files, in bytes, are checked once on each machine; smaller ones each time, which takes less than a second.
REMEMBERED_BYTES = 2**26
MAX_BANDS = 2**16
# Characters that control terminals.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_COUNT = 2**62


def whole(low: int, high: int) -> Callable[[Any], bool]:
    """Return a check for integers from low to high."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def text(value: Any) -> bool:
    """Return whether a value is a string of 1 to 4096 characters without control characters."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and not CONTROL.search(value)


def plain_name(value: Any) -> bool:
    """Return whether a value is a file name that does not lead out of its folder."""
    return text(value) and "/" not in value and "\\" not in value and not value.startswith(".")


def digest(value: Any) -> bool:
    """Return whether a value is a sha256 in hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def nothing_or(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check for values that pass another check or are null."""
    return lambda value: value is None or check(value)


def truth(value: Any) -> bool:
    """Return whether a value is true or false."""
    return isinstance(value, bool)


def finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number_or_nan(value: Any) -> bool:
    """Return whether a value is a finite number or the string "nan"."""
    return finite(value) or (isinstance(value, str) and value == "nan")


def texts(value: Any) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(value, list) and len(value) <= 2**16 and all(map(text, value))


def colours(value: Any) -> bool:
    """Return whether a value is a list of rows of red, green, blue and label, each 0 to 255."""
    one = whole(0, 255)
    return (
        isinstance(value, list)
        and len(value) <= 2**16
        and all(isinstance(row, list) and len(row) == 4 and all(map(one, row)) for row in value)
    )


# For each field, its allowed values in words and the check for them.
SAMPLES = {
    "file": ("a plain file name", plain_name), "bytes": ("a number of bytes", whole(0, MAX_COUNT)),
    "sha256": ("64 hexadecimal digits", digest), "count": ("a number of samples", whole(0, MAX_COUNT)),
}  # fmt: skip
SHARD = {
    "name": ("a plain file name", plain_name), "bytes": ("a number of bytes", whole(0, MAX_COUNT)),
    "sha256": ("64 hexadecimal digits", digest), "samples": ("a number of samples", whole(0, MAX_COUNT)),
}  # fmt: skip
LABELS = {
    "binary": ("true or false", truth), "num_classes": ("1 to 255", whole(1, 255)),
    "ignore_label": ("an integer or null", nothing_or(whole(-(2**31), 2**31))),
}  # fmt: skip
VALUES = {
    "white_is_zero": (f"one of {', '.join(WHITE_IS_ZERO)}", WHITE_IS_ZERO.__contains__),
    "threshold": ("a number or null", nothing_or(finite)), "colours": ("rows of four numbers 0 to 255", colours),
    "orientation": (f"one of {', '.join(ORIENTATION)}", ORIENTATION.__contains__),
    "ignore": ("an integer or null", nothing_or(whole(-(2**31), 2**31))),
}  # fmt: skip
READING = {
    "alpha": (f"one of {', '.join(ALPHA)}", ALPHA.__contains__), "missing": ("true or false", truth),
    "orientation": (f"one of {', '.join(ORIENTATION)}", ORIENTATION.__contains__),
    "nodata": ('a number, "nan" or null', nothing_or(number_or_nan)),
}  # fmt: skip
ORIGIN = {
    "labels": (f"one of {', '.join(KINDS)}", KINDS.__contains__),
    "classes": ("a list of names", texts),
    "ignore_label": LABELS["ignore_label"],
    **{name: VALUES[name] for name in ("white_is_zero", "threshold", "colours")},
    **{name: READING[name] for name in ("alpha", "orientation")},
}
PREPARATION = {
    "bands": ("a number of bands or null", nothing_or(whole(1, MAX_BANDS))),
    "longest_side": ("a number of pixels or null", nothing_or(whole(1, 2**31))),
}
PROPERTIES = {
    "bands": (f"1 to {MAX_BANDS}", whole(1, MAX_BANDS)),
    "dtype": ("uint8 or float32", lambda value: value in ("uint8", "float32")),
    "num_classes": ("1 to 255", whole(1, 255)), "ignore_index": ("0 to 255", whole(0, 255)),
    "base": ("a path or URL, or null", nothing_or(text)), "source": ("text or null", nothing_or(text)),
}  # fmt: skip
INNER = ("samples", "shards", "labels", "preparation", "mean", "std", "formats")


def check_fields(value: Any, fields: dict[str, tuple[str, Callable[[Any], bool]]], where: str) -> None:
    """Raise ValueError if a JSON object has missing, unknown or invalid fields.

    Args:
        value: The object, of any type.
        fields: For each field, its allowed values in words and the check for them.
        where: Name of the object in messages.

    Raises:
        ValueError: If `value` is not an object with exactly these fields and valid values; names the field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; it must be an object")
    if value.keys() != fields.keys():
        odd = sorted(map(str, value.keys() ^ fields.keys()))
        raise ValueError(
            f"{where} must have the fields {', '.join(fields)}; missing or unknown: {', '.join(odd)[:200]}"
        )
    for name, (allowed, check) in fields.items():
        if not check(value[name]):
            raise ValueError(f"{where}.{name} is {shown(value[name])}; it must be {allowed}")


def shown(value: Any) -> str:
    """Return a value as text for a message, cut to 100 characters."""
    found = repr(value)
    return found if len(found) <= 100 else f"{found[:97]}..."


def check_index(raw: Any, formats: tuple[str, ...]) -> None:
    """Raise ValueError if the JSON of an index is not valid.

    Args:
        raw: The JSON object.
        formats: Known file formats.

    Raises:
        ValueError: If a field is missing or invalid; names the field.
    """
    if missing := [name for name in (*PROPERTIES, *INNER) if name not in raw]:
        raise ValueError(f"it has no {', '.join(missing)}")
    # Additional fields of other programs are allowed.
    check_fields({name: raw[name] for name in PROPERTIES}, PROPERTIES, "it")
    check_fields(raw["samples"], SAMPLES, "samples")
    # Older indexes do not have it.
    if isinstance(raw["preparation"], dict) and "nodata" in raw["preparation"]:
        check_fields(raw["preparation"], PREPARATION | {"nodata": READING["nodata"]}, "preparation")
    else:
        check_fields(raw["preparation"], PREPARATION, "preparation")
    if raw["labels"] is not None:
        plain = (
            {k: v for k, v in raw["labels"].items() if k != "values"}
            if isinstance(raw["labels"], dict)
            else raw["labels"]
        )
        check_fields(plain, LABELS, "labels")
        if "values" in raw["labels"]:
            check_fields(raw["labels"]["values"], VALUES, "labels.values")
    if raw.get("reading") is not None:
        check_fields(raw["reading"], READING, "reading")
    if raw.get("origin") is not None:
        check_fields(raw["origin"], ORIGIN, "origin")
    if not isinstance(raw["shards"], list):
        raise ValueError("shards is not a list")
    for number, shard in enumerate(raw["shards"]):
        check_fields(shard, SHARD, f"shards[{number}]")
    counted = sum(shard["samples"] for shard in raw["shards"])
    if counted != raw["samples"]["count"]:
        raise ValueError(f"its shards have {counted} samples, its table {raw['samples']['count']}")
    for name in ("mean", "std"):
        values = raw[name]
        if not isinstance(values, list) or len(values) != raw["bands"]:
            raise ValueError(f"{name} is not a list of {raw['bands']} numbers, one for each band")
        if not all(map(finite, values)):
            raise ValueError(f"{name} holds a value that is not a finite number")
    if raw.get("percentiles") is not None:
        check_percentiles(raw["percentiles"], raw["bands"])
    if min(raw["std"]) < 0:
        raise ValueError("std holds a negative number")
    listed = raw["formats"]
    if not isinstance(listed, list) or not listed or not all(isinstance(f, str) and f in formats for f in listed):
        raise ValueError(f"formats is {shown(listed)}; known are {', '.join(formats)}")


def check_percentiles(value: Any, bands: int) -> None:
    """Raise ValueError unless a JSON value holds three rising percentiles of each band.

    Args:
        value: The value, of any type.
        bands: Number of bands.

    Raises:
        ValueError: If it is of another kind, or a number is not finite.
    """

    def row(found: Any) -> bool:
        return isinstance(found, list) and len(found) == bands and all(map(finite, found))

    check_fields(value, dict.fromkeys(("p2", "p50", "p98"), (f"{bands} finite numbers", row)), "percentiles")
    low, middle, high = value["p2"], value["p50"], value["p98"]
    if not all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True)):
        raise ValueError("percentiles do not rise from p2 to p98")


def check_table(table: pa.Table, raw: dict[str, Any]) -> None:
    """Raise ValueError if a sample does not lie within its shard, or a column's memory is not valid.

    Args:
        table: The samples, of index.SCHEMA.
        raw: Contents of index.json, which has been checked.

    Raises:
        ValueError: If the table is damaged, does not match index.json, or has a sample outside its shard.
    """
    try:
        table.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"{raw['samples']['file']} is damaged: {error}") from error
    if len(table) != raw["samples"]["count"] or any(column.null_count for column in table.columns):
        raise ValueError(
            f"{raw['samples']['file']} has {len(table)} samples, another number than index.json says, or null values"
        )
    if not len(table):
        return
    lists = [name for name in table.column_names if pa.types.is_fixed_size_list(table.schema.field(name).type)]
    for name in lists:
        values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks])
        if not np.isfinite(values).all() or (name == "std" and values.min() < 0):
            raise ValueError(f"{raw['samples']['file']} has statistics that are not finite, or negative")
    columns = {name: table[name].to_numpy() for name in table.column_names if name not in ("key", *lists)}
    for kind in ("image", "mask"):
        if columns[f"{kind}_format"].max() >= len(raw["formats"]):
            raise ValueError(f"{raw['samples']['file']} names an unknown format")
    begin = 0
    for shard in raw["shards"]:
        rows = slice(begin, begin + shard["samples"])
        begin = rows.stop
        for kind in ("image", "mask"):
            offsets, lengths = columns[f"{kind}_offset"][rows], columns[f"{kind}_length"][rows].astype(np.int64)
            # The first two checks keep the sum from overflowing.
            if len(offsets) and (
                offsets.min() < 0 or offsets.max() > shard["bytes"] or (offsets + lengths).max() > shard["bytes"]
            ):
                raise ValueError(f"a sample of {shard['name']} lies outside its {shard['bytes']} bytes")


def remembered(path: Path, raw: dict[str, Any]) -> Path | None:
    """Return the path of the marker file whose existence means that a large samples file was checked with these shards.

    Args:
        path: The samples file.
        raw: Contents of index.json.

    Returns:
        The path, or None for a small file, which is checked each time.
    """
    status = path.stat()
    if status.st_size < REMEMBERED_BYTES:
        return None
    shards = hashlib.sha256(json.dumps([raw["samples"], raw["shards"], raw["formats"]]).encode()).hexdigest()
    what = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino} {shards}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepskip" / "checked"
    return folder / hashlib.sha256(what.encode()).hexdigest()


def remember(marker: Path | None) -> None:
    """Create a marker file; if that is not possible, the samples file is checked again next time."""
    if marker is not None:
        with suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
