"""Packs a folder of images and a folder of masks, paired by file stem."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepskip.data_shards import trouble
from deepskip.data_shards.decoding import decode_image, decode_mask
from deepskip.data_shards.labels import SHOWN, Labels, decide_labels, listed
from deepskip.data_shards.progress import Progress, no_progress
from deepskip.data_shards.sample import EXTENSIONS, Sample
from deepskip.data_shards.sources.packing import prepared_sample, write_splits
from deepskip.data_shards.sources.split import PackError, split_stems


@dataclass(frozen=True)
class Pair:
    """An image file and its mask file; one .npz may be both."""

    stem: str
    image: Path
    mask: Path


def pack_folder(
    images: Path,
    masks: Path,
    out: Path,
    *,
    split: Path | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    labels: str = "auto",
    num_classes: int | None = None,
    ignore_label: int | None = None,
    bands: int | None = None,
    longest_side: int | None = None,
    mask_suffix: str = "",
    samples_per_shard: int = 256,
    progress: Progress = no_progress,
) -> dict[str, int]:
    """Packs images and masks into out/train, out/val and, where the split has one, out/test; gives samples by split.

    split: CSV with columns stem,split; without one, val_share of the images, drawn from seed, are for validation.
    labels: "binary" (anything but 0 is foreground), "classes" (values are labels), "auto" (binary where the masks hold a
    single value beside 0). num_classes: as the model's; found from the masks by default. ignore_label: mask value that takes
    no part. bands, longest_side: what every image is brought to. mask_suffix: what mask stems end with beyond the image's.
    progress: wraps what is gone through. Splits that were packed from the same files are left as they are.
    Raises PackError.
    """
    pairs = pair_files(images, masks, mask_suffix)
    by_stem = {pair.stem: pair for pair in pairs}
    stems = split_stems(list(by_stem), split, val_share, seed)
    how = examine(pairs, labels, num_classes, ignore_label, bands, progress)
    return write_splits(
        {name: [by_stem[stem] for stem in members] for name, members in stems.items()},
        out,
        lambda members: read_samples(members, how, bands, longest_side),
        lambda members: [path for pair in members for path in (pair.image, pair.mask)],
        (how,),
        num_classes=how.num_classes,
        bands=bands,
        longest_side=longest_side,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )


def pair_files(images: Path, masks: Path, mask_suffix: str = "") -> list[Pair]:
    """Pairs the files of two folders by stem; raises PackError that lists what is left over on either side."""
    found_images, found_masks = list_files(images, ""), list_files(masks, mask_suffix)
    if not found_images:
        raise PackError(f"{images} holds no images ({', '.join(EXTENSIONS)})")
    faults = []
    for missing, what, where in (
        (found_images.keys() - found_masks.keys(), "images without a mask", masks),
        (found_masks.keys() - found_images.keys(), "masks without an image", images),
    ):
        if missing:
            faults.append(f"{len(missing)} {what} of the same stem in {where}: {listed(sorted(missing))}")
    if faults:
        raise PackError("\n".join(faults))
    return [Pair(stem, found_images[stem], found_masks[stem]) for stem in sorted(found_images)]


def list_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Maps stem to file for the images of a folder; raises PackError for a missing folder or a stem that occurs twice."""
    if not folder.is_dir():
        raise PackError(f"{folder} is no folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix[1:].lower() not in EXTENSIONS or not path.stem.endswith(suffix):
            continue
        if not path.is_file():
            trouble.passed_over(path, "no file" if path.exists() else "a link to nothing")
            continue
        stem = path.stem[: len(path.stem) - len(suffix)]
        if stem in files:
            raise PackError(f"{files[stem]} and {path} have the same stem; a sample has one image and one mask")
        files[stem] = path
    return files


def examine(
    pairs: list[Pair],
    labels: str,
    num_classes: int | None,
    ignore_label: int | None,
    bands: int | None,
    progress: Progress = no_progress,
) -> Labels:
    """Reads every pair once, decides what mask values mean, and raises PackError that lists all that cannot be packed."""
    faults: list[str] = []
    values: set[int] = set()
    highest: dict[str, int] = {}
    band_counts: dict[int, list[str]] = {}
    for pair in progress(pairs, len(pairs)):
        try:
            image, mask = read_pair(pair)
        except ValueError as error:
            faults.append(str(error))
            continue
        if image.shape[:2] != mask.shape:
            faults.append(
                f"{pair.mask} is {mask.shape[0]} x {mask.shape[1]} (height x width), "
                f"its image {image.shape[0]} x {image.shape[1]}"
            )
        band_counts.setdefault(image.shape[2], []).append(pair.stem)
        here = set(np.unique(mask).tolist()) - {ignore_label}
        values |= here
        highest[pair.mask.name] = max(here, default=0)
    if len(band_counts) > 1 and bands is None:
        counts = ", ".join(f"{count} bands: {len(stems)} images" for count, stems in sorted(band_counts.items()))
        faults.append(f"images differ in their number of bands ({counts}); bring them to one number with --bands N")
    try:
        how = decide_labels(values, labels, num_classes, ignore_label, highest)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise PackError(
            "\n".join(faults[:SHOWN] + ([f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []))
        )
    return how


def read_samples(pairs: list[Pair], how: Labels, bands: int | None, longest_side: int | None) -> Iterator[Sample]:
    """Yields the pairs as samples, brought to `bands` and `longest_side`."""
    for pair in pairs:
        image, mask = read_pair(pair)
        extension = pair.image.suffix[1:].lower()
        stored = (extension, pair.image.read_bytes()) if pair.image != pair.mask else None
        # a dot in a key would end it, for every WebDataset reader
        yield prepared_sample(pair.stem.replace(".", "_"), image, how.apply(mask), stored, bands, longest_side)


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image (H, W, bands) and its mask (H, W); raises ValueError that names the file."""
    try:
        image = decode_image(pair.image.suffix[1:].lower(), pair.image.read_bytes())
    except ValueError as error:
        raise PackError(f"{pair.image} {error}") from error
    try:
        return image, decode_mask(pair.mask.suffix[1:].lower(), pair.mask.read_bytes())
    except ValueError as error:
        raise PackError(f"{pair.mask} {error}") from error
