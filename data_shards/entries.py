"""The samples of a split as rows of a table: where image and mask lie, what their bytes are, and the image's statistics."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

FORMATS = ("png", "jpg", "jpeg", "tif", "tiff", "npy", "npz", "bmp", "gif")

# Formats of an index: also images in tiles, which as files of their own are TIFF.
STORED = (*FORMATS, "tiles")

SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("image_offset", pa.int64()),
        ("image_length", pa.uint32()),
        ("mask_offset", pa.int64()),
        ("mask_length", pa.uint32()),
        # Positions in the index's list of formats.
        ("image_format", pa.uint8()),
        ("mask_format", pa.uint8()),
        # xxh3_64 of the image's bytes followed by the mask's.
        ("digest", pa.uint64()),
    ]
)


# Columns of version 3: mean and standard deviation of each band of each image.
STATISTICS = ("mean", "std")


class Member(NamedTuple):
    """One file of a sample inside its tar.

    Attributes:
        format: File format, such as "png".
        offset: Offset of its first byte in the tar.
        length: Length in bytes.
    """

    format: str
    offset: int
    length: int


class SampleEntry(NamedTuple):
    """One sample in the index.

    Attributes:
        key: Key of the sample.
        image: Where its image lies.
        mask: Where its mask lies.
        digest: xxh3_64 of the bytes of image and mask.
        shard: Number of its shard; -1 if not known yet.
        number: Its number in the split; -1 if not known yet.
    """

    key: str
    image: Member
    mask: Member
    digest: int
    shard: int = -1
    number: int = -1


def schema_of(bands: int | None) -> pa.Schema:
    """Return the columns of a samples file: with the statistics of each image, of that many bands, or without."""
    extra = [] if bands is None else [pa.field(name, pa.list_(pa.float32(), bands)) for name in STATISTICS]
    return pa.schema([*SCHEMA, *extra])


def with_statistics(samples: pa.Table, mean: np.ndarray, std: np.ndarray) -> pa.Table:
    """Add the statistics of each image to a table of samples.

    Args:
        samples: Arrow table of SCHEMA, of N samples.
        mean: Mean of each band of each image, (N, bands).
        std: Standard deviation likewise.

    Returns:
        The table, with the statistics in float32, as images are normalised by them.
    """
    # Beyond fp32 they are computed when images are read, as without this.
    with np.errstate(over="ignore"):
        mean, std = mean.astype(np.float32), std.astype(np.float32)
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        return samples
    schema = schema_of(mean.shape[1])
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]) for values in (mean, std)
    ]
    return pa.table([*(samples.select(SCHEMA.names).combine_chunks().columns), *columns], schema=schema)


def sample_table(entries: Iterable[SampleEntry]) -> pa.Table:
    """Build the Arrow table of samples, in their order, with format columns that refer to STORED."""
    rows = [
        (
            e.key,
            e.image.offset,
            e.image.length,
            e.mask.offset,
            e.mask.length,
            STORED.index(e.image.format),
            STORED.index(e.mask.format),
            e.digest,
        )
        for e in entries
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
