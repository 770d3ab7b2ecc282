"""Crops a second of one core, into a batch: whole images, large scenes and cubes of many bands, compared with other readers.

`make bench-data ARGS=crops` runs it. All read one sample at a time in one process with one thread, alternately; the crop lies at
random, and is uint8. DeepSkip's also have the mean and standard deviation of their image. The decoder alone turns the bytes of
image and mask into arrays, and is the limit of every reader that decodes whole images with it.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import skimage.data
import torch
import webdataset
from PIL import Image
from scipy import ndimage

from deepskip.data_shards.bench.samples import import_streaming
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.entries import SCHEMA
from deepskip.data_shards.order import Slot
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards

SIDE, SCENE, BANDS, CUBE = 512, 2048, 207, 100
FEW = "0-9"
Read = Callable[[int], Any]
Row = dict[str, Any]


def scenes(count: int, side: int) -> Iterator[Sample]:
    """Yield images (side, side, 3) uint8: a photograph many times, with noise, so that PNG does not find the repeats."""
    rng = np.random.default_rng(0)
    photograph = skimage.data.astronaut()
    for number in range(count):
        image = np.tile(photograph, (side // 512, side // 512, 1)) ^ rng.integers(0, 4, (side, side, 3), np.uint8)
        yield Sample(f"s{number}", image, (rng.random((side, side)) < 1e-4).astype(np.uint8))


def cubes(count: int, folder: Path | None) -> Iterator[Sample]:
    """Yield cubes as compressed .npz files: those of a folder, or (100, 100, 207) int16 of three smooth spectra and noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        if folder is None:
            shares = ndimage.gaussian_filter(rng.random((3, CUBE, CUBE)), (0, 8, 8))
            spectra = ndimage.gaussian_filter1d(rng.random((3, BANDS)), 10) * 20_000
            cube = np.einsum("khw,kb->hwb", shares, spectra) + rng.normal(0, 25, (CUBE, CUBE, BANDS))
            cube, mask = cube.astype(np.int16), (rng.random((CUBE, CUBE)) < 0.01).astype(np.uint8)
        else:
            found = sorted(folder.glob("*.npz"))
            with np.load(found[number % len(found)]) as file:
                cube, mask = file["cube"].astype(np.int16), (file["mask"] > 0).astype(np.uint8)
            # All have one number of bands, so some bands come twice.
            cube = np.ascontiguousarray(cube[..., np.arange(BANDS) % cube.shape[2]])
        stored = io.BytesIO()
        np.savez_compressed(stored, image=cube)
        yield Sample(f"s{number}", cube, mask, ("npz", stored.getvalue()))


def encode(array: np.ndarray, kind: str) -> bytes:
    """Encode an image (H, W, bands) or mask (H, W) as "npy", "png" or "jpg"."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, array)
    else:
        Image.fromarray(array).save(file, {"png": "PNG", "jpg": "JPEG"}[kind])
    return file.getvalue()


def opened(data: bytes) -> np.ndarray:
    """Decode the bytes of an image or mask as users of other readers do: numpy for .npy, Pillow for the rest."""
    return np.load(io.BytesIO(data)) if data.startswith(b"\x93NUMPY") else np.asarray(Image.open(io.BytesIO(data)))


def crop_of(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of one random crop of SIDE x SIDE, of an image (H, W, bands) and mask (H, W)."""
    top, left = (int(rng.integers(0, length - SIDE + 1)) for length in mask.shape)
    window = np.s_[top : top + SIDE, left : left + SIDE]
    return torch.from_numpy(image[window][None].copy()), torch.from_numpy(mask[window][None].copy())


def others(folder: Path, stored: list[dict[str, bytes]]) -> dict[str, Read]:
    """Write encoded samples in the format of each other reader, and return how a crop is read from each.

    Args:
        folder: Where they are written.
        stored: The bytes of "image" and "mask" of each sample.
    """
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    for name in ("webdataset", "litdata", "mosaicml-streaming"):
        (folder / name).mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "webdataset/a.tar"), mtime=0, encoder=False) as tar:
        for number, one in enumerate(stored):
            tar.write({"__key__": f"{number}", "image.bin": one["image"], "mask.bin": one["mask"]})
    chunks = Cache(str(folder / "litdata"), chunk_bytes=2**26)
    for number, one in enumerate(stored):
        chunks[number] = one
    chunks.done()
    chunks.merge()
    columns = {"image": "bytes", "mask": "bytes"}
    with streaming.MDSWriter(out=str(folder / "mosaicml-streaming"), columns=columns) as out:
        for one in stored:
            out.write(one)
    tars = iter(webdataset.WebDataset(str(folder / "webdataset/a.tar"), shardshuffle=False).repeat())
    lit = StreamingDataset(str(folder / "litdata"))
    mosaic = streaming.StreamingDataset(local=str(folder / "mosaicml-streaming"), batch_size=1)
    rng = np.random.default_rng(0)

    def from_tar(number: int) -> Any:
        sample = next(tars)
        return crop_of(opened(sample["image.bin"]), opened(sample["mask.bin"]), rng)

    def from_dict(data: Any) -> Read:
        def read(number: int) -> Any:
            sample = data[number % len(stored)]
            return crop_of(opened(sample["image"]), opened(sample["mask"]), rng)

        return read

    return {"webdataset": from_tar, "litdata": from_dict(lit), "mosaicml-streaming": from_dict(mosaic)}


