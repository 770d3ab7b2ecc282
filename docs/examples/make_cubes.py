"""Write cubes/: synthetic hyperspectral cubes of 200 bands with targets of a few pixels, each with its mask."""

from pathlib import Path

import numpy as np

CUBES, SIDE, BANDS, TARGETS = 24, 64, 200, 6


def smooth(rng: np.random.Generator, shape: tuple[int, ...], width: int) -> np.ndarray:
    """Draw noise of the given shape and smooth it along its last axis by a box of the given width; values 0 to 1."""
    noise = rng.random((*shape[:-1], shape[-1] + width - 1))
    sums = np.cumsum(np.insert(noise, 0, 0, axis=-1), axis=-1)
    mean = (sums[..., width:] - sums[..., :-width]) / width
    low, high = mean.min(-1, keepdims=True), mean.max(-1, keepdims=True)
    return (mean - low) / (high - low)


def main() -> None:
    """Write the cubes into the folder `cubes`."""
    rng = np.random.default_rng(0)
    Path("cubes").mkdir(exist_ok=True)
    spectra = smooth(rng, (3, BANDS), 60)
    # the target is a background spectrum with an absorption line of eight bands
    line = np.ones(BANDS)
    line[90:98] = 0.6
    target = spectra[0] * line
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number in range(CUBES):
        shares = np.stack([smooth(rng, (SIDE, SIDE), 20) for _ in spectra]) + 0.1
        cube = np.einsum("khw,kb->hwb", shares / shares.sum(0), spectra)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        for row, column, radius in zip(
            rng.integers(3, SIDE - 3, TARGETS),
            rng.integers(3, SIDE - 3, TARGETS),
            rng.uniform(0.8, 2, TARGETS),
            strict=True,
        ):
            mask |= ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2).astype(np.uint8)
        cube = np.where(mask[..., None], 0.2 * cube + 0.8 * target, cube) + rng.normal(0, 0.01, cube.shape)
        np.savez_compressed(f"cubes/{number:03d}.npz", cube=np.int16(10_000 * cube.clip(0, 3)), mask=mask)


if __name__ == "__main__":
    main()
