"""Pack images with COCO annotations: pycocotools draws polygons and run-length masks into label masks."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pycocotools.mask

from deepskip.data_shards.decoding import read_image
from deepskip.data_shards.index import Index
from deepskip.data_shards.index_check import CONTROL
from deepskip.data_shards.labels import AS_LABELS, IGNORE_INDEX, SHOWN, listed
from deepskip.data_shards.origin import Origin, numbered
from deepskip.data_shards.pictures import AS_IT_COMES, Picture, Reading, image_of
from deepskip.data_shards.progress import Progress, no_progress, no_word
from deepskip.data_shards.sample import ON_BAD_SAMPLE, Sample
from deepskip.data_shards.sources.folder import is_read_as, named
from deepskip.data_shards.sources.packing import others_in, prepared_sample, write_splits
from deepskip.data_shards.sources.split import PackError, split_stems
from deepskip.data_shards.survey import Survey

BASENAME = "; if they lie there under the last part of their names only: --by_basename"
# Groups of five bits, lowest first, with a bit that says whether more follow; seven groups hold any run.
RUNS = re.compile("(?:[P-o]{0,6}[0-O])+")
# Longest outlines, as a multiple of an image's pixels and additional steps: pycocotools takes memory for every step.
OUTLINE_SHARE, FREE_STEPS = 2, 2**20
# Characters of a category's name.
LONGEST_NAME = 1000
# Number of skipped annotations that a message names.
SKIPPED_SHOWN = 3


@dataclass
class CocoImage:
    """One image of a COCO file.

    Attributes:
        stem: Its path in the folder of images, without the extension.
        path: Path of the file.
        height: Height in pixels, as the COCO file says.
        width: Width in pixels, as the COCO file says.
        annotations: Its annotations.
    """

    stem: str
    path: Path
    height: int
    width: int
    annotations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Return the key of the sample, without dots and slashes, which have a meaning in tar shards."""
        return self.stem.replace("/", "__").replace(".", "_")


def pack_coco(
    images: Path,
    annotations: Path,
    out: Path,
    *,
    categories: list[str] | None = None,
    binary: bool = False,
    split: Path | None = None,
    split_name: str | None = None,
    val_share: float = 0.2,
    seed: int = 0,
    bands: int | None = None,
    longest_side: int | None = None,
    by_basename: bool = False,
    on_bad_annotation: str = "error",
    reading: Reading = AS_IT_COMES,
    samples_per_shard: int = 256,
    tile: int | None = None,
    progress: Progress = no_progress,
    say: Callable[[str], None] = no_word,
    like: Index | None = None,
) -> dict[str, int]:
    """Pack a COCO file and its folder of images into splits.

    Crowd regions are ignored. Where objects overlap, the smaller one is visible.

    Args:
        images: Folder of the images.
        annotations: The COCO file.
        out: Folder to make.
        categories: Names of categories, which become classes 1, 2, ... By default those of `like`; without it all of the
            file in the order of their ids, except one that only groups others.
        binary: Whether all categories become one foreground class; always so if there is only one.
        split: CSV with columns stem,split, as in `pack_folder`.
        split_name: Split that all images go into, since COCO has one file for each split.
        val_share: Share of samples for validation without `split` and `split_name`, 0 to 1.
        seed: Seed of the random split.
        bands: Number of bands that every image is resampled to.
        longest_side: Number of pixels to which the longer side of larger images is shrunk.
        by_basename: Whether images are looked up by the last part of their names.
        on_bad_annotation: "error", or "skip" to skip and list annotations without a valid outline.
        reading: How images are read, as in `pack_folder`.
        samples_per_shard: Number of samples in a shard.
        tile: Side in pixels of the tiles of larger images, and of those of many bands; None stores them in one piece.
        progress: Wraps the images that are examined and written.
        say: Called with each line about what was decided.
        like: Index of samples that have the same classes; by default that of another split in `out`, if there is one.

    Returns:
        Number of samples by split.

    Raises:
        PackError: If the images cannot be packed; lists the faults.
    """
    if like is None and split_name is not None:
        like = next((other for other in others_in(out, [split_name]) if other.origin is not None), None)
    known = tuple(like.classes) if like is not None and not binary else ()
    pictures, classes, numbers, lines = read_coco(images, annotations, categories, by_basename, known)
    by_stem = {picture.stem: picture for picture in pictures}
    num_classes = len(classes) + 1
    binary = binary or num_classes == 2
    if not binary and num_classes > IGNORE_INDEX:
        raise PackError(
            f"{num_classes - 1} categories; a mask holds 254: choose some with --categories, or use --binary"
        )
    stems = split_stems(list(by_stem), split, val_share, seed, split_name)
    alpha, orientation = reading.alpha, reading.orientation
    reading, found = examine(pictures, bands, replace(reading, missing=True), on_bad_annotation, progress)
    for line in [*lines, *found]:
        say(line)
    return write_splits(
        {name: [by_stem[stem] for stem in members] for name, members in stems.items()},
        out,
        lambda members: read_samples(members, numbers, binary, reading, bands, longest_side),
        lambda members: [annotations, *(picture.path for picture in members)],
        (sorted(numbers.items()), binary, reading, on_bad_annotation),
        num_classes=1 if binary else num_classes,
        origin=Origin(alpha=alpha, orientation=orientation, classes=classes),
        bands=bands,
        longest_side=longest_side,
        nodata=reading.nodata,
        samples_per_shard=samples_per_shard,
        tile=tile,
        progress=progress,
        say=say,
    )


