"""What an image file says about its numbers (transparency, orientation, no-data value), and how it is applied."""

import math
from dataclasses import dataclass

import numpy as np

from deepskip.data_shards.preparation import LARGEST

ALPHA = ("auto", "keep", "drop")
ORIENTATION = ("auto", "apply", "ignore")
# The tag of EXIF and of TIFF.
ORIENTATION_TAG = 274
# At least this share of a transparency mask is fully transparent or fully opaque; the rest are soft edges.
PLAIN_SHARE = 0.95
# Values that writers use for "no data" without declaring it; the last three are those of NetCDF and the limits of float32.
SUSPECTED = (-9999.0, -99999.0, -999.0, -32768.0, -32767.0, -2147483648.0, 65535.0, 1e20, -1e30, 9.96920996838687e36,
             -3.4028234663852886e38, 3.4028234663852886e38)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """The numbers of an image file as they are stored, and what the file says about them.

    Attributes:
        array: Numbers (H, W) or (H, W, bands).
        alpha: Bands that are flagged as transparency.
        sure: Whether the format uses that flag for nothing else; in TIFF, GDAL flags a fourth band whatever it is.
        orientation: Orientation as EXIF numbers it, 1 to 8; 1 is as stored.
        white_is_zero: Number of bits of a value if 0 is white, else 0.
        nodata: Value that means no data, for all bands.
        palette: Colours (n, 3) uint8 of a mask whose numbers are indices.
        invalid: Pixels (H, W) bool without a value in any band, as a mask in the file says; None if there are none.
    """

    array: np.ndarray
    alpha: tuple[int, ...] = ()
    sure: bool = False
    orientation: int = 1
    white_is_zero: int = 0
    nodata: float | None = None
    palette: np.ndarray | None = None
    invalid: np.ndarray | None = None


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        alpha: Whether bands flagged as transparency are kept ("keep") or dropped ("drop"). "auto" takes as many as give the
            expected number of bands; otherwise it drops bands that hold no more than transparency.
        orientation: "apply" and "auto" rotate an image as its file says, "ignore" does not.
        missing: Whether the file's own no-data value, and `nodata`, become nan.
        nodata: Additional value that means no data.
    """

    alpha: str = "auto"
    orientation: str = "auto"
    missing: bool = False
    nodata: float | None = None


AS_IT_COMES = Reading()


def image_of(picture: Picture, reading: Reading = AS_IT_COMES, bands: int | None = None) -> np.ndarray:
    """Return the image of a picture.

    Args:
        picture: The numbers of a file.
        reading: How images are read.
        bands: Expected number of bands, or None.

    Returns:
        Image (H, W, bands). If reading.missing is set, it is nan where there is no value, in float32 or float64.

    Raises:
        ValueError: If other values are nan or infinite.
    """
    array = picture.array if picture.array.ndim == 3 else picture.array[..., None]
    if picture.alpha:
        dropped = dropped_alpha(picture, reading.alpha, bands)
        array = np.delete(array, dropped, axis=2) if dropped else array
    array = without_nodata(array, *((picture.nodata, reading.nodata) if reading.missing else ()))
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if reading.missing and picture.invalid is not None:
        array = array.astype(array.dtype if array.dtype == np.float64 else np.float32)
        array[picture.invalid] = np.nan
    return array if reading.orientation == "ignore" else turned(array, picture.orientation)


def dropped_alpha(picture: Picture, alpha: str = "auto", bands: int | None = None) -> list[int]:
    """Return the bands that are dropped as transparency.

    Args:
        picture: The numbers of a file.
        alpha: "auto", "keep" or "drop".
        bands: Expected number of bands, or None.
    """
    flagged, have = list(picture.alpha), picture.array.shape[2] if picture.array.ndim == 3 else 1
    if alpha == "keep" or (alpha == "auto" and have == bands) or have == len(flagged):
        return []
    if alpha == "drop" or picture.sure or have - len(flagged) == bands:
        return flagged
    return [band for band in flagged if is_transparency(picture.array[..., band])]


def is_transparency(band_HW: np.ndarray) -> bool:
    """Return whether a band (H, W) looks like transparency: all or nothing, apart from soft edges."""
    full = {1, 255, np.iinfo(band_HW.dtype).max if band_HW.dtype.kind in "iu" else 1}
    highest = band_HW.max(initial=0)
    if highest not in full | {0}:
        return False
    return bool(((band_HW == 0) | (band_HW == highest)).mean() >= PLAIN_SHARE)


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Return an array (H, W) or (H, W, bands) rotated as EXIF's orientation number says."""
    if orientation > 4:
        array = array.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return array[:: -1 if rows else 1, :: -1 if columns else 1]


