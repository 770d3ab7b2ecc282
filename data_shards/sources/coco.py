"""Packs images with COCO annotations: polygons and run-length masks become label masks, by pycocotools."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pycocotools.mask

from deepskip.data_shards.decoding import decode_image
from deepskip.data_shards.labels import IGNORE_INDEX, listed
from deepskip.data_shards.progress import Progress, no_progress
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.sources.packing import prepared_sample, write_splits
from deepskip.data_shards.sources.split import SPLITS, PackError, split_stems

# groups of five bits, low ones first, a bit that says whether more follow; seven of them hold any run
RUNS = re.compile("(?:[P-o]{0,6}[0-O])+")
# outlines may be as long as so many of an image's pixels, and some: pycocotools takes memory for every step
OUTLINE_SHARE, FREE_STEPS = 2, 2**20


@dataclass
class Picture:
    """An image of the file, and its annotations; its stem is the path in the folder without the ending."""

    stem: str
    path: Path
    height: int
    width: int
    annotations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Gives the sample's key, in which dots and slashes would have a meaning."""
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
    samples_per_shard: int = 256,
    progress: Progress = no_progress,
) -> dict[str, int]:
    """Packs a COCO file and its folder of images into splits of `out`; gives samples by split.

    categories: names, as classes 1, 2, ... (by default all of the file, in the order of their ids). binary: all of them are
    one foreground; so they are where there is only one. split_name: all goes into that split, for COCO has a file a split;
    else by `split` or at random, as in pack_folder. Crowd regions take no part; where objects overlap the smaller one shows.
    Raises PackError.
    """
    if split_name is not None and (split is not None or split_name not in SPLITS):
        raise PackError(
            f"split_name is {split_name!r}; it must be one of {', '.join(SPLITS)}, and without a split file"
        )
    pictures, numbers = read_coco(images, annotations, categories)
    by_stem = {picture.stem: picture for picture in pictures}
    num_classes = max(numbers.values()) + 1
    binary = binary or num_classes == 2
    if not binary and num_classes > IGNORE_INDEX:
        raise PackError(
            f"{num_classes - 1} categories; a mask holds 254, name those to take or make all one foreground"
        )
    stems = {split_name: list(by_stem)} if split_name else split_stems(list(by_stem), split, val_share, seed)
    return write_splits(
        {name: [by_stem[stem] for stem in members] for name, members in stems.items()},
        out,
        lambda members: read_samples(members, numbers, binary, bands, longest_side),
        lambda members: [annotations, *(picture.path for picture in members)],
        (sorted(numbers.items()), binary),
        num_classes=1 if binary else num_classes,
        bands=bands,
        longest_side=longest_side,
        samples_per_shard=samples_per_shard,
        progress=progress,
    )


def read_coco(images: Path, annotations: Path, categories: list[str] | None) -> tuple[list[Picture], dict[int, int]]:
    """Reads a COCO file: its pictures with their annotations, and the label of each category id; raises PackError."""
    try:
        raw = json.loads(annotations.read_text())
        names = {entry["id"]: entry["name"] for entry in raw["categories"]}
        found = {
            entry["id"]: Picture(
                str(PurePosixPath(entry["file_name"]).with_suffix("")),
                images / entry["file_name"], entry["height"], entry["width"],
            )
            for entry in raw["images"]
        }  # fmt: skip
        objects = [
            (entry["image_id"], entry["category_id"], entry["segmentation"], entry) for entry in raw["annotations"]
        ]
        ordered = [names[key] for key in sorted(names)]
        escaping = [e["file_name"] for e in raw["images"] if not is_inside(e["file_name"])]
    except FileNotFoundError as error:
        raise PackError(f"{annotations} does not exist") from error
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackError(f"{annotations} is no COCO file of objects: {error!r}") from error
    faults = []
    if escaping:
        faults.append(f"file names that lead out of {images}: {listed(escaping)}")
    for what, given, kept in (("images", raw["images"], found), ("categories", raw["categories"], names)):
        if len(given) != len(kept):
            faults.append(f"{len(given) - len(kept)} {what} have the id of another")
    wanted = categories if categories is not None else ordered
    if not wanted or len(set(wanted)) != len(wanted):
        faults.append(f"categories must be at least one, and each once: {listed(wanted)}")
    if unknown := [name for name in wanted if name not in names.values()]:
        faults.append(f"no such categories: {listed(unknown)}; there are {listed(sorted(names.values()))}")
    if missing := [str(p.path.name) for p in found.values() if not escaping and not p.path.is_file()]:
        faults.append(f"{len(missing)} images are not in {images}: {listed(sorted(missing))}")
    if lost := sorted({str(entry.get("id")) for image, _, _, entry in objects if image not in found}):
        faults.append(f"{len(lost)} annotations of images that {annotations} does not have: {listed(lost)}")
    if odd := sorted({str(category) for _, category, _, _ in objects if category not in names}):
        faults.append(f"annotations of category ids that {annotations} does not have: {listed(odd)}")
    keys = Counter(picture.key for picture in found.values())
    if twice := sorted(key for key, count in keys.items() if count > 1):
        faults.append(f"files that would have the same key: {listed(twice)}")
    if not found:
        faults.append(f"{annotations} has no images")
    if faults:
        raise PackError("\n".join(faults))
    numbers = {key: wanted.index(name) + 1 for key, name in names.items() if name in wanted}
    for image, category, _, entry in objects:
        if category in numbers:
            found[image].annotations.append(entry)
    return list(found.values()), numbers


