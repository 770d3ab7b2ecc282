"""Packs the comparison's categories into one small file each: python -m jobs.comparison.data --data FOLDER --to FOLDER.

A category is a folder of images/ and masks/, or of .npz cubes, with a split.csv that is kept as it is. Every image is brought
to squares of one size, so that all networks see the same pixels and a step has one shape.
"""

import io
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser
from PIL import Image
from tqdm import tqdm

from data_shards.labels import IGNORE_INDEX
from data_shards.sample import band_statistics, resample_bands
from data_shards.sources.coins import coins
from data_shards.sources.folder import Pair, list_files, pair_files, read_pair
from data_shards.sources.split import PackError, split_stems
from deepskip import files
from jobs.settings import stop

SPLITS = ("train", "val", "test")
COINS = "coins"
COINS_SIZE = 128
COINS_SAMPLES = {"train": 256, "val": 48, "test": 48}
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Rule:
    """How a category's images become squares.

    parts: rows and columns that an image is cut into first, for objects that would vanish in the whole. bands: what cubes are
    brought to. padded_to: where given, parts of at most that many pixels a side are padded to it, without resampling;
    what is padded is ignored.
    """

    parts: tuple[int, int] = (1, 1)
    bands: int | None = None
    padded_to: int | None = None


RULES = {
    # an exudate of 270 pixels, of 4288 x 2848, is left with 35
    "pathology": Rule(parts=(4, 6)),
    # scenes of 80 to 150 pixels a side, of six band counts
    "hyperspectral": Rule(bands=32, padded_to=112),
}
PLAIN = Rule()

# key, image (size, size, bands), mask (size, size) of 0, 1 and IGNORE_INDEX
Square = tuple[str, np.ndarray, np.ndarray]


def pack(category: str, source: Path | None, out: Path, size: int, rule: Rule, most: int | None = None) -> Path:
    """Writes a category's file CATEGORY.npz into `out`, whole or not at all, and gives its path.

    source: the category's folder; None for the built-in coins. size: height and width of the squares, in pixels. most: images
    of a split, None for all. The same input gives the same bytes. Raises PackError.
    """
    if source is None:
        found = {
            split: [(key, *resized(image, mask, size)) for key, image, mask in coins(split, count, size=COINS_SIZE)]
            for split, count in ((split, min(count, most or count)) for split, count in COINS_SAMPLES.items())
        }
    else:
        pairs = {pair.stem: pair for pair in pairs_of(source)}
        stems = split_stems(list(pairs), source / "split.csv", 0.0, 0)
        found = {}
        for split in SPLITS:
            members = tqdm(stems.get(split, [])[:most], desc=f"{category}, {split}", disable=not sys.stderr.isatty())
            found[split] = [square for stem in members for square in squares(*read(pairs[stem]), size, rule, stem)]
            if not found[split]:
                raise PackError(
                    f"{source / 'split.csv'} has no {split} samples; a comparison needs {', '.join(SPLITS)}"
                )
    every = [square for split in SPLITS for square in found[split]]
    bands = {image.shape[2] for _, image, _ in every}
    if bands == {1, 3}:
        # grey among colour
        every = [(key, resample_bands(image, 3), mask) for key, image, mask in every]
    elif len(bands) > 1:
        raise PackError(
            f"{source} has images of {', '.join(map(str, sorted(bands)))} bands; a rule must bring them to one"
        )
    path = out / f"{category}.npz"
    files.write(path, encode(every, [split for split in SPLITS for _ in found[split]]))
    return path


def pairs_of(folder: Path) -> list[Pair]:
    """Finds a category's images and masks: two folders, or .npz files that hold both; raises PackError."""
    if (folder / "images").is_dir():
        return pair_files(folder / "images", folder / "masks")
    return [Pair(stem, path, path) for stem, path in sorted(list_files(folder, "").items())]


