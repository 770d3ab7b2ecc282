"""Decodes images and masks of strangers into arrays: what a file unpacks to is known, and bounded, before it is unpacked."""

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image, ImageOps

from deepskip.data_shards import png, tiff
from deepskip.data_shards.sample import EXTENSIONS, IMAGE_KEYS, MASK_KEYS

# bounds what a small file may unpack to
MAX_PIXELS = 2**28
MAX_BYTES = 2**31
# scans of a JPEG: progressive ones have about ten, and each takes as long as a whole image; of the largest images fewer
MAX_SCANS, LARGEST_SCANS = 100, 20
# as numpy writes archives
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# the most that deflate can make of a byte
DEFLATE_RATIO = 1032

# the bound is ours, checked before anything is unpacked; pillow's own would only warn
Image.MAX_IMAGE_PIXELS = None

Data = bytes | memoryview


@dataclass(frozen=True)
class Limits:
    """What an image may unpack to: pixels (height x width) and, where a small file could hide them, bytes."""

    pixels: int = MAX_PIXELS
    bytes: int = MAX_BYTES

    def check(self, height: int, width: int) -> None:
        """Raises TooLarge where there are more pixels."""
        if height * width > self.pixels:
            raise TooLarge(f"has {height} x {width} pixels; at most {self.pixels} are read")

    def check_bytes(self, count: int) -> None:
        """Raises TooLarge where there are more bytes."""
        if count > self.bytes:
            raise TooLarge(f"unpacks to {count} bytes; at most {self.bytes} are read")


LIMITS = Limits()


class TooLarge(ValueError):
    """An image that unpacks to more than is read; says how much."""


def decode_image(extension: str, data: Data, limits: Limits = LIMITS) -> np.ndarray:
    """Decodes an image into (height, width, bands); raises ValueError that says what is wrong with it, TooLarge among them.

    Transparency is dropped, palettes are applied, EXIF orientation is applied, pages of a TIFF are bands.
    """
    array = _decode(extension, data, _picture, IMAGE_KEYS, limits)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"has shape {array.shape}; an image is (height, width) or (height, width, bands)")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"has dtype {array.dtype}; an image is of integers or real numbers")
    limits.check(array.shape[0], array.shape[1])
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("has values that are nan or infinite")
    return array.astype(np.uint8) if array.dtype == bool else array


def decode_mask(extension: str, data: Data) -> np.ndarray:
    """Decodes a mask into integer labels (height, width), uint8 where they fit, else int32; raises ValueError.

    A palette's indices are the labels. Colour channels must be equal to each other.
    """
    array = _decode(extension, data, _label_picture, MASK_KEYS, LIMITS)
    if array.ndim == 3 and (array == array[..., :1]).all():
        array = array[..., 0]
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"has shape {array.shape}; a mask is (height, width) of integer labels, not of colours")
    if array.dtype.kind == "f" and not (array == np.round(array)).all():
        raise ValueError("holds values that are no integers; a mask holds labels")
    kind = array.dtype.kind
    if kind not in "biuf" or (array.dtype != np.uint8 and (array.min() < 0 or array.max() > 2**31 - 1)):
        raise ValueError(f"holds labels of dtype {array.dtype} that are negative or too large")
    return array.astype(np.uint8 if array.dtype == np.uint8 or array.max() <= 255 else np.int32, copy=False)


def _decode(
    extension: str,
    data: Data,
    picture: Callable[[Image.Image], np.ndarray],
    keys: tuple[str, ...],
    limits: Limits,
) -> np.ndarray:
    try:
        if extension in ("png", "jpg", "jpeg"):
            return _read_picture(bytes(data), picture, limits)
        if extension in ("tif", "tiff"):
            return _read_tiff(data, picture is _picture, limits)
        if extension == "npy":
            return _read_npy(data)
        if extension == "npz":
            return read_npz(io.BytesIO(data), keys, limits)
    except TooLarge as error:
        raise TooLarge(f"the {extension} file does not decode: {error}") from error
    # decoders fail in many ways on bytes that are no image
    except Exception as error:
        raise ValueError(f"the {extension} file does not decode: {error}") from error
    raise ValueError(f"is a .{extension} file; images and masks are {', '.join(EXTENSIONS)}")


def _picture(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("1", "L", "RGB", "F", "I") or image.mode.startswith("I;16"):
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))


