"""Percentiles of each band over the pixels of a split, in bounded memory: of all pixels, or of every k-th of many."""

import numpy as np

# Percentiles in the index.
SHARES = (2.0, 50.0, 98.0)
# Distance of the first and last of them in a normal distribution, in standard deviations.
NORMAL_RANGE = 2 * 2.0537489106318225
# Most values that are kept, of all bands together: of one shard, and of a split.
SHARD_VALUES, SPLIT_VALUES = 2**20, 2**24


class PixelSample:
    """Every k-th pixel of images, where k doubles whenever the values would become too many.

    Args:
        limit: Most values that are kept, of all bands together.

    Attributes:
        step: Each how many pixels one is kept, k.
        pixels: The kept pixels, (n, bands) float32 each.
    """

    def __init__(self, limit: int = SPLIT_VALUES) -> None:
        self.limit, self.step, self.seen = limit, 1, 0
        self.pixels: list[np.ndarray] = []

    def add(self, image_HWC: np.ndarray) -> None:
        """Add the pixels of an image (H, W, bands); nan means no value."""
        flat = image_HWC.reshape(-1, image_HWC.shape[2])
        self.pixels.append(flat[-self.seen % self.step :: self.step].astype(np.float32))
        self.seen += len(flat)
        self._bound()

    def merge(self, other: "PixelSample") -> None:
        """Add the pixels that another sample kept, of the same number of bands."""
        step = max(self.step, other.step)
        self._thin(step // self.step)
        self.step = step
        self.pixels.append(np.concatenate(other.pixels)[:: step // other.step])
        self.seen += other.seen
        self._bound()

    def _bound(self) -> None:
        while sum(part.size for part in self.pixels) > self.limit and len(self.pixels[0]):
            self._thin(2)
            self.step *= 2

    def _thin(self, factor: int) -> None:
        if factor > 1 and self.pixels:
            self.pixels = [np.concatenate(self.pixels)[::factor]]

    def percentiles(self) -> tuple[tuple[float, ...], ...]:
        """Return the percentiles SHARES of each band, (3, bands); 0 for a band without any value."""
        pixels = np.concatenate(self.pixels).astype(np.float64)
        empty = np.isnan(pixels).all(0)
        pixels[:, empty] = 0
        return tuple(tuple(row) for row in np.nanpercentile(pixels, SHARES, axis=0).tolist())


def finite_or_none(percentiles: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...] | None:
    """Return percentiles (3, bands), or None if one is not a finite number of fp32."""
    return percentiles if np.isfinite(percentiles).all() else None


def centre_and_scale(percentiles: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the median of each band, and the range of its percentiles in the unit of a standard deviation.

    Args:
        percentiles: Percentiles SHARES of each band, (3, bands).

    Returns:
        Centre and scale, (bands,) each. Of normally distributed values they are mean and standard deviation.
    """
    low, middle, high = percentiles
    return middle, tuple((b - a) / NORMAL_RANGE for a, b in zip(low, high, strict=True))
