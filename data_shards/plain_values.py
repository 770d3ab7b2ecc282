"""Labels, readings and percentiles as the JSON of an index stores them, and back."""

import math
from dataclasses import asdict
from typing import Any

from deepskip.data_shards.labels import AS_LABELS, Labels, Values
from deepskip.data_shards.percentiles import SHARES
from deepskip.data_shards.pictures import AS_IT_COMES, Reading

# Names of the percentiles in the file.
PERCENTILES = tuple(f"p{share:g}" for share in SHARES)


def plain_number(value: float | None) -> float | str | None:
    """Return a number as JSON stores it; nan becomes the string "nan", since JSON has no nan."""
    return "nan" if value is not None and math.isnan(value) else value


def plain_labels(labels: Labels | None) -> dict[str, Any] | None:
    """Return labels as plain values; default values are omitted, which keeps the format of older indexes."""
    if labels is None:
        return None
    plain = asdict(labels)
    if labels.values == AS_LABELS:
        del plain["values"]
    return plain


def labels_of(raw: dict[str, Any] | None) -> Labels | None:
    """Convert plain values, which have been checked, to labels."""
    if raw is None:
        return None
    values = dict(raw.get("values") or asdict(AS_LABELS))
    values["colours"] = tuple(tuple(colour) for colour in values["colours"])
    return Labels(raw["binary"], raw["num_classes"], raw["ignore_label"], Values(**values))


def percentiles_of(raw: dict[str, list[float]] | None) -> tuple[tuple[float, ...], ...] | None:
    """Convert plain values, which have been checked, to percentiles, (3, bands)."""
    return None if raw is None else tuple(tuple(raw[name]) for name in PERCENTILES)


def reading_of(raw: dict[str, Any] | None) -> Reading:
    """Convert plain values, which have been checked, to a reading."""
    if raw is None:
        return AS_IT_COMES
    return Reading(**{**raw, "nodata": None if raw["nodata"] is None else float(raw["nodata"])})