def _label_picture(image: Image.Image) -> np.ndarray:
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("LA", "RGBA"):
        image = image.convert(image.mode[:-1])
    return np.asarray(image)


def _read_picture(data: bytes, picture: Callable[[Image.Image], np.ndarray], limits: Limits) -> np.ndarray:
    """Decodes a PNG or a JPEG, whatever it is called; of several pictures in a JPEG the first."""
    if data.startswith(png.MAGIC):
        data, turned = png.essential(data)
        if not turned and png.is_plain(data):
            limits.check(*png.shape(data))
            return png.decode_plain(data)
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        limits.check(image.height, image.width)
        if image.format != "PNG":
            pixels = max(1, image.height * image.width)
            tiff.check_scans(data, min(MAX_SCANS, LARGEST_SCANS * limits.pixels // pixels))
        return picture(image)


def _read_tiff(data: Data, palette: bool, limits: Limits) -> np.ndarray:
    with tiff.open_tiff(data, limits.pixels) as file:
        series = file.series[0]
        page = file.pages.first
        limits.check_bytes(series.nbytes)
        axes = [
            (axis, length) for axis, length in zip(series.axes, series.shape, strict=True) if length > 1 or axis in "YX"
        ]
        names = "".join(axis for axis, _ in axes)
        if len(names) > 3 or "Y" not in names or "X" not in names:
            raise ValueError(f"has axes {series.axes} of {series.shape}; height, width and one axis of bands are read")
        sides = dict(axes)
        limits.check(sides["Y"], sides["X"])
        tiff.guard(series, len(data))
        array = series.asarray().reshape([length for _, length in axes])
        # bands last, wherever they were
        array = np.transpose(array, sorted(range(len(names)), key=lambda i: "YX".find(names[i]) % 3))
        if palette and page.photometric == tifffile.PHOTOMETRIC.PALETTE and array.ndim == 2:
            return (page.colormap[:, array] >> 8).astype(np.uint8).transpose(1, 2, 0)
        # extra samples of kind 1 and 2 are alpha
        if array.ndim == 3 and any(int(kind) in (1, 2) for kind in page.extrasamples):
            array = array[..., : -len(page.extrasamples)]
        return array


def _read_npy(data: Data) -> np.ndarray:
    start = _npy_start(data)
    shape, fortran_order, dtype = _npy_header(bytes(data[:start]))
    count = math.prod(shape)
    # a pickle, or a claim that would make an array before anybody sees that the file is too short for it
    if dtype.hasobject or start + count * dtype.itemsize > len(data):
        raise ValueError(f"claims shape {shape} of {dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran_order else "C")


def _npy_start(data: Data) -> int:
    # where the array begins, from the length of the header and the version of the format before it
    return 12 + int.from_bytes(data[8:12], "little") if data[6] > 1 else 10 + int.from_bytes(data[8:10], "little")


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    # parsing takes longer than all else; the samples of a data set mostly share one header
    file = io.BytesIO(header)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    return read[min(2, np.lib.format.read_magic(file)[0])](file)


def read_npz(stream: BinaryIO, keys: tuple[str, ...], limits: Limits) -> np.ndarray:
    """Reads the array of one of the keys, or the only one, out of a .npz; raises ValueError, TooLarge among them."""
    with zipfile.ZipFile(stream) as archive:
        names = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        found = [key for key in keys if key in names] or (list(names) if len(names) == 1 else [])
        if not found:
            raise ValueError(f"holds {', '.join(names) or 'no arrays'}; looked for {', '.join(keys)}")
        member = archive.getinfo(names[found[0]])
        limits.check_bytes(member.file_size)
        # of others one piece may unpack to any size
        if member.compress_type not in ZIP_METHODS:
            raise ValueError("is compressed otherwise than numpy compresses")
        if member.file_size > DEFLATE_RATIO * member.compress_size + DEFLATE_RATIO:
            raise ValueError(f"claims {member.file_size} bytes out of {member.compress_size}")
        with archive.open(member) as file:
            # what it claims to be, before it is unpacked
            start = file.read(12)
            start += file.read(_npy_start(start) - 12)
            shape, _, _ = _npy_header(start)
            if len(shape) > 1:
                limits.check(*shape[:2])
            # what is beyond the size that the archive's directory gives is not unpacked
            return _read_npy(start + file.read())


@lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Gives the bytes that numpy writes before an array of this shape and dtype."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(np.empty(shape, dtype)))
    return file.getvalue()