def read_coco(
    images: Path, annotations: Path, categories: list[str] | None, by_basename: bool, known: tuple[str, ...] = ()
) -> tuple[list[CocoImage], tuple[str, ...], dict[int, int], list[str]]:
    """Read a COCO file.

    Args:
        images: Folder of the images.
        annotations: The COCO file.
        categories: Names of categories, or None for `known`, or without these for all.
        by_basename: Whether images are looked up by the last part of their names.
        known: Names of the data set's classes, of which the file may have fewer; () if they are not known.

    Returns:
        The images with their annotations, the names of the classes 1, 2, ..., the label of each category id, and lines about
        what was decided.

    Raises:
        PackError: If the file is not valid, or images or categories are missing; lists the faults.
    """
    try:
        raw = json.loads(annotations.read_text(encoding="utf-8-sig"))
        names = {entry["id"]: plain(entry["name"]) for entry in raw["categories"]}
        found = {
            entry["id"]: CocoImage(
                stem_of(entry["file_name"], by_basename), path_of(images, entry["file_name"], by_basename),
                whole(entry["height"]), whole(entry["width"]),
            )
            for entry in raw["images"]
        }  # fmt: skip
        objects = [(entry["image_id"], entry["category_id"], entry) for entry in raw["annotations"]]
        # An id that is a list cannot be looked up.
        hash(tuple(image for image, _, _ in objects))
        if odd_crowds := [entry.get("id") for _, _, entry in objects if entry.get("iscrowd") not in (None, 0, 1)]:
            raise ValueError(f"iscrowd is neither 0 nor 1 in annotations {listed(list(map(str, odd_crowds)))}")
        ordered = [names[key] for key in sorted(names)]
        escaping = [] if by_basename else [e["file_name"] for e in raw["images"] if not is_inside(e["file_name"])]
        roots = root_categories(raw["categories"], {category for _, category, _ in objects})
    except FileNotFoundError as error:
        raise PackError(f"{annotations} does not exist") from error
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise PackError(f"{annotations} is not a COCO file of objects: {error!r}") from error
    faults = []
    if escaping:
        faults.append(f"file names that lead out of {images}: {listed(escaping)}{BASENAME}")
    for what, given, kept in (("images", raw["images"], found), ("categories", raw["categories"], names)):
        if len(given) != len(kept):
            faults.append(f"{len(given) - len(kept)} {what} have the same id as another")
    wanted = categories if categories is not None else list(known) or [name for name in ordered if name not in roots]
    if not wanted or len(set(wanted)) != len(wanted):
        faults.append(f"there must be at least one category, and each only once: {listed(wanted)}")
    used = {names[category] for _, category, _ in objects if category in names}
    if categories is None and known and (others := sorted(used - set(known))):
        faults.append(
            f"the data set has the classes {numbered(known)}, and {annotations} has objects of others: {listed(others)}; "
            f"to skip those: --categories '{','.join(known)}'"
        )
    here = set(names.values())
    # A file need not have all classes of the data set, but one of them.
    if unknown := [
        name for name in wanted if name not in here and (name not in known or (used and not here & {*wanted}))
    ]:
        faults.append(f"unknown categories: {listed(unknown)}; there are {listed(sorted(names.values()))}")
    if missing := [str(p.path.name) for p in found.values() if not escaping and not p.path.is_file()]:
        cure = "" if by_basename else BASENAME
        faults.append(f"{len(missing)} images are not in {images}: {listed(sorted(missing))}{cure}")
    if lost := sorted({str(entry.get("id")) for image, _, entry in objects if image not in found}):
        faults.append(f"{len(lost)} annotations of images that {annotations} does not have: {listed(lost)}")
    if odd := sorted({str(category) for _, category, _ in objects if category not in names}):
        faults.append(f"annotations of category ids that {annotations} does not have: {listed(odd)}")
    keys = Counter(picture.key for picture in found.values())
    if twice := sorted(key for key, count in keys.items() if count > 1):
        faults.append(f"files that would have the same key: {listed(twice)}")
    if not found:
        faults.append(f"{annotations} has no images")
    if faults:
        raise PackError("\n".join(faults))
    numbers = {key: wanted.index(name) + 1 for key, name in names.items() if name in wanted}
    for image, category, entry in objects:
        if category in numbers:
            found[image].annotations.append(entry)
    lines = []
    if len(wanted) > 1:
        lines.append(f"classes: {listed([f'{number} {name}' for number, name in enumerate(wanted, 1)])}")
    if categories is None and roots:
        lines.append(f"skipped, since it only groups others and has no annotations: category {listed(roots)}")
    if empty := [name for key, name in names.items() if key in numbers and all(c != key for _, c, _ in objects)]:
        lines.append(f"categories without annotations here, which still become classes: {listed(empty)}")
    return list(found.values()), tuple(wanted), numbers, lines


