"""Predict a large GeoTIFF with jobs.predict: measure peak memory, and compare its mask with the network's own on windows.

`python -m deepskip.jobs.bench.large_raster --work FOLDER` makes the raster, predicts, compares, and prints one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import scipy.ndimage
import torch

import deepskip
from deepskip import checkpoint
from deepskip.config import Config
from deepskip.inference import normalize
from deepskip.network import multiple_of
from deepskip.tiling import enlarged_rows

STRIPE = 512
# Side of the windows that are compared, and the margin that is read around them, in pixels. The margin is larger than the
# network's receptive field.
WINDOW, AROUND = 1024, 160


def make_raster(path: Path, side: int, bands: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Write a GeoTIFF of smooth blobs with noise, in deflated tiles of 512 x 512 pixels.

    Args:
        path: file to write.
        side: height and width, pixels.
        bands: number of bands.
        dtype: dtype of the values, which are 0 to 255.

    Returns:
        Mean and standard deviation of each band, two arrays (bands,) from sums in fp64.
    """
    import rasterio  # type: ignore[import-untyped]
    from rasterio.transform import Affine  # type: ignore[import-untyped]

    rng = np.random.default_rng(0)
    cell = 16
    cells = side // cell + 2
    coarse = scipy.ndimage.gaussian_filter(rng.standard_normal((bands, cells, cells), np.float32), (0, 1, 1))
    profile: dict[str, Any] = {
        "driver": "GTiff", "height": side, "width": side, "count": bands, "dtype": dtype, "crs": "EPSG:32633",
        "transform": Affine(0.5, 0, 4e5, 0, -0.5, 5e6), "tiled": True, "blockxsize": 512, "blockysize": 512,
        "compress": "deflate", "zlevel": 1, "interleave": "pixel", "bigtiff": "yes",
    }  # fmt: skip
    total, squares = np.zeros(bands), np.zeros(bands)
    with rasterio.open(path, "w", **profile) as file:
        for top in range(0, side, STRIPE):
            rows = min(STRIPE, side - top)
            stripe = enlarged_rows(coarse, side, side, top, top + rows)
            values = np.clip(120 + 90 * stripe + rng.integers(-4, 5, stripe.shape, np.int8), 0, 255).astype(dtype)
            total += values.sum((1, 2), dtype=np.float64)
            squares += (values.astype(np.float64) ** 2).sum((1, 2))
            file.write(values, window=((top, top + rows), (0, side)))
    mean = total / side**2
    return mean, np.sqrt(squares / side**2 - mean**2)


@torch.inference_mode()
def make_model(run: Path, raster: Path, bands: int, statistics: tuple[np.ndarray, np.ndarray]) -> None:
    """Write a checkpoint of the default network with random weights, for which about half of the raster is foreground.

    Args:
        run: folder of the run.
        raster: the GeoTIFF; its upper left window sets the bias of the network's head.
        bands: number of bands of the raster.
        statistics: mean and standard deviation of each band, two arrays (bands,).
    """
    import rasterio

    torch.manual_seed(0)
    config = Config()
    network = deepskip.DeepSkipUNet(bands, 1)
    network.head.weight.data.normal_()
    assert network.head.bias is not None
    network.head.bias.data.zero_()
    with rasterio.open(raster) as image:
        values = torch.from_numpy(image.read(window=((0, WINDOW), (0, WINDOW))).astype(np.float32))[None]
    mean, std = (torch.tensor(each[None], dtype=torch.float32) for each in statistics)
    logits = network.eval()(normalize(values, mean, std))
    # With a mask of one value alone, errors in tiling would not show.
    network.head.bias.data -= logits.median()
    data = {
        "in_channels": bands, "num_classes": 1, "mean": [0.0] * bands, "std": [1.0] * bands,
        "preparation": {"bands": None, "longest_side": None},
    }  # fmt: skip
    state = {"config": asdict(config), "data": data, "model": network.state_dict(), "ema": None}
    checkpoint.save(state, run / checkpoint.FOLDER / checkpoint.BEST)


