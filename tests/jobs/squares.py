"""A category of the comparison for tests: bright squares, 32 x 32, four to train on, two to validate and two to test."""

from pathlib import Path

import numpy as np
from jobs.comparison.data import encode


def write_squares(folder: Path, name: str = "squares") -> None:
    """Writes NAME.npz into a folder."""
    rng = np.random.default_rng(0)
    squares = []
    for i in range(8):
        mask = np.zeros((32, 32), np.uint8)
        mask[4:10, 5:12] = mask[20:24, 18:21] = 1
        image = rng.integers(0, 100, (32, 32, 3)) + 100 * mask[..., None]
        squares.append((f"{i}", image.astype(np.uint8), mask))
    (folder / f"{name}.npz").write_bytes(encode(squares, ["train"] * 4 + ["val"] * 2 + ["test"] * 2))
