"""Last steps of all sources: resize a sample, and write each split."""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deepskip.data_shards.card import write_card
from deepskip.data_shards.index import BrokenIndex, Index, MissingIndex, load_index
from deepskip.data_shards.labels import IGNORE_INDEX
from deepskip.data_shards.origin import Origin, class_conflict
from deepskip.data_shards.pictures import without_values
from deepskip.data_shards.plain_values import plain_number
from deepskip.data_shards.preparation import resample_bands, resize_longest_side
from deepskip.data_shards.progress import Progress
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.sources.split import SPLITS, PackError
from deepskip.data_shards.writer import write_shards

T = TypeVar("T")


def prepared_sample(
    key: str,
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    stored_image: tuple[str, bytes] | None,
    bands: int | None,
    longest_side: int | None,
) -> Sample:
    """Return a sample resampled to `bands` and shrunk to `longest_side`.

    The image's own file is stored if the image was not changed: no second loss from JPEG, and no growth. Where no band of the
    image has a value (nan), the mask is labelled ignored.

    Args:
        key: Key of the sample.
        image_HWC: Image (H, W, bands).
        mask_HW: Labels (H, W).
        stored_image: Extension and contents of the image's own file, or None.
        bands: Number of bands that the image is resampled to; None keeps its bands.
        longest_side: Number of pixels to which the longer side of a larger image is shrunk; None keeps its size.
    """
    image, mask = image_HWC, mask_HW
    if bands is not None:
        image = resample_bands(image, bands)
    if longest_side is not None:
        image, resized = resize_longest_side(image, mask, longest_side)
        assert resized is not None
        mask = resized
    return Sample(key, image, without_values(image, mask, IGNORE_INDEX), stored_image if image is image_HWC else None)


def write_splits(
    parts: dict[str, list[T]],
    out: Path,
    read: Callable[[list[T]], Iterator[Sample]],
    files_of: Callable[[list[T]], list[Path]],
    options: tuple[Any, ...],
    *,
    num_classes: int,
    origin: Origin,
    bands: int | None,
    longest_side: int | None,
    nodata: float | None = None,
    samples_per_shard: int,
    tile: int | None = None,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, int]:
    """Write the members of each split into out/SPLIT, and the data set's README.md.

    A split that was packed from the same files with the same options is not changed.

    Args:
        parts: Members by split.
        out: Folder to make.
        read: Yields the samples of members.
        files_of: Returns the files that members are made of, for the fingerprint.
        options: Options that determine the shards, for the fingerprint.
        num_classes: 1 for binary, else the number of classes with background.
        origin: How the files are read, for the index.
        bands: Number of bands that images are resampled to, for the index.
        longest_side: Longest side that images are shrunk to, for the index.
        nodata: No-data value that the user named, for the index.
        samples_per_shard: Number of samples in a shard.
        tile: Side in pixels of the tiles of larger images, and of those of many bands; None stores them in one piece.
        progress: Wraps the samples.
        say: Called with a warning if masks of another split in `out` were read otherwise.

    Returns:
        Number of samples by split.

    Raises:
        PackError: If a split exists with other contents, another one in `out` has other classes, or a sample cannot be written.
    """
    for other in others_in(out, parts):
        if told := compare(origin, num_classes, other):
            say(told)
    preparation: dict[str, Any] = {"bands": bands, "longest_side": longest_side}
    if nodata is not None:
        preparation["nodata"] = plain_number(nodata)
    for name, members in parts.items():
        made_of = (*options, num_classes, bands, longest_side, samples_per_shard)
        if tile is not None:
            made_of = (*made_of, "tile", tile)
        try:
            write_shards(
                progress(read(members), len(members)),
                out / name,
                num_classes=num_classes,
                preparation=preparation,
                origin=origin,
                samples_per_shard=samples_per_shard,
                tile=tile,
                source=fingerprint(files_of(members), *made_of),
            )
        except (FileExistsError, ValueError) as error:
            raise PackError(str(error)) from error
    write_card(out)
    return {name: len(members) for name, members in parts.items()}


def others_in(out: Path, names: Collection[str]) -> list[Index]:
    """Return the indexes of the splits of a data set that are not named; those that cannot be read are omitted."""
    found = []
    for name in SPLITS:
        if name not in names:
            with contextlib.suppress(MissingIndex, BrokenIndex):
                found.append(load_index(out / name))
    return found


def compare(origin: Origin, num_classes: int, other: Index) -> str | None:
    """Return a warning if the masks of another split of a data set were read by other options, or None.

    Args:
        origin: How the files of a new split are read.
        num_classes: Its number of classes.
        other: Index of the other split.

    Raises:
        PackError: If they have other classes.
    """
    reason = class_conflict(origin.classes, other.classes, other.location) if num_classes > 1 else None
    if num_classes != other.num_classes:
        reason = (
            f"num_classes is {num_classes}, but {other.num_classes} in {other.location}; pack with the same classes: "
            f"{'--categories or --binary' if origin.classes else f'--num_classes {other.num_classes}'}"
        )
    if reason:
        raise PackError(f"{reason}. If {other.location} is to be replaced, remove it first")
    if other.origin is None or origin.classes or other.origin.classes or origin.options == other.origin.options:
        return None
    return (
        f"warning: masks are read with {origin.options or 'no options'}, those of {other.location} were with "
        f"{other.origin.options or 'none'}"
    )


def fingerprint(files: list[Path], *options: Any) -> str:
    """Return a digest of files, by name, size and modification time, and of the options of packing."""
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((seen, options)).encode()).hexdigest()
