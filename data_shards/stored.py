"""Read one sample out of an open tar: its bytes are checked, its mask decoded, and of its image a window or all of it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from deepskip.data_shards import tiles
from deepskip.data_shards.decoding import LIMITS, decode_image, decode_mask
from deepskip.data_shards.entries import Member, SampleEntry
from deepskip.data_shards.index import Index
from deepskip.data_shards.labels import AS_LABELS
from deepskip.data_shards.pictures import Picture, image_of
from deepskip.data_shards.preparation import resample_bands
from deepskip.data_shards.scan import digest

# Largest number of bytes between image and mask that are read along in the same call.
MAX_GAP = 65536


@dataclass(frozen=True)
class StoredSample:
    """A sample whose mask is decoded; its image may still be in the file.

    Attributes:
        mask: Labels (H, W) uint8.
        index: The index, which defines bands and how files are read.
        image: The decoded image (H, W, bands), unless it is in tiles.
        head: Head of an image in tiles.
        read: Reads bytes of an image in tiles.
    """

    mask: np.ndarray
    index: Index
    image: np.ndarray | None
    head: tiles.Head | None = None
    read: tiles.Read | None = None

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        """Return a window of the image, with the bands of the index.

        Args:
            rows: Rows of the window, within the image.
            columns: Columns of the window, within the image.

        Returns:
            Image (rows, columns, bands); nan where it has no value.

        Raises:
            ValueError: If a tile has changed or does not decode, or the bands are wrong.
        """
        index = self.index
        if self.image is not None:
            return self.image[rows, columns]
        assert self.head is not None
        assert self.read is not None
        # Bands that are not asked for are not read, unless all are resampled first.
        alone = index.chosen is not None and self.head.layout.bands == index.stored_bands
        bands: Sequence[int] | None = index.chosen if alone else None
        window = tiles.read_window(self.read, self.head, rows, columns, bands)
        window = image_of(Picture(window), index.reading, None)
        return window if alone else in_bands(window, index)

    def whole(self) -> np.ndarray:
        """Return the whole image (H, W, bands), with the bands of the index; nan where it has no value.

        Raises:
            ValueError: If a tile has changed or does not decode, or the bands are wrong.
        """
        H, W = self.mask.shape
        return self.window(slice(0, H), slice(0, W))


def in_bands(image: np.ndarray, index: Index) -> np.ndarray:
    """Return an image (H, W, bands) with the bands of the index: resampled if it says so, then the chosen ones.

    Raises:
        ValueError: If the image has another number of bands, and is not to be resampled.
    """
    if image.shape[2] != index.stored_bands:
        if index.preparation["bands"] != index.stored_bands:
            raise ValueError(f"has {image.shape[2]} bands; the index says {index.stored_bands}")
        image = resample_bands(image, index.stored_bands)
    return image if index.chosen is None else np.take(image, index.chosen, axis=2)


def read_stored(descriptor: int, entry: SampleEntry, index: Index) -> StoredSample:
    """Read one sample from an open tar and decode its mask, and its image unless that is in tiles.

    Args:
        descriptor: File descriptor of the tar.
        entry: Index entry of the sample.
        index: The index, which defines bands, labels and how files are read.

    Raises:
        ValueError: If bytes are missing or changed, a file does not decode, sizes differ or the bands are wrong.
    """
    image: np.ndarray | None = None
    head = read = None
    if entry.image.format == tiles.FORMAT:
        read = partial(read_member, descriptor, entry.image)
        head = tiles.read_head(read, entry.image.length, LIMITS.check_image)
        first = memoryview(head.data)
        mask_data = memoryview(os.pread(descriptor, entry.mask.length, entry.mask.offset))
        check_length(entry.mask, mask_data)
        shape = head.layout.height, head.layout.width
    else:
        first, mask_data = read_both(descriptor, entry)
    if digest((first, mask_data)) != entry.digest:
        raise ValueError("has other bytes than when it was indexed (xxh3 differs)")
    if head is None:
        bands = index.stored_bands if index.preparation["bands"] is None else None
        image = decode_image(entry.image.format, first, bands=bands, reading=index.reading)
        shape = image.shape[:2]
    mask = decode_mask(entry.mask.format, mask_data, index.labels.values if index.labels else AS_LABELS)
    if shape != mask.shape:
        raise ValueError(f"the image is {shape}, its mask {mask.shape} (height, width)")
    if image is not None:
        image = in_bands(image, index)
    if index.labels is not None:
        mask = index.labels.apply(mask)
    return StoredSample(mask.astype(np.uint8, copy=False), index, image, head, read)


def read_both(descriptor: int, entry: SampleEntry) -> tuple[memoryview, memoryview]:
    """Return the bytes of image and mask.

    Args:
        descriptor: File descriptor of the tar.
        entry: Index entry of the sample.

    Raises:
        ValueError: If bytes are missing.
    """
    kinds = entry.image, entry.mask
    start = min(member.offset for member in kinds)
    span = max(member.offset + member.length for member in kinds) - start
    # Image and mask mostly lie next to each other: one read for both.
    if span <= entry.image.length + entry.mask.length + MAX_GAP:
        data = memoryview(os.pread(descriptor, span, start))
        parts = [data[m.offset - start : m.offset - start + m.length] for m in kinds]
    else:
        parts = [memoryview(os.pread(descriptor, m.length, m.offset)) for m in kinds]
    for member, part in zip(kinds, parts, strict=True):
        check_length(member, part)
    return parts[0], parts[1]


def check_length(member: Member, data: bytes | memoryview) -> None:
    """Raise ValueError if fewer bytes of a member were read than it has."""
    if len(data) != member.length:
        raise ValueError(f"ends after {len(data)} of {member.length} bytes")


def read_member(descriptor: int, member: Member, offset: int, count: int) -> bytes:
    """Return bytes of a member of an open tar; fewer where it ends.

    Args:
        descriptor: File descriptor of the tar.
        member: The member.
        offset: Offset of the first byte in the member.
        count: Number of bytes.
    """
    return os.pread(descriptor, max(0, min(count, member.length - offset)), member.offset + offset)