def root_categories(categories: list[dict[str, Any]], used: set[int]) -> list[str]:
    """Return the names of categories that have no annotations and that other categories name as their supercategory.

    Args:
        categories: The categories of the COCO file.
        used: Ids of categories that have annotations.
    """
    above = {entry.get("supercategory") for entry in categories if entry.get("supercategory") != entry["name"]}
    return [entry["name"] for entry in categories if entry["name"] in above and entry["id"] not in used]


def plain(name: Any) -> str:
    """Return the name of a category without control characters, and "unnamed" for an empty one.

    Raises:
        TypeError: If it is not a text.
    """
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is not a name")
    return CONTROL.sub(" ", name)[:LONGEST_NAME] or "unnamed"


def whole(value: Any) -> int:
    """Return a size as an integer; some tools write 64.0.

    Raises:
        ValueError: If it is not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"size {value!r} is not a whole number")
    return int(value)


def path_of(images: Path, name: str, by_basename: bool) -> Path:
    """Return the path of an image.

    Args:
        images: Folder of the images.
        name: Name of the image in the COCO file.
        by_basename: Whether only the last part of the name counts. If there is no such file, the code that Label Studio puts
            before names is removed.
    """
    if not by_basename:
        return images / name
    last = PurePosixPath(name.replace("\\", "/")).name
    found = images / last
    uploaded = re.fullmatch("[0-9a-f]{8}-(.+)", last)
    return images / uploaded[1] if uploaded and not found.is_file() else found


def stem_of(name: str, by_basename: bool) -> str:
    """Return an image's name without its extension, and with `by_basename` also without its folders."""
    path = PurePosixPath(name.replace("\\", "/") if by_basename else name)
    return path.stem if by_basename else str(path.with_suffix(""))