def watched(command: list[str]) -> tuple[float, int, int]:
    """Run a command, and measure its time and memory, with that of its child processes.

    Returns:
        Seconds, peak of resident memory in bytes, and peak of private memory in bytes.

    Raises:
        SystemExit: if the command fails.
    """
    started, resident, private = time.monotonic(), 0, 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            sizes = [each.memory_full_info() for each in family]
            resident = max(resident, sum(size.rss for size in sizes))
            private = max(private, sum(size.uss for size in sizes))
        except psutil.Error:
            pass
        time.sleep(0.25)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed with status {process.returncode}")
    return time.monotonic() - started, resident, private


@torch.inference_mode()
def compare(
    run: Path, raster: Path, out: Path, statistics: tuple[np.ndarray, np.ndarray], windows: int
) -> dict[str, Any]:
    """Compare the mask with the network's own answer on random windows, with a margin beyond its receptive field.

    Args:
        run: folder of the run.
        raster: the GeoTIFF.
        out: folder of the predicted masks.
        statistics: mean and standard deviation of each band, two arrays (bands,).
        windows: number of windows; the first is the upper left one.

    Returns:
        The numbers of pixels compared and different, the largest absolute logit of a pixel that differs, and the share of
        foreground. Also whether the mask has the raster's georeference.
    """
    import rasterio

    network = deepskip.load(run).network
    mean, std = (torch.tensor(values[None], dtype=torch.float32) for values in statistics)
    rng = np.random.default_rng(1)
    pixels = different = foreground = 0
    worst = 0.0
    with rasterio.open(raster) as image, rasterio.open(out / "masks" / raster.name) as mask:
        same_place = image.crs == mask.crs and image.transform == mask.transform
        multiple = multiple_of(network)
        for number in range(windows):
            # The first window is in a corner of the image, the others are anywhere.
            top, left = (int(rng.integers(0, image.height - WINDOW)) * (number > 0) for _ in range(2))
            y, x = (max(0, (place - AROUND) // multiple * multiple) for place in (top, left))
            bottom, right = min(top + WINDOW + AROUND, image.height), min(left + WINDOW + AROUND, image.width)
            values = torch.from_numpy(image.read(window=((y, bottom), (x, right))).astype(np.float32))[None]
            logits = network(normalize(values, mean, std).contiguous(memory_format=torch.channels_last))[0, 0]
            inner = logits[top - y : top - y + WINDOW, left - x : left - x + WINDOW].numpy()
            found = mask.read(1, window=((top, top + WINDOW), (left, left + WINDOW)))
            wrong = found != (inner > 0)
            pixels, different, foreground = (
                pixels + wrong.size,
                different + int(wrong.sum()),
                foreground + int(found.sum()),
            )
            # Rounding can change the sign of a logit near 0, so a difference matters only if its logit is large.
            worst = max(worst, float(np.abs(inner[wrong]).max(initial=0)))
    return {
        "windows": windows,
        "pixels_compared": pixels,
        "pixels_different": different,
        "largest_logit_there": worst,
        "share_foreground": foreground / pixels,
        "georeference_kept": same_place,
    }


def main() -> None:
    """Make the raster and a model, predict, compare, and print the results as JSON."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.jobs.bench.large_raster", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the raster and the outputs")
    parser.add_argument("--side", type=int, default=20000)
    parser.add_argument("--bands", type=int, default=4)
    parser.add_argument("--dtype", default="uint8")
    parser.add_argument("--windows", type=int, default=12)
    arguments, more = parser.parse_known_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    statistics = make_raster(work / "raster.tif", arguments.side, arguments.bands, arguments.dtype)
    make_model(work / "run", work / "raster.tif", arguments.bands, statistics)
    command = [
        sys.executable,
        "-m",
        "deepskip.jobs.predict",
        "--checkpoint",
        str(work / "run"),
        "--images",
        str(work / "raster.tif"),
    ]
    command += ["--out", str(work / "out"), "--workers", "0", *more]
    seconds, resident, private = watched(command)
    found = compare(work / "run", work / "raster.tif", work / "out", statistics, arguments.windows)
    size = {"side": arguments.side, "bands": arguments.bands, "dtype": arguments.dtype}
    memory = {"peak_rss_gib": round(resident / 2**30, 3), "peak_private_gib": round(private / 2**30, 3)}
    speed = {"seconds": round(seconds, 1), "mpixel_a_second": round(arguments.side**2 / seconds / 1e6, 2)}
    print(json.dumps(size | memory | speed | found))


if __name__ == "__main__":
    main()
