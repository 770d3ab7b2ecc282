"""Measure how far the masks of bright targets lie from the targets, by sizes.

A target's place is the centroid of what is brighter than its surroundings, in and around its mask:

    python docs/benchmarks/alignment.py --images NUDT-SIRST/images --masks NUDT-SIRST/masks --split split.csv

The split is a CSV with columns stem,split; its rows "test" do not count.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from check import grey
from skimage.measure import label, regionprops
from skimage.morphology import dilation

# Areas in pixels at which the bins begin, and pixels around a mask in which a target may lie.
SIZES, AROUND = (1, 16, 64), 2
EIGHT = np.ones((3, 3), bool)


def distances(image: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, float, float]]:
    """Yield for each target the area of its mask, and how far the target lies below it and to the right, in pixels.

    Args:
        image: grey image (H, W).
        mask: true where there is a target, (H, W) bool.
    """
    for target in regionprops(np.pad(label(mask, connectivity=2), AROUND + 1)):
        rows, columns = (
            slice(low - AROUND - 1, high + AROUND + 1)
            for low, high in zip(*np.split(np.array(target.bbox), 2), strict=True)
        )
        own = np.pad(target.image, AROUND + 1)
        near = own
        for _ in range(AROUND):
            near = dilation(near, EIGHT)
        window = np.pad(image.astype(float), AROUND + 1, mode="edge")[rows, columns]
        light = np.where(near, np.clip(window - np.median(window[~near]), 0, None), 0)
        light[light < 0.4 * light.max()] = 0
        if light.any():
            places = np.indices(light.shape)
            down, right = (places * light).sum((1, 2)) / light.sum() - np.argwhere(own).mean(0)
            yield int(target.area), float(down), float(right)


def main(argv: list[str] | None = None) -> None:
    """Print the shares of targets that lie more than 0.4 pixels from their masks in each direction.

    Args:
        argv: command-line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "masks", "split"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args(argv)
    with arguments.split.open(newline="") as file:
        stems = [row["stem"] for row in csv.DictReader(file) if row["split"] != "test"]
    found = np.array(
        [each for stem in stems for each in distances(grey(arguments.images, stem), grey(arguments.masks, stem) > 0)]
    )
    print("| area, pixels | targets | below | above | right | left |\n|---|---:|---:|---:|---:|---:|")
    bins = np.searchsorted(SIZES, found[:, 0], side="right") - 1
    for number, size in enumerate(SIZES):
        down, right = found[bins == number, 1:].T
        shares = " | ".join(f"{(side > 0.4).mean():.0%}" for side in (down, -down, right, -right))
        print(f"| from {size} | {len(down)} | {shares} |")


if __name__ == "__main__":
    main()
