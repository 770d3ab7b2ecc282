"""Pack a folder of images and a folder of masks, paired by file stem."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deepskip.data_shards import trouble
from deepskip.data_shards.decoding import read_image, read_mask
from deepskip.data_shards.labels import AS_LABELS, SHOWN, Labels, Seen, Values, decide_labels, listed
from deepskip.data_shards.origin import Origin
from deepskip.data_shards.pictures import AS_IT_COMES, Picture, Reading, image_of
from deepskip.data_shards.progress import Progress, no_progress, no_word
from deepskip.data_shards.sample import EXTENSIONS, Sample
from deepskip.data_shards.sources.elsewhere import how_to_convert, kind_of
from deepskip.data_shards.sources.packing import prepared_sample, write_splits
from deepskip.data_shards.sources.split import PackError, split_stems
from deepskip.data_shards.survey import Survey, foreground_note


@dataclass(frozen=True)
class Pair:
    """The files of one sample.

    Attributes:
        stem: Stem that its files share.
        images: Image files, one, or one for each channel.
        mask: Mask file; one .npz may be both image and mask.
    """

    stem: str
    images: tuple[Path, ...]
    mask: Path


def pack_folder(
    images: Path,
    masks: Path,
    out: Path,
    *,
    split: Path | None = None,
    split_name: str | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    labels: str = "auto",
    num_classes: int | None = None,
    ignore_label: int | None = None,
    bands: int | None = None,
    longest_side: int | None = None,
    mask_suffix: str = "",
    channel_suffix: str = "",
    reading: Reading = AS_IT_COMES,
    values: Values = AS_LABELS,
    samples_per_shard: int = 256,
    tile: int | None = None,
    progress: Progress = no_progress,
    say: Callable[[str], None] = no_word,
) -> dict[str, int]:
    """Pack images and masks into out/train, out/val and, if the split has one, out/test.

    Splits that were packed from the same files with the same options are not changed.

    Args:
        images: Folder of the images.
        masks: Folder of the masks; may be the same.
        out: Folder to make.
        split: CSV with columns stem,split; without it, `val_share` of the images are drawn for validation.
        split_name: Split that all images go into.
        val_share: Share of images for validation without `split` and `split_name`, 0 to 1.
        seed: Seed of the random split.
        labels: Meaning of mask values. "binary": every value other than 0 is foreground. "classes": values are labels.
            "auto": binary if the masks hold only one value other than 0, else classes.
        num_classes: Number of classes of the model; taken from the masks by default.
        ignore_label: Mask value that is ignored.
        bands: Number of bands that every image is resampled to.
        longest_side: Number of pixels to which the longer side of larger images is shrunk.
        mask_suffix: What follows the image's stem in the mask's stem.
        channel_suffix: Suffixes of the files of an image's channels: "_0000" for that and those that count up from it, or a
            list "_red,_green".
        reading: How images are read.
        values: How masks are read.
        samples_per_shard: Number of samples in a shard.
        tile: Side in pixels of the tiles of larger images, and of those of many bands; None stores them in one piece.
        progress: Wraps the pairs that are examined and the samples that are written.
        say: Called with each line about what was decided for which group of files.

    Returns:
        Number of samples by split.

    Raises:
        PackError: If the files cannot be packed; lists the faults.
    """
    pairs, lines = pair_files(images, masks, mask_suffix, channel_suffix)
    by_stem = {pair.stem: pair for pair in pairs}
    stems = split_stems(list(by_stem), split, val_share, seed, split_name)
    origin = Origin(labels, ignore_label, values, reading.alpha, reading.orientation)
    reading = replace(reading, missing=True)
    how, reading, found = examine(pairs, labels, num_classes, ignore_label, bands, reading, values, progress)
    for line in [*lines, *found]:
        say(line)
    return write_splits(
        {name: [by_stem[stem] for stem in members] for name, members in stems.items()},
        out,
        lambda members: read_samples(members, how, reading, bands, longest_side),
        lambda members: [path for pair in members for path in (*pair.images, pair.mask)],
        (how, reading),
        num_classes=how.num_classes,
        origin=origin,
        bands=bands,
        longest_side=longest_side,
        nodata=reading.nodata,
        samples_per_shard=samples_per_shard,
        tile=tile,
        progress=progress,
        say=say,
    )


def pair_files(
    images: Path, masks: Path, mask_suffix: str = "", channel_suffix: str = ""
) -> tuple[list[Pair], list[str]]:
    """Pair the files of two folders by stem.

    Args:
        images: Folder of the images.
        masks: Folder of the masks; may be the same.
        mask_suffix: What follows the image's stem in the mask's stem.
        channel_suffix: Suffixes of the files of an image's channels, as in `pack_folder`.

    Returns:
        The pairs in order of their stems, and lines about files that are skipped.

    Raises:
        PackError: If there are no images, or files without their counterpart; lists them.
    """
    together = same_place(images, masks) and mask_suffix != ""
    channels = channel_suffix.split(",") if "," in channel_suffix else [channel_suffix]
    found_images: dict[str, tuple[Path, ...]] = {}
    by_channel: dict[str, dict[str, Path]] = {}
    others: Counter[str] = Counter()
    for path in list_files(images, others):
        if together and path.stem.endswith(mask_suffix):
            continue
        stem, channel = split_channel(path.stem, channels)
        if (other := by_channel.setdefault(stem, {}).setdefault(channel, path)) is not path:
            raise PackError(f"{other} and {path} have the same stem; a sample has one image and one mask")
    for stem, files in by_channel.items():
        found_images[stem] = in_order(stem, files, channels)
    if not found_images:
        raise PackError(f"{images} holds no images ({', '.join(EXTENSIONS)}){how_to_convert(others, images)}")
    found_masks: dict[str, Path] = {}
    for path in list_files(masks, Counter() if same_place(images, masks) else others):
        if path.stem.endswith(mask_suffix):
            stem = path.stem[: len(path.stem) - len(mask_suffix)]
            if (other := found_masks.setdefault(stem, path)) is not path:
                raise PackError(f"{other} and {path} have the same stem; a sample has one image and one mask")
    faults = []
    for missing, what, where, cure in (
        (found_images.keys() - found_masks.keys(), "images without a mask", masks,
         guess(found_images.keys(), found_masks.keys(), mask_suffix)),
        (found_masks.keys() - found_images.keys(), "masks without an image", images,
         "" if channel_suffix else guess_channels(found_masks.keys(), found_images.keys())),
    ):  # fmt: skip
        if missing:
            faults.append(f"{len(missing)} {what} of the same stem in {where}: {listed(sorted(missing))}{cure}")
    if faults:
        raise PackError("\n".join(faults) + how_to_convert(others, images))
    pairs = [Pair(stem, found_images[stem], found_masks[stem]) for stem in sorted(found_images)]
    if own := [pair.mask.name for pair in pairs if pair.mask in pair.images and pair.mask.suffix.lower() != ".npz"]:
        raise PackError(
            f"{len(own)} images would be their own masks: {listed(own)}; name the folder of the masks with --masks"
        )
    return pairs, said_of_others(others)


def same_place(one: Path, other: Path) -> bool:
    """Return whether two paths are the same folder."""
    return one.exists() and other.exists() and one.samefile(other)


def split_channel(stem: str, channels: list[str]) -> tuple[str, str]:
    """Return a file's stem without the suffix of its channel, and that suffix; without one, the stem and "".

    Args:
        stem: Stem of the file.
        channels: List of suffixes, or a single one that the others count up from.
    """
    if len(channels) > 1:
        ending = next((each for each in channels if stem.endswith(each)), "")
    else:
        digits = re.search(r"[0-9]+$", channels[0])
        if digits is None:
            return stem, ""
        before = re.escape(channels[0][: digits.start()])
        found = re.search(f"{before}[0-9]{{{len(digits[0])}}}$", stem)
        ending = found[0] if found else ""
    return (stem[: len(stem) - len(ending)], ending) if ending else (stem, "")


def in_order(stem: str, files: dict[str, Path], channels: list[str]) -> tuple[Path, ...]:
    """Return an image's files in the order of its channels.

    Args:
        stem: Stem of the image, for messages.
        files: File of each channel by suffix.
        channels: List of suffixes, or a single one that the others count up from.

    Raises:
        PackError: If a channel is missing, or the suffix does not end in digits.
    """
    if channels == [""]:
        return tuple(files.values())
    wanted = channels
    if len(channels) == 1:
        digits = re.search(r"[0-9]+$", channels[0])
        if digits is None:
            raise PackError(f"channel_suffix is {channels[0]!r}; it must end in digits, or be a list: _red,_green")
        before, first, width = channels[0][: digits.start()], int(digits[0]), len(digits[0])
        wanted = [f"{before}{number:0{width}d}" for number in range(first, first + max(1, len(files)))]
    if missing := [each for each in wanted if each not in files]:
        raise PackError(
            f"image {stem} has no file for {listed(missing)}; there are {listed(sorted(p.name for p in files.values()))}"
        )
    return tuple(files[each] for each in wanted)


def guess(images: Iterable[str], masks: Iterable[str], mask_suffix: str) -> str:
    """Return a hint at the suffix that masks have and images do not, as text for a message; empty without one."""
    few, many = sorted(images)[:200], sorted(masks)[:2000]
    endings = Counter(m[len(i) :] for i in few for m in many if m.startswith(i) and len(m) > len(i))
    endings = Counter({ending: count for ending, count in endings.items() if not re.fullmatch("[0-9]+", ending)})
    if mask_suffix or not endings:
        return ""
    return f"; if mask names continue those of their images: --mask_suffix {endings.most_common(1)[0][0]}"


def guess_channels(masks: Iterable[str], images: Iterable[str]) -> str:
    """Return a hint at the suffix of channels, if images are named like masks plus a number; empty without one."""
    for mask in sorted(masks)[:5]:
        behind = [image[len(mask) :] for image in images if image.startswith(mask)]
        if endings := sorted(each for each in behind if re.fullmatch(r"_[0-9]+", each)):
            return f"; if each channel of an image is a file of its own: --channel_suffix {endings[0]}"
    return ""


def list_files(folder: Path, others: Counter[str]) -> list[Path]:
    """Return the images in a folder, and count other files by kind.

    Args:
        folder: The folder.
        others: Number of other files by kind, which is extended.

    Raises:
        PackError: If the folder does not exist.
    """
    if not folder.is_dir():
        raise PackError(f"{folder} is not a folder")
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.suffix[1:].lower() not in EXTENSIONS:
            others[kind_of(path)] += 1
        elif not path.is_file():
            trouble.passed_over(path, "not a file" if path.exists() else "a link to nothing")
        else:
            files.append(path)
    return files


def said_of_others(others: Counter[str]) -> list[str]:
    """Return a line about skipped files, by kind, or none."""
    if not others:
        return []
    listed_kinds = [f"{count} {kind}" for kind, count in others.most_common(12)]
    more = f" and {len(others) - 12} kinds more" if len(others) > 12 else ""
    return [f"skipped, since they are not {', '.join(EXTENSIONS)}: {', '.join(listed_kinds)}{more}"]


def examine(
    pairs: list[Pair],
    labels: str,
    num_classes: int | None,
    ignore_label: int | None,
    bands: int | None,
    reading: Reading,
    values: Values,
    progress: Progress = no_progress,
) -> tuple[Labels, Reading, list[str]]:
    """Read every pair once, and decide how all are read and what mask values mean.

    Args:
        pairs: The pairs.
        labels: "auto", "binary" or "classes".
        num_classes: Number of classes of the model, or None.
        ignore_label: Mask value that is ignored, or None.
        bands: Number of bands that every image is resampled to, or None.
        reading: How images are read.
        values: How masks are read.
        progress: Wraps the pairs.

    Returns:
        How mask values become labels, how images are read, and lines about what was decided.

    Raises:
        PackError: If files cannot be packed; lists the faults.
    """
    faults: list[str] = []
    survey, seen, values = Survey(), Seen(), replace(values, ignore=ignore_label)
    for pair in progress(pairs, len(pairs)):
        try:
            picture, mask = read_pair(pair)
            with named(pair.images[0]):
                survey.look(pair.stem, picture, mask, reading)
            with named(pair.mask):
                found = values.of(mask)
        except ValueError as error:
            faults.append(str(error))
            continue
        seen.add(pair.mask.name, found, ignore_label)
    faults += survey.faults(reading, bands) + survey.faults_of_resampling(reading, bands)
    faults += survey.faults_of_masks(labels, ignore_label, values)
    reading, values = survey.decided(reading, values)
    try:
        how = decide_labels(seen, labels, num_classes, ignore_label, values)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise PackError(
            "\n".join(faults[:SHOWN] + ([f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []))
        )
    return how, reading, [*survey.notes(reading), *foreground_note(seen.pixels, how.binary)]


def read_samples(
    pairs: list[Pair], how: Labels, reading: Reading, bands: int | None, longest_side: int | None
) -> Iterator[Sample]:
    """Yield the pairs as samples.

    Args:
        pairs: The pairs.
        how: How mask values become labels.
        reading: How images are read.
        bands: Number of bands that every image is resampled to, or None.
        longest_side: Number of pixels to which the longer side of larger images is shrunk, or None.

    Raises:
        PackError: If a file cannot be read; names it.
    """
    for pair in pairs:
        picture, mask = read_pair(pair)
        image = image_of(picture, reading)
        stored = None
        # The image's own file is stored if readers of the shard will see the same image in it.
        if len(pair.images) == 1 and pair.images[0] != pair.mask and is_read_as(picture, image):
            stored = (pair.images[0].suffix[1:].lower(), pair.images[0].read_bytes())
        labels = how.apply(how.values.of(mask))
        # For every WebDataset reader, a key ends at its first dot.
        yield prepared_sample(pair.stem.replace(".", "_"), image, labels, stored, bands, longest_side)


def is_read_as(picture: Picture, image_HWC: np.ndarray) -> bool:
    """Return whether a file is read as the image (H, W, bands) with default options."""
    if not picture.alpha and picture.orientation == 1 and picture.nodata is None and picture.invalid is None:
        return image_HWC.dtype.kind != "f" or not np.isnan(image_HWC).any()
    try:
        default = image_of(picture, Reading(missing=True), image_HWC.shape[2])
    # The image has nan, which only an option declares as no data.
    except ValueError:
        return False
    return default.dtype == image_HWC.dtype and np.array_equal(default, image_HWC, equal_nan=default.dtype.kind == "f")


def read_pair(pair: Pair) -> tuple[Picture, Picture]:
    """Read an image and its mask as their files store them.

    Raises:
        PackError: If a file cannot be read; names it.
    """
    pictures = []
    for path in pair.images:
        with named(path):
            pictures.append(read_image(path.suffix[1:].lower(), path.read_bytes()))
    picture = pictures[0]
    if len(pictures) > 1:
        with named(pair.images[0]):
            picture = stacked(pictures)
    with named(pair.mask):
        return picture, read_mask(pair.mask.suffix[1:].lower(), pair.mask.read_bytes())


def stacked(pictures: list[Picture]) -> Picture:
    """Stack an image's channels into one picture.

    Args:
        pictures: Channels, (H, W) or (H, W, bands) each.

    Raises:
        ValueError: If they differ in size, orientation, no-data value or in whether 0 is white.
    """
    arrays = [image_of(each, Reading("drop", "ignore")) if each.alpha else each.array for each in pictures]
    flat = [array if array.ndim == 3 else array[..., None] for array in arrays]
    if len({array.shape[:2] for array in flat}) > 1:
        raise ValueError(f"has channels of sizes {', '.join(sorted({str(a.shape[:2]) for a in flat}))} (height, width)")
    said = {(each.orientation, each.white_is_zero, each.nodata) for each in pictures}
    if len(said) > 1:
        raise ValueError("has channels that differ in orientation, no-data value or in whether 0 is white")
    return replace(pictures[0], array=np.concatenate(flat, axis=2), alpha=())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Convert a ValueError in a block to a PackError whose message begins with a file's path.

    Raises:
        PackError: If the block raises a ValueError.
    """
    try:
        yield
    except PackError:
        raise
    except ValueError as error:
        raise PackError(f"{path} {error}") from error