def is_inside(name: str) -> bool:
    """Says whether a relative path stays in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_samples(
    pictures: list[Picture], numbers: dict[int, int], binary: bool, bands: int | None, longest_side: int | None
) -> Iterator[Sample]:
    """Yields pictures as samples, brought to `bands` and `longest_side`; raises PackError that names the file."""
    first = 0
    for picture in pictures:
        extension = picture.path.suffix[1:].lower()
        contents = picture.path.read_bytes()
        try:
            image = decode_image(extension, contents)
            if image.shape[:2] != (picture.height, picture.width):
                raise ValueError(
                    f"is {image.shape[0]} x {image.shape[1]} (height x width), "
                    f"its annotations {picture.height} x {picture.width}"
                )
            first = first or image.shape[2]
            if bands is None and image.shape[2] != first:
                raise ValueError(
                    f"has {image.shape[2]} bands, those before it {first}; bring all to one with --bands N"
                )
            mask = draw(picture, numbers, binary)
        except ValueError as error:
            raise PackError(f"{picture.path} {error}") from error
        yield prepared_sample(picture.key, image, mask, (extension, contents), bands, longest_side)


def draw(picture: Picture, numbers: dict[int, int], binary: bool) -> np.ndarray:
    """Draws a picture's annotations into labels (height, width) uint8; raises ValueError that names the annotation."""
    size = picture.height, picture.width
    crowd = np.zeros(size, bool)
    # run lengths, since a mask of each object of a large picture would take all memory
    objects: list[tuple[int, Any, int]] = []
    for entry in picture.annotations:
        try:
            region = decode_region(entry["segmentation"], *size)
        # pycocotools has errors of many kinds for what is no region
        except Exception as error:
            raise ValueError(f"has annotation {entry.get('id')} that is no region: {error}") from error
        if entry.get("iscrowd"):
            crowd |= pycocotools.mask.decode(region).astype(bool)
        else:
            area = int(pycocotools.mask.area(region))
            objects.append((area, region, 1 if binary else numbers[entry["category_id"]]))
    mask = np.where(crowd, IGNORE_INDEX, 0).astype(np.uint8)
    # large ones first: small objects are the point
    for _, region, label in sorted(objects, key=lambda item: -item[0]):
        mask[pycocotools.mask.decode(region).astype(bool)] = label
    return mask


def decode_region(segmentation: Any, height: int, width: int) -> Any:
    """Makes pycocotools' run lengths of polygons, or of run lengths compressed or not; raises ValueError."""
    size = [height, width]
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != size:
            raise ValueError(f"of size {segmentation['size']}, its image {size}")
        counts = segmentation["counts"]
        lengths = run_lengths(counts) if isinstance(counts, str) else counts
        # pycocotools returns whatever lay in memory where the runs end early
        if min(lengths, default=0) < 0 or sum(lengths) != height * width:
            raise ValueError(f"its runs are negative or cover {sum(lengths)} pixels of {height * width}")
        return segmentation if lengths is not counts else pycocotools.mask.frPyObjects(segmentation, height, width)
    if not segmentation:
        raise ValueError("it has no outline, only a box")
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        raise ValueError("a polygon is x, y of at least three points")
    # pycocotools takes memory for every step along an outline: a point far away or nan takes all there is
    far = 2 * max(size)
    if not all(-far <= value <= far for value in chain.from_iterable(segmentation)):
        raise ValueError(f"it has points far outside its image of {height} x {width}")
    steps = sum(map(outline_length, segmentation))
    if steps > OUTLINE_SHARE * height * width + FREE_STEPS:
        raise ValueError(f"its outlines are {steps:.0f} pixels long in an image of {height} x {width}")
    polygons = pycocotools.mask.frPyObjects(segmentation, height, width)
    return pycocotools.mask.merge(polygons)


def outline_length(polygon: list[float]) -> float:
    """Computes the length of a polygon's outline in pixels, along rows and columns."""
    points = np.asarray(polygon, float).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).sum())


def run_lengths(text: str) -> list[int]:
    """Reads COCO's compressed run lengths, to check them before pycocotools trusts them; raises ValueError."""
    if not RUNS.fullmatch(text):
        raise ValueError("its compressed runs are cut off or hold a strange character")
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
        # from the fourth on they are differences to the one before the last
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return lengths
