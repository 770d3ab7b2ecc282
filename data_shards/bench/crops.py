"""Crops a second of one core, into a batch: large scenes and cubes of many bands, in one piece and in tiles.

`python -m deepskip.data_shards.bench.crops --json crops.json`
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from scipy import ndimage

from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.entries import SCHEMA
from deepskip.data_shards.order import Slot
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards

SCENE, BANDS, CUBE = 2048, 207, 100
FEW = "0-9"


def scenes(count: int) -> Iterator[Sample]:
    """Yield scenes (2048, 2048, 3) uint8: a photograph many times, with noise, so that PNG does not find the repeats."""
    rng = np.random.default_rng(0)
    photograph = skimage.data.astronaut()
    for number in range(count):
        image = np.tile(photograph, (SCENE // 512, SCENE // 512, 1)) ^ rng.integers(0, 4, (SCENE, SCENE, 3), np.uint8)
        yield Sample(f"s{number}", image, (rng.random((SCENE, SCENE)) < 1e-4).astype(np.uint8))


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


def without_statistics(shards: Shards) -> Shards:
    """Return shards whose index does not hold the statistics of each image, as before version 3."""
    shards.index = replace(shards.index, samples=shards.index.samples.select(SCHEMA.names))
    return shards


def contenders(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Shards]]:
    """Pack the sets, and return the shards to measure by group and name; the first of each group is the former way."""
    scene, cube = list(scenes(arguments.count)), list(cubes(arguments.count, arguments.cubes))
    write_shards(scene, folder / "scene", num_classes=1)
    write_shards(cube, folder / "npz", num_classes=1)
    write_shards([replace(one, stored_image=None) for one in cube], folder / "npy", num_classes=1)
    for side in arguments.tiles:
        write_shards(scene, folder / f"scene-{side}", num_classes=1, tile=side)
    write_shards(cube, folder / "cube", num_classes=1, tile=256)
    for path in sorted(folder.iterdir()):
        size = sum(tar.stat().st_size for tar in path.glob("*.tar"))
        print(f"{path.name}: {size / arguments.count / 1e6:.2f} MB a sample", flush=True)
    large, small = Crops(512, 0.5, 0), Crops(64, 0.5, 0)

    def shards(name: str, crops: Crops, bands: list[int | str] | None = None) -> Shards:
        return Shards(folder / name, "image", crops, bands=bands)

    return {
        f"png of {SCENE} x {SCENE}, crops of 512": {
            "whole, statistics computed": without_statistics(shards("scene", large)),
            "whole, statistics in the index": shards("scene", large),
            **{f"tiles of {side}": shards(f"scene-{side}", large) for side in arguments.tiles},
        },
        f"{BANDS} bands of {CUBE} x {CUBE}, crops of 64": {
            "npz, statistics computed": without_statistics(shards("npz", small)),
            "npz, statistics in the index": shards("npz", small),
            "npy, statistics computed": without_statistics(shards("npy", small)),
            "npy, statistics in the index": shards("npy", small),
            "tiles": shards("cube", small),
            "npz, 10 bands": shards("npz", small, [FEW]),
            "npy, 10 bands": shards("npy", small, [FEW]),
            "tiles, 10 bands": shards("cube", small, [FEW]),
        },
    }


def measure(group: dict[str, Shards], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure contenders alternately.

    Args:
        group: Shards by name; the first is what the others are compared with.
        rounds: Number of turns of each.
        seconds: Shortest time of a turn in seconds.

    Returns:
        A row for each: crops a second of processor time, median, lowest and highest turn.
    """
    found: dict[str, list[float]] = {name: [] for name in group}
    for turn in range(rounds):
        for name, shards in group.items():
            started, number = time.process_time(), 0
            while time.process_time() - started < seconds:
                shards[[Slot(turn * 1000 + number // len(shards), number % len(shards), 1)]]
                number += 1
            found[name].append(number / (time.process_time() - started))
    base = statistics.median(next(iter(found.values())))
    return [
        {"form": name, "crops/s": round(statistics.median(values), 1), "lowest": round(min(values), 1),
         "highest": round(max(values), 1), "times the first": round(statistics.median(values) / base, 1)}
        for name, values in found.items()
    ]  # fmt: skip


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=4, help="samples in each set")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each form")
    parser.add_argument("--seconds", type=float, default=1.0, help="shortest time of a turn")
    parser.add_argument("--tiles", type=int, nargs="+", default=[128, 256, 512], help="sides of tiles")
    parser.add_argument("--cubes", type=Path, help="folder of .npz files with cube and mask, in place of made ones")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, group in contenders(Path(folder), arguments).items():
            rows[title] = measure(group, arguments.rounds, arguments.seconds)
            print(f"\n{title}")
            for row in rows[title]:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    rows["load"] = os.getloadavg()
    print(f"\nload {rows['load']}, {os.cpu_count()} cores")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