def read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image (H, W, bands) and its mask (H, W) of 0 and 1; raises PackError that names the file."""
    image, mask = read_pair(pair)
    if image.shape[:2] != mask.shape:
        raise PackError(f"{pair.mask} is {mask.shape[0]} x {mask.shape[1]} pixels, its image {image.shape[:2]}")
    return image, (mask != 0).astype(np.uint8)


def squares(image_HWC: np.ndarray, mask_HW: np.ndarray, size: int, rule: Rule, stem: str) -> list[Square]:
    """Cuts an image and its mask as the rule says and brings each part to its square."""
    H, W, _ = image_HWC.shape
    rows, columns = rule.parts
    side = rule.padded_to
    if side is not None:
        rows, columns = -(-H // side), -(-W // side)
        image_HWC = normalised(resample_bands(image_HWC.astype(np.float32), rule.bands or image_HWC.shape[2]))
    found = []
    for r in range(rows):
        for c in range(columns):
            window = (slice(r * H // rows, (r + 1) * H // rows), slice(c * W // columns, (c + 1) * W // columns))
            image, mask = image_HWC[window], mask_HW[window]
            if side is None:
                image, mask = resized(image, mask, size)
            else:
                image, mask = padded(image, mask, side)
            found.append((stem if rows * columns == 1 else f"{stem}-{r}-{c}", image, mask))
    return found


def normalised(image_HWC: np.ndarray) -> np.ndarray:
    """Brings each band to mean 0 and deviation 1 in fp16, in which the sensors' own values would not fit."""
    mean, deviation = band_statistics(image_HWC)
    return ((image_HWC - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float16)


def resized(image_HWC: np.ndarray, mask_HW: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Brings 8-bit images to size x size: by an antialiased triangle filter, a mask by half of its area."""
    triangle = Image.Resampling.BILINEAR
    image = np.stack([np.asarray(Image.fromarray(band).resize((size, size), triangle))
                      for band in np.moveaxis(image_HWC, 2, 0)], axis=-1)  # fmt: skip
    cover = Image.fromarray(mask_HW.astype(np.float32)).resize((size, size), triangle)
    return image, (np.asarray(cover) >= 0.5).astype(np.uint8)


def padded(image_HWC: np.ndarray, mask_HW: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads to side x side below and on the right: the image by its edge, the mask by IGNORE_INDEX."""
    below = ((0, side - len(mask_HW)), (0, side - mask_HW.shape[1]))
    return np.pad(image_HWC, (*below, (0, 0)), "edge"), np.pad(mask_HW, below, constant_values=IGNORE_INDEX)


def encode(every: list[Square], splits: list[str]) -> bytes:
    """Gives the bytes of a category's file: JPEG for 8 bits, else fp16; masks deflated."""
    masks = np.stack([mask for _, _, mask in every])
    arrays = {
        "keys": np.array([key for key, _, _ in every]),
        "splits": np.array(splits),
        "masks": np.frombuffer(zlib.compress(masks.tobytes(), 9), np.uint8),
        "shape": np.array([*masks.shape, every[0][1].shape[2]]),
    }
    if every[0][1].dtype == np.uint8:
        pictures = [jpeg(image) for _, image, _ in every]
        arrays["lengths"] = np.array([len(picture) for picture in pictures])
        arrays["images"] = np.frombuffer(b"".join(pictures), np.uint8)
    else:
        # one byte plane after the other deflates better
        planes = np.stack([image for _, image, _ in every]).view(np.uint8).reshape(-1, 2).T
        arrays["images"] = np.frombuffer(zlib.compress(planes.tobytes(), 9), np.uint8)
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    return data.getvalue()


def jpeg(image_HWC: np.ndarray) -> bytes:
    """Encodes 8-bit grey or colour, all of the colour."""
    data = io.BytesIO()
    picture = Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)
    picture.save(data, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return data.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Packs every category of a folder, and the built-in coins."""
    parser = ArgumentParser(prog="python -m jobs.comparison.data", description=__doc__)
    parser.add_argument(
        "--data", type=Path | None, default=None, help="folder of category folders, each with split.csv"
    )
    parser.add_argument("--to", type=Path, required=True, help="folder for a file a category")
    parser.add_argument("--size", type=int, default=256, help="height and width of images, in pixels")
    parser.add_argument("--categories", type=list[str] | None, default=None, help="only these")
    parser.add_argument("--most", type=int | None, default=None, help="images of a split, for a trial; all by default")
    given = parser.parse_args(argv)
    if given.most is not None and given.most < 1:
        stop(f"--most is {given.most}; it must be 1 or more")
    sources: dict[str, Path | None] = {COINS: None}
    if given.data is not None:
        if not given.data.is_dir():
            stop(f"--data {given.data} is no folder")
        sources |= {path.name: path for path in sorted(given.data.iterdir()) if (path / "split.csv").is_file()}
    if unknown := set(given.categories or ()) - sources.keys():
        stop(f"no category {', '.join(sorted(unknown))}; there are {', '.join(sources)}")
    for category in given.categories or sources:
        size = min(given.size, COINS_SIZE) if category == COINS else given.size
        try:
            path = pack(category, sources[category], given.to, size, RULES.get(category, PLAIN), given.most)
        except (PackError, ValueError) as error:
            stop(str(error))
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
