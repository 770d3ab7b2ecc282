"""Pack arrays that hold a whole data set: images (N, height, width, bands) and masks (N, height, width)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepskip.data_shards.decoding import Limits, read_npz
from deepskip.data_shards.labels import AS_LABELS, Labels, Seen, Values, decide_labels
from deepskip.data_shards.origin import Origin
from deepskip.data_shards.pictures import AS_IT_COMES, Picture, Reading, image_of
from deepskip.data_shards.progress import Progress, no_progress, no_word
from deepskip.data_shards.sample import IMAGE_KEYS, LAYOUTS, MASK_KEYS, Sample
from deepskip.data_shards.sources.packing import prepared_sample, write_splits
from deepskip.data_shards.sources.split import PackError, split_stems
from deepskip.data_shards.survey import Survey, foreground_note

# A user's own data set may be of any size, as long as its files are as large as they claim.
WHOLE = Limits(2**62, 2**62)


def pack_arrays(
    images: Path,
    masks: Path,
    out: Path,
    *,
    layout: str = "NHWC",
    split: Path | None = None,
    split_name: str | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    labels: str = "auto",
    num_classes: int | None = None,
    ignore_label: int | None = None,
    bands: int | None = None,
    reading: Reading = AS_IT_COMES,
    values: Values = AS_LABELS,
    samples_per_shard: int = 256,
    tile: int | None = None,
    key_prefix: str = "",
    progress: Progress = no_progress,
    say: Callable[[str], None] = no_word,
) -> dict[str, int]:
    """Pack an array of images and an array of masks into splits.

    A .npy file is mapped into memory and not read as a whole; a .npz is read. Keys of the samples are their numbers.

    Args:
        images: .npy or .npz with images of the axes `layout`.
        masks: .npy or .npz with masks (N, height, width).
        out: Folder to make.
        layout: Axes of the images: "NHWC", "NCHW" or "NHW".
        split: CSV with columns stem,split, where stems are the numbers of the samples.
        split_name: Split that all samples go into.
        val_share: Share of samples for validation without `split` and `split_name`, 0 to 1.
        seed: Seed of the random split.
        labels: Meaning of mask values, as in `pack_folder`.
        num_classes: Number of classes, as in `pack_folder`.
        ignore_label: Mask value that is ignored, as in `pack_folder`.
        bands: Number of bands that every image is resampled to.
        reading: How images are read, as in `pack_folder`.
        values: How masks are read, as in `pack_folder`.
        samples_per_shard: Number of samples in a shard.
        tile: Side in pixels of the tiles of larger images, and of those of many bands; None stores them in one piece.
        key_prefix: What precedes the number of a sample in its key.
        progress: Wraps the samples that are examined and written.
        say: Called with each line about what was decided.

    Returns:
        Number of samples by split.

    Raises:
        PackError: If the arrays cannot be packed; says why.
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
    origin = Origin(labels, ignore_label, values)
    reading, values = replace(reading, missing=True), replace(values, ignore=ignore_label)
    survey, seen = Survey(), Seen()
    for number in progress(range(len(targets)), len(targets)):
        try:
            survey.look(str(number), Picture(pictures[number]), Picture(targets[number]), reading)
        except ValueError as error:
            raise PackError(f"{images}: image {number} {error}") from error
        try:
            seen.add(str(number), values.of(Picture(targets[number])), ignore_label)
        except ValueError as error:
            raise PackError(f"{masks}: mask {number} {error}") from error
    try:
        how = decide_labels(seen, labels, num_classes, ignore_label, values)
    except ValueError as error:
        raise PackError(f"{masks}: {error}") from error
    for line in [*survey.notes(reading), *foreground_note(seen.pixels, how.binary)]:
        say(line)
    stems = split_stems([str(number) for number in range(len(targets))], split, val_share, seed, split_name)
    return write_splits(
        {name: [int(stem) for stem in members] for name, members in stems.items()},
        out,
        lambda members: read_samples(pictures, targets, members, how, reading, bands, key_prefix),
        lambda members: [images, masks],
        (stems, layout, how, reading, *([key_prefix] if key_prefix else [])),
        num_classes=how.num_classes,
        origin=origin,
        bands=bands,
        longest_side=None,
        nodata=reading.nodata,
        samples_per_shard=samples_per_shard,
        tile=tile,
        progress=progress,
        say=say,
    )


def open_array(path: Path, keys: tuple[str, ...]) -> np.ndarray:
    """Open an array of numbers.

    Args:
        path: .npy file, which is mapped into memory, or .npz file.
        keys: Names to look for in a .npz; otherwise its only array is taken.

    Returns:
        The array, of any shape (*,) and any real dtype.

    Raises:
        PackError: If the file cannot be read or does not hold real numbers.
    """
    try:
        with path.open("rb") as stream:
            packed = stream.read(4) == b"PK\3\4"
            array = read_npz(stream, keys, WHOLE) if packed else np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise PackError(f"{path} does not exist") from error
    # numpy raises errors of many kinds for what is not an array.
    except Exception as error:
        raise PackError(f"{path} cannot be read: {error}") from error
    if array.dtype.kind not in "biuf":
        raise PackError(f"{path} has dtype {array.dtype}; it must be of integers or real numbers")
    return array


def read_samples(
    images: np.ndarray,
    masks: np.ndarray,
    numbers: list[int],
    how: Labels,
    reading: Reading,
    bands: int | None,
    key_prefix: str = "",
) -> Iterator[Sample]:
    """Yield samples by their numbers.

    Args:
        images: Images (N, H, W, bands).
        masks: Masks (N, H, W).
        numbers: Numbers of the samples.
        how: How mask values become labels.
        reading: How images are read.
        bands: Number of bands that every image is resampled to, or None.
        key_prefix: What precedes the number of a sample in its key.
    """
    digits = len(str(len(images) - 1))
    for number in numbers:
        image = image_of(Picture(np.array(images[number])), reading)
        mask = how.apply(how.values.of(Picture(np.array(masks[number]))))
        yield prepared_sample(f"{key_prefix}{number:0{digits}d}", image, mask, None, bands, None)
