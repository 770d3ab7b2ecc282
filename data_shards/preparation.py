"""Preparation of images before the network, for packing and for prediction: bands, size, statistics."""

from collections.abc import Callable

import numpy as np
from PIL import Image

# The variance of an image with larger values would overflow in fp32.
LARGEST = 1e15

TRIANGLE = Image.Resampling.BILINEAR
# Number of rows of a large image that are processed at a time.
ROWS = 512


def band_statistics(image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mean and standard deviation of each band over all pixels that have a value.

    Args:
        image_HWC: Image (H, W, bands); nan means no value.

    Returns:
        Mean and standard deviation, each (bands,) float64; 0 and 0 for a band without any value.
    """
    bands = image_HWC.shape[2]
    flat = image_HWC.reshape(-1, bands)
    if image_HWC.dtype != np.uint8:
        mean = flat.mean(0, dtype=np.float64)
        if not np.isnan(mean).any():
            return mean, flat.std(0, dtype=np.float64)
        seen = ~np.isnan(flat)
        counts = np.maximum(seen.sum(0), 1)
        mean = np.where(seen, flat, 0).sum(0, dtype=np.float64) / counts
        return mean, np.sqrt((np.where(seen, flat - mean, 0) ** 2).sum(0) / counts)
    # Counting each of the 256 values is exact and ten times as fast.
    counts = np.stack([np.bincount(flat[:, band], minlength=256) for band in range(bands)]).astype(np.float64)
    values = np.arange(256.0)
    mean = counts @ values / len(flat)
    return mean, np.sqrt(np.maximum(counts @ values**2 / len(flat) - mean**2, 0))


def resample_bands(image_HWC: np.ndarray, bands: int) -> np.ndarray:
    """Resample an image to a number of bands.

    Bands are taken as equally spaced. A single band is repeated; more bands are averaged over equal shares of the spectrum.
    Fewer bands than requested are interpolated linearly between their centres. If some bands have no value (nan), the others
    are averaged.

    Args:
        image_HWC: Image (H, W, bands).
        bands: Requested number of bands.

    Returns:
        Image (H, W, bands) of the same dtype.
    """
    have = image_HWC.shape[2]
    if have == bands:
        return image_HWC
    if have == 1:
        return np.repeat(image_HWC, bands, axis=2)
    weights = np.zeros((have, bands))
    if have > bands:
        # Share of input band i that falls into output band j.
        edges = np.arange(bands + 1) * have / bands
        for j in range(bands):
            overlap = np.minimum(np.arange(1, have + 1), edges[j + 1]) - np.maximum(np.arange(have), edges[j])
            weights[:, j] = np.clip(overlap, 0, None) * bands / have
    else:
        centres = np.clip((np.arange(bands) + 0.5) * have / bands - 0.5, 0, have - 1)
        low = np.minimum(centres.astype(int), have - 2)
        weights[low, np.arange(bands)] = 1 - (centres - low)
        weights[low + 1, np.arange(bands)] += centres - low
    wide = image_HWC.astype(np.float64)
    if image_HWC.dtype.kind == "f" and np.isnan(wide).any():
        return as_dtype(weighted(wide, lambda values: values @ weights), image_HWC.dtype)
    return as_dtype(wide @ weights, image_HWC.dtype)


def weighted(image: np.ndarray, mean_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Compute weighted means over pixels that have a value.

    Args:
        image: Values of any shape (*,) of a float dtype; nan means no value.
        mean_of: Computes weighted means of an array, with weights that add up to 1.

    Returns:
        The means, in the shape that `mean_of` returns; nan where most of the weight has no value.
    """
    missing = np.isnan(image)
    share = mean_of((~missing).astype(image.dtype))
    return np.where(share >= 0.5, mean_of(np.where(missing, 0, image)) / np.maximum(share, 1e-6), np.nan)


def resize_longest_side(
    image_HWC: np.ndarray, mask_HW: np.ndarray | None, longest_side: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Shrink an image and its mask so that the longer side has at most `longest_side` pixels; never enlarge.

    The image is resampled by an antialiased triangle filter, the mask by nearest neighbour.

    Args:
        image_HWC: Image (H, W, bands).
        mask_HW: Labels (H, W), or None.
        longest_side: Largest allowed side in pixels.

    Returns:
        Image (h, w, bands) and mask (h, w) or None, of the same dtypes; the inputs themselves if they are small enough.
    """
    H, W, _ = image_HWC.shape
    if max(H, W) <= longest_side:
        return image_HWC, mask_HW
    small = shrunk(lambda top, bottom: image_HWC[top:bottom], image_HWC.shape, image_HWC.dtype, longest_side)
    if mask_HW is None:
        return small, None
    labels = Image.fromarray(mask_HW.astype(np.int32)).resize(small.shape[1::-1], Image.Resampling.NEAREST)
    return small, np.asarray(labels).astype(mask_HW.dtype)


def shrunk(
    rows_of: Callable[[int, int], np.ndarray], shape: tuple[int, ...], dtype: np.dtype, longest_side: int
) -> np.ndarray:
    """Shrink an image as its rows are read, without holding all of it in memory.

    The filter is applied along rows and then along columns, so that rows can be shrunk as they are read.

    Args:
        rows_of: rows_of(top, bottom) reads rows (bottom - top, W, C).
        shape: (H, W, C) of the image; one side is longer than `longest_side`.
        dtype: dtype of the result.
        longest_side: Longer side of the result in pixels.

    Returns:
        Image (h, w, C) of the dtype.
    """
    H, W, C = shape
    share = longest_side / max(H, W)
    width, height = max(1, round(W * share)), max(1, round(H * share))
    narrow = np.empty((C, H, width), np.float32)
    for top in range(0, H, ROWS):
        rows = rows_of(top, min(top + ROWS, H))
        for c in range(C):
            narrow[c, top : top + len(rows)] = filtered(rows[..., c].astype(np.float32), width, len(rows))
    return as_dtype(np.stack([filtered(band, width, height) for band in narrow], axis=-1), dtype)


def filtered(band: np.ndarray, width: int, height: int) -> np.ndarray:
    """Shrink a band by the triangle filter; pixels without a value (nan) take no part.

    Args:
        band: Band (H, W) float32.
        width: Width of the result in pixels.
        height: Height of the result in pixels.

    Returns:
        Band (height, width) float32.
    """
    if np.isnan(band).any():
        return weighted(band, lambda values: filtered(values, width, height))
    return np.asarray(Image.fromarray(band).resize((width, height), TRIANGLE))


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert an array of any shape (*,) to a dtype; for integers, values are rounded and clipped to its range."""
    if dtype.kind == "f":
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    rounded: np.ndarray = np.clip(np.rint(array), limits.min, limits.max)
    return rounded.astype(dtype)