def without_nodata(array: np.ndarray, *values: float | None) -> np.ndarray:
    """Replace the given values by nan.

    Args:
        array: Numbers of any shape (*,).
        values: Values that mean no data; None and values that the dtype cannot hold are skipped.

    Returns:
        The array unchanged if it has no such value, else a copy in float32 or float64.

    Raises:
        ValueError: If other values are nan, infinite or beyond LARGEST.
    """
    missing = np.zeros(array.shape, bool)
    named = [value for value in values if value is not None]
    for value in named:
        if math.isnan(value):
            missing |= np.isnan(array) if array.dtype.kind == "f" else False
        elif (found := cast(value, array.dtype)) is not None:
            missing |= array == found
    if array.dtype.kind == "f" and not (sound := missing | usable(array)).all():
        if not (missing | np.isfinite(array)).all():
            cure = "" if any(map(math.isnan, named)) else "; if nan means no data: --nodata nan"
            raise ValueError(f"has values that are nan or infinite{cure}")
        value = float(array[~sound][0])
        raise ValueError(f"has values beyond {LARGEST:g}; if {value!r} means no data: --nodata={value!r}")
    if not missing.any():
        return array
    array = array.astype(array.dtype if array.dtype == np.float64 else np.float32)
    array[missing] = np.nan
    return array


def usable(array: np.ndarray) -> np.ndarray:
    """Return which values are finite and small enough to compute their variance in fp32.

    Args:
        array: Numbers of any shape (*,), of a floating-point dtype.
    """
    finite: np.ndarray = np.isfinite(array)
    # float16 holds nothing so large.
    if array.dtype != np.float16:
        finite &= np.abs(array) <= LARGEST
    return finite


def cast(value: float, dtype: np.dtype) -> np.generic | None:
    """Return a value as a dtype holds it, which for float32 may be another number; None if it cannot hold it."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            held: np.generic = dtype.type(value)
            return held
    if dtype.kind == "b" or not math.isfinite(value) or value != round(value):
        return None
    limits = np.iinfo(dtype)
    return dtype.type(value) if limits.min <= value <= limits.max else None


def suspected_nodata(image_HWC: np.ndarray) -> float | None:
    """Return a value that probably means no data, or None.

    It is a value that is often used so, is the lowest or highest of the image, and is far from all others.

    Args:
        image_HWC: Image (H, W, bands).
    """
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
    """Replace nan by the mean of its band.

    Args:
        image_HWC: Image (H, W, bands).
        mean_C: Mean of each band, (bands,).

    Returns:
        Image (H, W, bands) of the same dtype; the image itself if its dtype cannot hold nan.
    """
    if image_HWC.dtype.kind != "f":
        return image_HWC
    return np.where(np.isnan(image_HWC), mean_C.astype(image_HWC.dtype), image_HWC)


def without_values(image_HWC: np.ndarray, mask_HW: np.ndarray, ignore_index: int) -> np.ndarray:
    """Set mask pixels to ignore_index where no band of the image has a value.

    Args:
        image_HWC: Image (H, W, bands), nan where it has no value.
        mask_HW: Labels (H, W).
        ignore_index: Label of ignored pixels.

    Returns:
        A new mask (H, W) if there are such pixels, else the mask itself.
    """
    nowhere = np.isnan(image_HWC).all(axis=2) if image_HWC.dtype.kind == "f" else np.zeros((), bool)
    return np.where(nowhere, mask_HW.dtype.type(ignore_index), mask_HW) if nowhere.any() else mask_HW
