"""What all sources do last: bring a sample to its size, and write each split."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deepskip.data_shards.index import plain_number
from deepskip.data_shards.labels import IGNORE_INDEX
from deepskip.data_shards.pictures import without_values
from deepskip.data_shards.preparation import resample_bands, resize_longest_side
from deepskip.data_shards.progress import Progress
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.sources.split import PackError
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
    """Makes a sample brought to `bands` and `longest_side`; None leaves as it is.

    Where no band of the image has a value (nan) the mask is labelled ignored. stored_image: the image's own file as
    (extension, bytes). It goes in where nothing was done to the image: no second loss from JPEG, no growth.
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
    bands: int | None,
    longest_side: int | None,
    nodata: float | None = None,
    samples_per_shard: int,
    progress: Progress,
) -> dict[str, int]:
    """Writes the members of each split into out/SPLIT and gives samples by split.

    read: makes the samples of members. files_of, options: what the shards are made of; a split that was packed from the same
    is left as it is. bands, longest_side: what images are brought to, for the index; nodata: value named for none.
    Raises PackError.
    """
    preparation: dict[str, Any] = {"bands": bands, "longest_side": longest_side}
    if nodata is not None:
        preparation["nodata"] = plain_number(nodata)
    for name, members in parts.items():
        made_of = (*options, num_classes, bands, longest_side, samples_per_shard)
        try:
            write_shards(
                progress(read(members), len(members)),
                out / name,
                num_classes=num_classes,
                preparation=preparation,
                samples_per_shard=samples_per_shard,
                source=fingerprint(files_of(members), *made_of),
            )
        except (FileExistsError, ValueError) as error:
            raise PackError(str(error)) from error
    return {name: len(members) for name, members in parts.items()}


def fingerprint(files: list[Path], *options: Any) -> str:
    """Gives a digest of files, by name, size and time of change, and of what is made of them."""
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((seen, options)).encode()).hexdigest()
