"""Decodes images and masks of strangers into arrays: what a file unpacks to is known, and bounded, before it is unpacked."""

import io
import math
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image

from deepskip.data_shards import png, tiff
from deepskip.data_shards.index import FORMATS
from deepskip.data_shards.labels import AS_LABELS, Values
from deepskip.data_shards.pictures import AS_IT_COMES, ORIENTATION_TAG, Picture, Reading, image_of

EXTENSIONS = FORMATS
# of an array in a .npz
IMAGE_KEYS = ("image", "cube", "data")
MASK_KEYS = ("mask", "masks", "label", "labels")
# bounds what a small file may unpack to
MAX_PIXELS = 2**28
MAX_BYTES = 2**31
# scans of a JPEG: progressive ones have about ten, and each takes as long as a whole image; of the largest images fewer
MAX_SCANS, LARGEST_SCANS = 100, 20
# bits of a grey PNG, and by what its values are stretched
SHORT = {2: 85, 4: 17}
PICTURES = ("png", "jpg", "jpeg", "bmp", "gif")
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


def decode_image(
    extension: str, data: Data, limits: Limits = LIMITS, bands: int | None = None, reading: Reading = AS_IT_COMES
) -> np.ndarray:
    """Decodes an image into (height, width, bands); raises ValueError that says what is wrong with it, TooLarge among them.

    bands: how many are expected, which tells transparency from data. Palettes are applied, pages of a TIFF are bands, an image
    is turned as its file says. reading: what becomes of transparency, orientation and what has no value.
    """
    return image_of(read_image(extension, data, limits), reading, bands)


def read_image(extension: str, data: Data, limits: Limits = LIMITS) -> Picture:
    """Decodes an image as its file has it; raises ValueError that says what is wrong with it, TooLarge among them."""
    picture = _decode(extension, data, False, IMAGE_KEYS, limits)
    array = picture.array
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"has shape {array.shape}; an image is (height, width) or (height, width, bands)")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"has dtype {array.dtype}; an image is of integers or real numbers")
    limits.check(array.shape[0], array.shape[1])
    return picture


def read_mask(extension: str, data: Data) -> Picture:
    """Decodes a mask as its file has it; raises ValueError that says what is wrong with it."""
    return _decode(extension, data, True, MASK_KEYS, LIMITS)


def decode_mask(extension: str, data: Data, values: Values = AS_LABELS) -> np.ndarray:
    """Decodes a mask into integer values (height, width), uint8 where they fit, else int32; raises ValueError.

    A palette's indices are the values, but for a palette of black and white. values: what is made of colours, of soft edges,
    and of files in which 0 is white.
    """
    return values.of(read_mask(extension, data))


def _decode(extension: str, data: Data, labels: bool, keys: tuple[str, ...], limits: Limits) -> Picture:
    """Decodes a file. labels: palettes' indices are wanted. keys: names of an array in a .npz."""
    try:
        if extension in PICTURES:
            return _read_picture(bytes(data), labels, limits)
        if extension in ("tif", "tiff"):
            return _read_tiff(data, labels, limits)
        if extension == "npy":
            return Picture(_read_npy(data))
        if extension == "npz":
            return Picture(read_npz(io.BytesIO(data), keys, limits))
    except TooLarge as error:
        raise TooLarge(f"the {extension} file does not decode: {error}") from error
    # decoders fail in many ways on bytes that are no image
    except Exception as error:
        raise ValueError(f"the {extension} file does not decode: {error}") from error
    raise ValueError(f"is a .{extension} file; images and masks are {', '.join(EXTENSIONS)}")


def _read_picture(data: bytes, labels: bool, limits: Limits) -> Picture:
    """Decodes a PNG, JPEG, BMP or GIF, whatever it is called; of several pictures in a JPEG the first."""
    if data.startswith(png.MAGIC):
        data, orientation = png.essential(data)
        if png.is_plain(data):
            limits.check(*png.shape(data))
            array = png.decode_plain(data)
            return Picture(array, (array.shape[2] - 1,) if png.has_alpha(data) else (), True, orientation)
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP", "GIF")) as image:
        limits.check(image.height, image.width)
        if image.format == "JPEG":
            pixels = max(1, image.height * image.width)
            tiff.check_scans(data, min(MAX_SCANS, LARGEST_SCANS * limits.pixels // pixels))
        if image.format == "GIF" and getattr(image, "is_animated", False):
            raise ValueError("it holds several pictures; write the one that is meant to a file of its own")
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
        # who writes GIF numbers colours anew: its indices mean nothing
        by_index = labels and image.format != "GIF"
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if by_index and image.mode == "P" else None
        array, alpha = _pixels(image, by_index)
        if labels and image.format == "PNG" and data[25] == 0 and data[24] in SHORT:
            # which pillow stretches over 8 bits
            array = array // SHORT[data[24]]
        if image.format == "GIF" and array.ndim == 3 and (array == array[..., :1]).all():
            array, alpha = array[..., 0], ()
    return Picture(array, alpha, True, orientation if orientation in range(1, 9) else 1, palette=palette)


def _pixels(image: Image.Image, labels: bool) -> tuple[np.ndarray, tuple[int, ...]]:
    """Gives Pillow's pixels (H, W) or (H, W, bands), and which of them are transparency."""
    if image.mode == "P" and labels:
        return np.asarray(image), ()
    if image.mode == "1":
        return np.asarray(image.convert("L")), ()
    if image.mode in ("LA", "RGBA"):
        return np.asarray(image), (len(image.mode) - 1,)
    if image.mode in ("L", "RGB", "F", "I") or image.mode.startswith("I;16"):
        return np.asarray(image), ()
    # a palette with transparent colours
    if image.mode == "P" and "transparency" in image.info:
        return np.asarray(image.convert("RGBA")), (3,)
    return np.asarray(image.convert("RGB")), ()


def _read_tiff(data: Data, labels: bool, limits: Limits) -> Picture:
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
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and array.ndim == 2:
            colours = (page.colormap >> 8).astype(np.uint8).T
            said = tiff.said(page, 1)
            if labels:
                return Picture(array, palette=colours, **said)
            if said["nodata"] is not None and (missing := array == said["nodata"]).any():
                # an index stands for no value, and no number of a colour
                array, said["nodata"] = (
                    np.where(missing[..., None], np.nan, colours[array]).astype(np.float32),
                    math.nan,
                )
                return Picture(array, **said)
            return Picture(colours[array], **(said | {"nodata": None}))
        return Picture(array, **tiff.said(page, array.shape[2] if array.ndim == 3 else 1))


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
