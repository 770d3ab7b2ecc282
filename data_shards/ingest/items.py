"""What a source delivers: the files of one sample, and how they become a sample of a chain."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from deepskip.data_shards.decoding import read_image, read_mask
from deepskip.data_shards.index import Index
from deepskip.data_shards.labels import AS_LABELS, IGNORE_INDEX, Seen, Values, decide_labels
from deepskip.data_shards.pictures import AS_IT_COMES, Reading, image_of
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.sources.folder import is_read_as
from deepskip.data_shards.sources.packing import prepared_sample
from deepskip.data_shards.survey import Survey
from deepskip.data_shards.writer import check_sample

# Largest file that is read into memory, in bytes.
MAX_FILE = 2**30
# What a key may not hold: a dot ends it, a slash or backslash is a folder, and surrogates are bytes that are not UTF-8.
SPECIAL = re.compile(r"[./\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Content(NamedTuple):
    """A file's extension without a dot, and its bytes."""

    extension: str
    data: bytes


class Changed(Exception):
    """A file has changed while it was read, so it is looked at again later."""


class LostItems(ValueError):
    """A source no longer has items that were never read; the message says which."""


@dataclass(frozen=True)
class Item:
    """One image with its mask in a source.

    Attributes:
        key: Key of the sample, which no other item of any source has.
        name: What the journal calls it.
        version: What changes if its contents do; a number if the source's items are in order.
        time: When it was made, in seconds since 1970.
        read: Reads its image and its mask. It raises ValueError if they cannot be used, FileNotFoundError if they are gone,
            Changed if they are being written, and StorageError if the storage does not answer.
        offset: Name and value of the source's offset after this item; None if the source counts its items.
    """

    key: str
    name: str
    version: str | int
    time: float
    read: Callable[[], tuple[Content, Content]] = field(repr=False, compare=False)
    offset: tuple[str, int] | None = None


class Source(Protocol):
    """Where items come from.

    Attributes:
        waiting: Number of files that lack their image or mask, or are being written.
    """

    waiting: int

    @property
    def behind(self) -> bool:
        """Return whether the source has more than was delivered, as far as is known."""

    def items(self) -> Iterator[Item | None]:
        """Yield items as they arrive, and None after a short wait without any; this never ends.

        Raises:
            LostItems: If items are gone that were never read.
            OSError: If the source cannot be read.
        """

    def again(self, item: Item, soon: bool) -> None:
        """Take back an item that was not used.

        Args:
            item: The item.
            soon: Whether it may be complete in a moment; otherwise it is delivered again if it changes.
        """

    def close(self) -> None:
        """Stop to watch the source."""


@dataclass(frozen=True)
class Rules:
    """How items become samples of a chain.

    Attributes:
        first: Generation 0 of the split.
        labels: Meaning of mask values: "auto", "binary" or "classes".
        ignore_label: Mask value that is ignored.
        reading: How images are read.
        values: How masks are read.
        tile: Side in pixels of the tiles of large images; None stores them in one piece.
        samples_per_shard: Number of samples in a shard.
    """

    first: Index
    labels: str = "auto"
    ignore_label: int | None = None
    reading: Reading = AS_IT_COMES
    values: Values = AS_LABELS
    tile: int | None = None
    samples_per_shard: int = 256

    @property
    def digest(self) -> str:
        """Return a digest of what decides whether an item can be used."""
        decisive = (self.labels, self.ignore_label, self.reading, self.values)
        return xxhash.xxh3_64_hexdigest(repr(decisive).encode())


def key_of(name: str, stem: str) -> str:
    """Return the key of an item: the source's name, and the item's own. Different items have different keys.

    Args:
        name: Name of the source, without a dot or slash.
        stem: Name of the item in the source.
    """
    plain = SPECIAL.sub("_", stem)
    # Two stems may differ in such characters alone.
    if plain == stem:
        return f"{name}_{plain}"
    return f"{name}_{plain}-{xxhash.xxh3_64_hexdigest(stem.encode(errors='surrogatepass'))}"


def sample_of(key: str, contents: tuple[Content, Content], rules: Rules) -> Sample:
    """Decode an item to a sample that fits a chain.

    Args:
        key: Key of the sample.
        contents: Its image and its mask.
        rules: How they are read.

    Raises:
        ValueError: If it cannot be decoded or does not fit; says why.
    """
    (image_kind, image_bytes), (mask_kind, mask_bytes) = contents
    first = rules.first
    bands, longest_side = first.preparation["bands"], first.preparation["longest_side"]
    nodata = first.preparation.get("nodata")
    reading = replace(rules.reading, missing=True, nodata=None if nodata is None else float(nodata))
    values = replace(rules.values, ignore=rules.ignore_label)
    picture, mask = read_image(image_kind, image_bytes), read_mask(mask_kind, mask_bytes)
    survey, seen = Survey(), Seen()
    survey.look("the image", picture, mask, reading)
    # Which bands are transparency is decided by the number of bands that the chain has.
    faults = [
        *survey.faults(reading, first.bands),
        *survey.faults_of_masks(labels_of(rules), rules.ignore_label, values),
    ]
    if faults:
        raise ValueError("; ".join(faults))
    decided, values = survey.decided(reading, values)
    numbers = values.of(mask)
    seen.add("the mask", numbers, rules.ignore_label)
    how = decide_labels(seen, labels_of(rules), first.num_classes, rules.ignore_label, values)
    image = image_of(picture, replace(decided, alpha=reading.alpha), first.bands if bands is None else None)
    stored = (image_kind, image_bytes) if is_read_as(picture, image) else None
    sample = prepared_sample(key, image, how.apply(numbers), stored, bands, longest_side)
    require_fit(sample, first)
    return sample


def labels_of(rules: Rules) -> str:
    """Return the meaning of mask values; with several classes, "auto" is "classes"."""
    return "classes" if rules.labels == "auto" and rules.first.num_classes > 1 else rules.labels


def require_fit(sample: Sample, first: Index) -> None:
    """Raise ValueError if a sample would make a generation that cannot follow in a chain.

    Args:
        sample: The sample.
        first: Generation 0 of the chain.
    """
    check_sample(sample, set(), first.bands, first.num_classes, IGNORE_INDEX)
    image = sample.image_HWC
    if first.dtype == "uint8" and image.dtype != np.uint8:
        raise ValueError(f"the image is {image.dtype}, but all images of generation 0 are uint8")
    if not first.reading.missing and image.dtype.kind == "f" and np.isnan(image).any():
        raise ValueError("the image has pixels without a value (nan), but none of generation 0 do")
