"""What is done to an image before the network, when it is packed and when it is predicted on: bands, size, statistics."""

from collections.abc import Callable

import numpy as np
from PIL import Image

TRIANGLE = Image.Resampling.BILINEAR
# rows of a large image at a time
ROWS = 512


def band_statistics(image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the mean and the deviation of each band over all pixels that have a value: two arrays (bands,) float64.

    Without one, nan, is a pixel where nodata was; a band that has none at all gets 0 and 0.
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
    # exact, and ten times as fast: count how often each value occurs
    counts = np.stack([np.bincount(flat[:, band], minlength=256) for band in range(bands)]).astype(np.float64)
    values = np.arange(256.0)
    mean = counts @ values / len(flat)
    return mean, np.sqrt(np.maximum(counts @ values**2 / len(flat) - mean**2, 0))


def resample_bands(image_HWC: np.ndarray, bands: int) -> np.ndarray:
    """Brings an image to a number of bands: one is repeated, more are averaged over equal shares of the spectrum.

    Bands are taken as equally spaced. Fewer than asked for are interpolated linearly between their centres. The dtype stays.
    Where some bands have no value (nan) the others are averaged.
    """
    have = image_HWC.shape[2]
    if have == bands:
        return image_HWC
    if have == 1:
        return np.repeat(image_HWC, bands, axis=2)
    weights = np.zeros((have, bands))
    if have > bands:
        # share of input band i that falls into output band j
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
    """Takes weighted means of what has a value, nan where most of the weight has none. mean_of: by weights that add up to 1."""
    missing = np.isnan(image)
    share = mean_of((~missing).astype(image.dtype))
    return np.where(share >= 0.5, mean_of(np.where(missing, 0, image)) / np.maximum(share, 1e-6), np.nan)


def resize_longest_side(
    image_HWC: np.ndarray, mask_HW: np.ndarray | None, longest_side: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Shrinks an image, and its mask, so that the longer side has at most so many pixels; never enlarges.

    The image by an antialiased triangle filter, the mask by nearest neighbour. The dtype stays.
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
    """Shrinks an image of which rows_of(top, bottom) reads rows (rows, W, C), without the whole of it in memory.

    shape: (H, W, C), of which a side is over longest_side. The filter goes along rows and then along columns, so rows can be
    shrunk as they are read. Gives (h, w, C) of the dtype.
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
    """Shrinks a band (H, W) float32 by the triangle filter; what has no value (nan) takes no part."""
    if np.isnan(band).any():
        return weighted(band, lambda values: filtered(values, width, height))
    return np.asarray(Image.fromarray(band).resize((width, height), TRIANGLE))


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Brings numbers to a dtype; whole numbers are rounded, and bounded to what it holds."""
    if dtype.kind == "f":
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(array), limits.min, limits.max).astype(dtype)