def is_inside(name: str) -> bool:
    """Return whether a relative path stays inside its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_samples(
    pictures: list[CocoImage],
    numbers: dict[int, int],
    binary: bool,
    reading: Reading,
    bands: int | None,
    longest_side: int | None,
) -> Iterator[Sample]:
    """Yield images as samples.

    Args:
        pictures: The images.
        numbers: Label of each category id.
        binary: Whether all categories become label 1.
        reading: How images are read.
        bands: Number of bands that every image is resampled to, or None.
        longest_side: Number of pixels to which the longer side of larger images is shrunk, or None.

    Raises:
        PackError: If a file cannot be read; names it.
    """
    for picture in pictures:
        extension, contents = picture.path.suffix[1:].lower(), picture.path.read_bytes()
        with named(picture.path):
            stored = read_image(extension, contents)
            image = image_of(stored, reading)
            mask = draw(picture, numbers, binary)
        kept = (extension, contents) if is_read_as(stored, image) else None
        yield prepared_sample(picture.key, image, mask, kept, bands, longest_side)


def examine(
    pictures: list[CocoImage], bands: int | None, reading: Reading, on_bad_annotation: str, progress: Progress
) -> tuple[Reading, list[str]]:
    """Read every image once, and decide how all are read.

    With on_bad_annotation "skip", annotations without a valid outline are removed from the images.

    Args:
        pictures: The images.
        bands: Number of bands that every image is resampled to, or None.
        reading: How images are read.
        on_bad_annotation: "error" or "skip".
        progress: Wraps the images.

    Returns:
        How images are read, and lines about what was decided.

    Raises:
        PackError: If images or annotations cannot be used; lists the faults.
    """
    if on_bad_annotation not in ON_BAD_SAMPLE:
        raise PackError(f"on_bad_annotation is {on_bad_annotation!r}; it must be one of {', '.join(ON_BAD_SAMPLE)}")
    survey, faults, bad = Survey(), [], []
    for picture in progress(pictures, len(pictures)):
        try:
            with named(picture.path):
                stored = read_image(picture.path.suffix[1:].lower(), picture.path.read_bytes())
                drawn = Picture(np.broadcast_to(np.False_, (picture.height, picture.width)))
                survey.look(picture.stem, stored, drawn, reading)
        except PackError as error:
            faults.append(str(error))
            continue
        whole_ones = []
        for entry in picture.annotations:
            try:
                region_of(entry, picture)
                whole_ones.append(entry)
            except ValueError as error:
                bad.append(f"{picture.path} {error}")
        picture.annotations = whole_ones
    faults += survey.faults(reading, bands) + survey.faults_of_resampling(reading, bands)
    if bad and on_bad_annotation == "error":
        faults += [*bad[:SHOWN], f"{len(bad)} annotations have no valid outline; --on_bad_annotation skip skips them"]
    if faults:
        raise PackError("\n".join(faults[-2 * SHOWN :]))
    reading, _ = survey.decided(reading, AS_LABELS)
    lines = [
        f"skipped {len(bad)} annotations: {'; '.join(bad[:SKIPPED_SHOWN])}{' ...' * (len(bad) > SKIPPED_SHOWN)}"
    ] * bool(bad)
    return reading, [*lines, *survey.notes(reading)]


def region_of(entry: dict[str, Any], picture: CocoImage) -> Any:
    """Return pycocotools' run lengths of an annotation.

    Raises:
        ValueError: If it has no valid outline; names the annotation.
    """
    try:
        return decode_region(entry.get("segmentation"), picture.height, picture.width)
    # pycocotools raises errors of many kinds for invalid regions.
    except Exception as error:
        raise ValueError(f"has annotation {entry.get('id')} that is not a region: {error}") from error


def draw(picture: CocoImage, numbers: dict[int, int], binary: bool) -> np.ndarray:
    """Draw an image's annotations into labels (height, width) uint8.

    Args:
        picture: The image.
        numbers: Label of each category id.
        binary: Whether all categories become label 1.

    Raises:
        ValueError: If an annotation has no valid outline; names it.
    """
    size = picture.height, picture.width
    crowd = np.zeros(size, bool)
    # Objects are kept as run lengths: a mask for each object of a large picture would take too much memory.
    objects: list[tuple[int, Any, int]] = []
    for entry in picture.annotations:
        region = region_of(entry, picture)
        if entry.get("iscrowd"):
            crowd |= pycocotools.mask.decode(region).astype(bool)
        else:
            area = int(pycocotools.mask.area(region))
            objects.append((area, region, 1 if binary else numbers[entry["category_id"]]))
    mask = np.where(crowd, IGNORE_INDEX, 0).astype(np.uint8)
    # Large objects first, so that small ones stay visible.
    for _, region, label in sorted(objects, key=lambda item: -item[0]):
        mask[pycocotools.mask.decode(region).astype(bool)] = label
    return mask


def decode_region(segmentation: Any, height: int, width: int) -> Any:
    """Return pycocotools' run lengths of polygons, or of run lengths, compressed or not.

    Args:
        segmentation: The "segmentation" of a COCO annotation.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Raises:
        ValueError: If it is not a valid region of an image of this size.
    """
    size = [height, width]
    if isinstance(segmentation, dict):
        if list(map(whole, segmentation["size"])) != size:
            raise ValueError(f"its size is {segmentation['size']}, but its image has {size}")
        counts = segmentation["counts"]
        lengths = run_lengths(counts) if isinstance(counts, str) else counts
        # If the runs end early, pycocotools returns uninitialised memory.
        if min(lengths, default=0) < 0 or sum(lengths) != height * width:
            raise ValueError(f"its runs are negative or cover {sum(lengths)} pixels of {height * width}")
        return segmentation if lengths is not counts else pycocotools.mask.frPyObjects(segmentation, height, width)
    if not segmentation:
        raise ValueError("it has no outline, only a box")
    # A single polygon that is not in a list.
    if isinstance(segmentation, list) and all(isinstance(value, int | float) for value in segmentation):
        segmentation = [segmentation]
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        raise ValueError("a polygon needs x, y of at least three points")
    # pycocotools takes memory for every step along an outline: a distant point or nan would take all of it.
    far = 2 * max(size)
    if not all(-far <= value <= far for value in chain.from_iterable(segmentation)):
        raise ValueError(f"it has points far outside its image of {height} x {width}")
    steps = sum(map(outline_length, segmentation))
    if steps > OUTLINE_SHARE * height * width + FREE_STEPS:
        raise ValueError(f"its outlines are {steps:.0f} pixels long in an image of {height} x {width}")
    polygons = pycocotools.mask.frPyObjects(segmentation, height, width)
    return pycocotools.mask.merge(polygons)


def outline_length(polygon: list[float]) -> float:
    """Compute the length of a polygon's outline in pixels, along rows and columns."""
    points = np.asarray(polygon, float).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).sum())


def run_lengths(text: str) -> list[int]:
    """Decode COCO's compressed run lengths, so that they can be checked before pycocotools uses them.

    Raises:
        ValueError: If the text is cut off or has an invalid character.
    """
    if not RUNS.fullmatch(text):
        raise ValueError("its compressed runs are cut off or hold an invalid character")
    lengths: list[int] = []
    value = shift = 0
    for byte in text.encode():
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        # From the fourth run on, values are differences to the run before the last.
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return lengths
