"""Packs arrays that hold a whole data set: images (N, height, width, bands) and masks (N, height, width)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deepskip.data_shards.decoding import Limits, read_npz
from deepskip.data_shards.labels import Labels, decide_labels
from deepskip.data_shards.progress import Progress, no_progress
from deepskip.data_shards.sample import IMAGE_KEYS, LAYOUTS, MASK_KEYS, Sample
from deepskip.data_shards.sources.packing import prepared_sample, write_splits
from deepskip.data_shards.sources.split import PackError, split_stems

# a data set of one's own may be of any size, as long as its files are as large as they claim
WHOLE = Limits(2**62, 2**62)


def pack_arrays(
    images: Path,
    masks: Path,
    out: Path,
    *,
    layout: str = "NHWC",
    split: Path | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    labels: str = "auto",
    num_classes: int | None = None,
    ignore_label: int | None = None,
    bands: int | None = None,
    samples_per_shard: int = 256,
    progress: Progress = no_progress,
) -> dict[str, int]:
    """Packs two .npy files (mapped, not read), or .npz files, into splits of `out`; gives samples by split.

    layout: of the images, "NHWC", "NCHW" or "NHW". split: CSV of columns stem,split, where stems are the numbers of the
    samples. labels, num_classes, ignore_label, bands: as in pack_folder. Keys are the numbers of the samples.
    Raises PackError.
    """
    if layout not in LAYOUTS:
        raise PackError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    pictures, targets = open_array(images, (*IMAGE_KEYS, "images")), open_array(masks, MASK_KEYS)
    if pictures.ndim != len(layout) or targets.ndim != 3:
        raise PackError(
            f"{images} has shape {pictures.shape}, {masks} {targets.shape}; they must be {layout} and (N, height, width)"
        )
    pictures = {"NHWC": pictures, "NCHW": np.moveaxis(pictures, 1, -1) if layout == "NCHW" else pictures,
                "NHW": pictures[..., None]}[layout]  # fmt: skip
    if pictures.shape[:3] != targets.shape or 0 in pictures.shape:
        raise PackError(f"{images} has {pictures.shape} (N, height, width, bands), {masks} {targets.shape}")
    values: set[int] = set()
    highest: dict[str, int] = {}
    for number in progress(range(len(targets)), len(targets)):
        mask = targets[number]
        if mask.dtype.kind == "f" and not (np.isfinite(mask) & (mask == np.round(mask))).all():
            raise PackError(f"{masks}: number {number} holds values that are no integers; a mask holds labels")
        here = {int(value) for value in np.unique(mask)} - {ignore_label}
        if min(here, default=0) < 0:
            raise PackError(f"{masks}: number {number} has label {min(here)}; labels are 0 or more")
        values |= here
        highest[str(number)] = max(here, default=0)
    try:
        how = decide_labels(values, labels, num_classes, ignore_label, highest)
    except ValueError as error:
        raise PackError(str(error)) from error
    stems = split_stems([str(number) for number in range(len(targets))], split, val_share, seed)
    return write_splits(
        {name: [int(stem) for stem in members] for name, members in stems.items()},
        out,
        lambda members: read_samples(pictures, targets, members, how, bands, images),
        lambda members: [images, masks],
        (stems, layout, how),
        num_classes=how.num_classes,
        bands=bands,
        longest_side=None,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )


def open_array(path: Path, keys: tuple[str, ...]) -> np.ndarray:
    """Opens an array of numbers; of a .npz the one under a known key, or the only one; raises PackError."""
    try:
        with path.open("rb") as stream:
            packed = stream.read(4) == b"PK\3\4"
            array = read_npz(stream, keys, WHOLE) if packed else np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise PackError(f"{path} does not exist") from error
    # numpy has errors of many kinds for what is no array
    except Exception as error:
        raise PackError(f"{path} cannot be read: {error}") from error
    if array.dtype.kind not in "biuf":
        raise PackError(f"{path} has dtype {array.dtype}; it must be of integers or real numbers")
    return array


def read_samples(
    images: np.ndarray, masks: np.ndarray, numbers: list[int], how: Labels, bands: int | None, path: Path
) -> Iterator[Sample]:
    """Yields samples by their numbers, brought to `bands`; raises PackError for values that are nan or infinite."""
    digits = len(str(len(images) - 1))
    for number in numbers:
        image = np.array(images[number])
        if image.dtype == bool:
            image = image.astype(np.uint8)
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise PackError(f"{path}: number {number} has values that are nan or infinite")
        mask = how.apply(np.array(masks[number]))
        yield prepared_sample(f"{number:0{digits}d}", image, mask, None, bands, None)
