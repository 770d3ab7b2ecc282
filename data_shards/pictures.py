"""What an image file says of its numbers: transparency, how they are turned, what stands for no value; what comes of it."""

import math
from dataclasses import dataclass, replace

import numpy as np

ALPHA = ("auto", "keep", "drop")
ORIENTATION = ("auto", "apply", "ignore")
# of EXIF, and of TIFF
ORIENTATION_TAG = 274
# of the pixels of a transparency mask, so many are wholly there or not at all: the rest are soft edges
PLAIN_SHARE = 0.95
# what writers put where there is no value, and say so nowhere; the last are of NetCDF and of floats' ends
SUSPECTED = (-9999.0, -99999.0, -999.0, -32768.0, -32767.0, -2147483648.0, 65535.0, 1e20, -1e30, 9.96920996838687e36,
             -3.4028234663852886e38, 3.4028234663852886e38)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A file's numbers as they are stored, and what the file says of them.

    array: (H, W) or (H, W, bands). alpha: bands that are flagged as transparency; sure: by a format that has it for nothing
    else, unlike TIFF, where GDAL flags a fourth band whatever it is. orientation: EXIF's number, 1 for as stored.
    white_is_zero: bits of a number where 0 is white, else 0. nodata: what stands for no value, of all bands. palette: colours
    (n, 3) of a mask whose numbers are indices.
    """

    array: np.ndarray
    alpha: tuple[int, ...] = ()
    sure: bool = False
    orientation: int = 1
    white_is_zero: int = 0
    nodata: float | None = None
    palette: np.ndarray | None = None


@dataclass(frozen=True)
class Reading:
    """How images are read.

    alpha: bands flagged as transparency are kept or dropped; "auto": as many as `bands` are taken where that fits, else those
    that hold no more than transparency are dropped. orientation: whether the image is turned as the file says ("auto" too).
    missing: what has no value becomes nan: the file's own nodata value, and `nodata`.
    """

    alpha: str = "auto"
    orientation: str = "auto"
    missing: bool = False
    nodata: float | None = None

    @property
    def as_stored(self) -> bool:
        """Whether files come as this by default."""
        return replace(self, missing=False, nodata=None) == Reading()


AS_IT_COMES = Reading()


def image_of(picture: Picture, reading: Reading = AS_IT_COMES, bands: int | None = None) -> np.ndarray:
    """Makes the image (H, W, bands) of a picture; raises ValueError where it has values that are nan or infinite.

    bands: how many are expected. Where reading.missing is set, nan is where there is no value, in float32 or float64.
    """
    array = picture.array if picture.array.ndim == 3 else picture.array[..., None]
    if picture.alpha:
        dropped = dropped_alpha(picture, reading.alpha, bands)
        array = np.delete(array, dropped, axis=2) if dropped else array
    if reading.missing:
        array = without_nodata(array, picture.nodata, reading.nodata)
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("has values that are nan or infinite")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    return array if reading.orientation == "ignore" else turned(array, picture.orientation)


def dropped_alpha(picture: Picture, alpha: str = "auto", bands: int | None = None) -> list[int]:
    """Lists the bands that are left out as transparency."""
    flagged, have = list(picture.alpha), picture.array.shape[2] if picture.array.ndim == 3 else 1
    if alpha == "keep" or (alpha == "auto" and have == bands) or have == len(flagged):
        return []
    if alpha == "drop" or picture.sure or have - len(flagged) == bands:
        return flagged
    return [band for band in flagged if is_transparency(picture.array[..., band])]


def is_transparency(band_HW: np.ndarray) -> bool:
    """Says whether a band holds what transparency does: all or nothing, but for soft edges."""
    full = {1, 255, np.iinfo(band_HW.dtype).max if band_HW.dtype.kind in "iu" else 1}
    highest = band_HW.max(initial=0)
    if highest not in full | {0}:
        return False
    return bool(((band_HW == 0) | (band_HW == highest)).mean() >= PLAIN_SHARE)


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turns rows and columns as EXIF's orientation says."""
    if orientation > 4:
        array = array.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return array[:: -1 if rows else 1, :: -1 if columns else 1]


def without_nodata(array: np.ndarray, *values: float | None) -> np.ndarray:
    """Puts nan where a number is one of the values; raises ValueError where others are nan or infinite."""
    missing = np.zeros(array.shape, bool)
    named = [value for value in values if value is not None]
    for value in named:
        if math.isnan(value):
            missing |= np.isnan(array) if array.dtype.kind == "f" else False
        elif (found := cast(value, array.dtype)) is not None:
            missing |= array == found
    if array.dtype.kind == "f" and not (missing | np.isfinite(array)).all():
        cure = "" if any(map(math.isnan, named)) else "; where nan stands for no value: --nodata nan"
        raise ValueError(f"has values that are nan or infinite{cure}")
    if not missing.any():
        return array
    array = array.astype(array.dtype if array.dtype == np.float64 else np.float32)
    array[missing] = np.nan
    return array


def cast(value: float, dtype: np.dtype) -> np.generic | None:
    """Gives a value as a type holds it, which for float32 is another number; None where it cannot hold it."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(value)
    if dtype.kind == "b" or not math.isfinite(value) or value != round(value):
        return None
    limits = np.iinfo(dtype)
    return dtype.type(value) if limits.min <= value <= limits.max else None


def suspected_nodata(image_HWC: np.ndarray) -> float | None:
    """Gives the value that looks as if it stood for none: known for that, at an end, and far from all others; else None."""
    if image_HWC.dtype == np.uint8 or image_HWC.size == 0:
        return None
    for end, others in ((image_HWC.min(), np.max), (image_HWC.max(), np.min)):
        if not any(cast(value, image_HWC.dtype) == end for value in SUSPECTED):
            continue
        rest = image_HWC[image_HWC != end]
        if rest.size and abs(float(end) - float(others(rest))) > 2 * (float(rest.max()) - float(rest.min())):
            return float(end)
    return None


def filled(image_HWC: np.ndarray, mean_C: np.ndarray) -> np.ndarray:
    """Puts a band's mean where it has no value (nan)."""
    if image_HWC.dtype.kind != "f":
        return image_HWC
    return np.where(np.isnan(image_HWC), mean_C.astype(image_HWC.dtype), image_HWC)


def without_values(image_HWC: np.ndarray, mask_HW: np.ndarray, ignore_index: int) -> np.ndarray:
    """Labels pixels ignored in which no band has a value; gives a mask of its own where there are any."""
    nowhere = np.isnan(image_HWC).all(axis=2) if image_HWC.dtype.kind == "f" else np.zeros((), bool)
    return np.where(nowhere, mask_HW.dtype.type(ignore_index), mask_HW) if nowhere.any() else mask_HW
