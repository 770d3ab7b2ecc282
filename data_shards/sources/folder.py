"""Packs a folder of images and a folder of masks, paired by file stem."""

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
from deepskip.data_shards.pictures import AS_IT_COMES, Picture, Reading, image_of
from deepskip.data_shards.progress import Progress, no_progress, no_word
from deepskip.data_shards.sample import EXTENSIONS, Sample
from deepskip.data_shards.sources.elsewhere import how_to_convert, kind_of
from deepskip.data_shards.sources.packing import prepared_sample, write_splits
from deepskip.data_shards.sources.split import PackError, split_stems
from deepskip.data_shards.survey import Survey, foreground_note


@dataclass(frozen=True)
class Pair:
    """An image's files, one or a channel each, and its mask file; one .npz may be both."""

    stem: str
    images: tuple[Path, ...]
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
    channel_suffix: str = "",
    reading: Reading = AS_IT_COMES,
    values: Values = AS_LABELS,
    samples_per_shard: int = 256,
    progress: Progress = no_progress,
    say: Callable[[str], None] = no_word,
) -> dict[str, int]:
    """Packs images and masks into out/train, out/val and, where the split has one, out/test; gives samples by split.

    split: CSV with columns stem,split; without one, val_share of the images, drawn from seed, are for validation.
    labels: "binary" (anything but 0 is foreground), "classes" (values are labels), "auto" (binary where the masks hold a
    single value beside 0). num_classes: as the model's; found from the masks by default. ignore_label: mask value that takes
    no part. bands, longest_side: what every image is brought to. mask_suffix: what mask stems end with beyond the image's.
    channel_suffix: what the files of an image's channels end with: "_0000" for that and those that count up from it, or a list
    "_red,_green". reading, values: how images and masks are read. progress: wraps what is gone through. say: is told what was
    done, a line for each group of files. Splits that were packed from the same files are left as they are. Raises PackError.
    """
    pairs, lines = pair_files(images, masks, mask_suffix, channel_suffix)
    by_stem = {pair.stem: pair for pair in pairs}
    stems = split_stems(list(by_stem), split, val_share, seed)
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
        bands=bands,
        longest_side=longest_side,
        nodata=reading.nodata,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )


def pair_files(
    images: Path, masks: Path, mask_suffix: str = "", channel_suffix: str = ""
) -> tuple[list[Pair], list[str]]:
    """Pairs the files of two folders by stem, and says what else lies there; raises PackError for what has no other half."""
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
    return pairs, said_of_others(others)


def same_place(one: Path, other: Path) -> bool:
    """Says whether two paths are of one folder."""
    return one.exists() and other.exists() and one.samefile(other)


def split_channel(stem: str, channels: list[str]) -> tuple[str, str]:
    """Gives a file's stem without the ending of its channel, and that ending; of others the stem and nothing."""
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
    """Puts an image's files in the order of its channels; raises PackError where one is missing."""
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
    """Names the ending that masks have and images have not, where there is one."""
    few, many = sorted(images)[:200], sorted(masks)[:2000]
    endings = Counter(m[len(i) :] for i in few for m in many if m.startswith(i) and len(m) > len(i))
    endings = Counter({ending: count for ending, count in endings.items() if not re.fullmatch("[0-9]+", ending)})
    if mask_suffix or not endings:
        return ""
    return f"; where masks are called by their images: --mask_suffix {endings.most_common(1)[0][0]}"


def guess_channels(masks: Iterable[str], images: Iterable[str]) -> str:
    """Names the ending of channels where an image's files are those of a mask with numbers behind."""
    for mask in sorted(masks)[:5]:
        behind = [image[len(mask) :] for image in images if image.startswith(mask)]
        if endings := sorted(each for each in behind if re.fullmatch(r"_[0-9]+", each)):
            return f"; where an image's channels are files of their own: --channel_suffix {endings[0]}"
    return ""


def list_files(folder: Path, others: Counter[str]) -> list[Path]:
    """Lists the images of a folder, and counts what else is there by its kind; raises PackError for a missing folder."""
    if not folder.is_dir():
        raise PackError(f"{folder} is no folder")
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.suffix[1:].lower() not in EXTENSIONS:
            others[kind_of(path)] += 1
        elif not path.is_file():
            trouble.passed_over(path, "no file" if path.exists() else "a link to nothing")
        else:
            files.append(path)
    return files


def said_of_others(others: Counter[str]) -> list[str]:
    """Says what was left out, by kind."""
    if not others:
        return []
    listed_kinds = [f"{count} {kind}" for kind, count in others.most_common(12)]
    more = f" and {len(others) - 12} kinds more" if len(others) > 12 else ""
    return [f"left out, since they are none of {', '.join(EXTENSIONS)}: {', '.join(listed_kinds)}{more}"]


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
    """Reads every pair once and decides how all are read and what mask values mean; says so in lines.

    Raises PackError that lists all that cannot be packed.
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
    faults += survey.faults(reading, bands) + survey.faults_of_masks(labels, ignore_label, values)
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
    """Yields the pairs as samples, brought to `bands` and `longest_side`."""
    for pair in pairs:
        picture, mask = read_pair(pair)
        image = image_of(picture, reading)
        stored = None
        # its own file goes in where whoever reads it sees the same
        if len(pair.images) == 1 and pair.images[0] != pair.mask and is_read_as(picture, image):
            stored = (pair.images[0].suffix[1:].lower(), pair.images[0].read_bytes())
        labels = how.apply(how.values.of(mask))
        # a dot in a key would end it, for every WebDataset reader
        yield prepared_sample(pair.stem.replace(".", "_"), image, labels, stored, bands, longest_side)


def is_read_as(picture: Picture, image_HWC: np.ndarray) -> bool:
    """Says whether a file is read as this image where nothing is said of how to read it."""
    if not picture.alpha and picture.orientation == 1 and picture.nodata is None:
        return image_HWC.dtype.kind != "f" or not np.isnan(image_HWC).any()
    try:
        default = image_of(picture, Reading(missing=True), image_HWC.shape[2])
    # of nan that only an option names
    except ValueError:
        return False
    return default.dtype == image_HWC.dtype and np.array_equal(default, image_HWC, equal_nan=default.dtype.kind == "f")


def read_pair(pair: Pair) -> tuple[Picture, Picture]:
    """Reads an image and its mask as their files have them; raises PackError that names the file."""
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
    """Makes one picture of an image's channels; raises ValueError where they do not fit each other."""
    arrays = [image_of(each, Reading("drop", "ignore")) if each.alpha else each.array for each in pictures]
    flat = [array if array.ndim == 3 else array[..., None] for array in arrays]
    if len({array.shape[:2] for array in flat}) > 1:
        raise ValueError(f"has channels of sizes {', '.join(sorted({str(a.shape[:2]) for a in flat}))} (height, width)")
    said = {(each.orientation, each.white_is_zero, each.nodata) for each in pictures}
    if len(said) > 1:
        raise ValueError("has channels that differ in orientation, nodata value or in whether 0 is white")
    return replace(pictures[0], array=np.concatenate(flat, axis=2), alpha=())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Puts a file's name before what is said to be wrong with it in a block, as a PackError."""
    try:
        yield
    except PackError:
        raise
    except ValueError as error:
        raise PackError(f"{path} {error}") from error