def ours(folder: Path, crop: int, bands: list[int | str] | None = None, *, statistics_stored: bool = True) -> Read:
    """Return how a crop is read from DeepSkip's shards.

    Args:
        folder: The shards.
        crop: Side of the crop.
        bands: Bands that are read; None reads all.
        statistics_stored: Whether the index holds the statistics of each image; False is as before its version 3.
    """
    shards = Shards(folder, "image", Crops(crop, 0.5, 0), bands=bands)
    if not statistics_stored:
        shards.index = replace(shards.index, samples=shards.index.samples.select(SCHEMA.names))
    return lambda number: shards[[Slot(number // len(shards), number % len(shards), 1)]]


def images(folder: Path, kind: str, side: int, count: int, tiles: list[int]) -> dict[str, Read]:
    """Pack images of three bands, and return how crops of SIDE are read from them; the first is DeepSkip's former way.

    Args:
        folder: Where they are written.
        kind: "png", "jpg" or "npy".
        side: Height and width of the images.
        count: Number of images.
        tiles: Sides of the tiles that are tried as well.
    """
    scene = list(scenes(count, side))
    stored = [{"image": encode(one.image_HWC, kind), "mask": encode(one.mask_HW, "png")} for one in scene]
    samples = [
        replace(one, stored_image=(kind, data["image"]), image_HWC=opened(data["image"]))
        for one, data in zip(scene, stored, strict=True)
    ]
    write_shards(samples, folder / "whole", num_classes=1)
    for tile in tiles:
        write_shards(scene, folder / f"tiles-{tile}", num_classes=1, tile=tile)

    decode: dict[str, Callable[[bytes], Any]] = {"png": imagecodecs.spng_decode, "jpg": imagecodecs.jpeg8_decode, "npy": opened}

    def decoded(number: int) -> Any:
        one = stored[number % count]
        return decode[kind](one["image"]), imagecodecs.spng_decode(one["mask"])

    return {
        "deepskip, statistics computed": ours(folder / "whole", SIDE, statistics_stored=False),
        "deepskip": ours(folder / "whole", SIDE),
        **{f"deepskip, tiles of {tile}": ours(folder / f"tiles-{tile}", SIDE) for tile in tiles},
        **others(folder, stored),
        "decoder alone": decoded,
    }


def cubes_of(folder: Path, count: int, source: Path | None) -> dict[str, Read]:
    """Pack cubes of many bands, and return how crops of 64 are read from them; the first is the former way.

    Args:
        folder: Where they are written.
        count: Number of cubes.
        source: As for `cubes`.
    """
    cube = list(cubes(count, source))
    write_shards(cube, folder / "npz", num_classes=1)
    write_shards([replace(one, stored_image=None) for one in cube], folder / "npy", num_classes=1)
    write_shards(cube, folder / "tiles", num_classes=1, tile=256)
    return {
        "npz, statistics computed": ours(folder / "npz", 64, statistics_stored=False),
        "npz": ours(folder / "npz", 64),
        "npy, statistics computed": ours(folder / "npy", 64, statistics_stored=False),
        "npy": ours(folder / "npy", 64),
        "tiles": ours(folder / "tiles", 64),
        "npz, 10 bands": ours(folder / "npz", 64, [FEW]),
        "npy, 10 bands": ours(folder / "npy", 64, [FEW]),
        "tiles, 10 bands": ours(folder / "tiles", 64, [FEW]),
    }


def measure(title: str, group: dict[str, Read], rounds: int, seconds: float) -> list[Row]:
    """Measure contenders alternately.

    Args:
        title: What they read.
        group: How each reads a crop; the first is what the others are compared with.
        rounds: Number of turns of each.
        seconds: Shortest time of a turn in seconds.

    Returns:
        A row for each: crops a second of processor time, median, lowest and highest turn.
    """
    found: dict[str, list[float]] = {name: [] for name in group}
    for turn in range(rounds):
        for name, read in group.items():
            started, number = time.process_time(), 0
            while time.process_time() - started < seconds:
                read(turn * 1000 + number)
                number += 1
            found[name].append(number / (time.process_time() - started))
    base = statistics.median(next(iter(found.values())))
    return [
        {"stored as": title, "reader": name, "crops/s": round(statistics.median(values), 1),
         "lowest": round(min(values), 1), "highest": round(max(values), 1),
         "times the first": f"{statistics.median(values) / base:.1f}"}
        for name, values in found.items()
    ]  # fmt: skip


def bench(folder: Path, count: int, rounds: int, seconds: float, tiles: list[int], source: Path | None) -> list[Row]:
    """Measure each kind of images.

    Args:
        folder: Where the samples are written.
        count: Number of samples of a kind.
        rounds: Number of turns of each reader.
        seconds: Shortest time of a turn in seconds.
        tiles: Sides of the tiles of large scenes.
        source: As for `cubes`.
    """
    torch.set_num_threads(1)
    rows = []
    for kind, side in (("png", SIDE), ("jpg", SIDE), ("npy", SIDE), ("png", SCENE), ("npy", SCENE)):
        group = images(folder / f"{kind}-{side}", kind, side, count, tiles if side == SCENE else [])
        rows += measure(f"{kind} of {side} x {side}, crops of {SIDE}", group, rounds, seconds)
    cube = cubes_of(folder / "cubes", count, source)
    return rows + measure(f"{BANDS} bands of {CUBE} x {CUBE}, crops of 64", cube, rounds, seconds)
