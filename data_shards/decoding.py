"""Decode images and masks of untrusted files: the size that a file unpacks to is known, and bounded, before unpacking."""

import io
import math
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from deepskip.data_shards import png, tiff, tiles
from deepskip.data_shards.entries import FORMATS
from deepskip.data_shards.labels import AS_LABELS, Values
from deepskip.data_shards.pictures import AS_IT_COMES, ORIENTATION_TAG, Picture, Reading, image_of

EXTENSIONS = FORMATS
# Names of an array in a .npz.
IMAGE_KEYS = ("image", "cube", "data")
MASK_KEYS = ("mask", "masks", "label", "labels")
# Bounds on what a small file may unpack to.
MAX_PIXELS = 2**28
MAX_BYTES = 2**31
# Scans of a JPEG: progressive files have about ten, and each takes as long as a whole image. Large images get fewer.
MAX_SCANS, LARGEST_SCANS = 100, 20
# Bits of a grey PNG, and the factor by which pillow stretches its values.
SHORT = {2: 85, 4: 17}
END_OF_JPEG = b"\xff\xd9"
PICTURES = ("png", "jpg", "jpeg", "bmp", "gif")
# The compression methods that numpy uses for archives.
# Bytes before the header of a .npy, and the length of that.
NPY_HEAD = 12
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# The highest compression ratio of deflate.
DEFLATE_RATIO = 1032

# This module checks its own bound before unpacking; pillow's would only warn.
Image.MAX_IMAGE_PIXELS = None

Data = bytes | memoryview


@dataclass(frozen=True)
class Limits:
    """Bounds on what an image may unpack to.

    Attributes:
        pixels: Largest number of pixels, height x width.
        bytes: Largest number of bytes, checked for formats in which a small file can hide a large array.
    """

    pixels: int = MAX_PIXELS
    bytes: int = MAX_BYTES

    def check(self, height: int, width: int) -> None:
        """Raise TooLarge if an image has more pixels than allowed."""
        if height * width > self.pixels:
            raise TooLarge(f"has {height} x {width} pixels; at most {self.pixels} are read")

    def check_image(self, height: int, width: int, count: int) -> None:
        """Raise TooLarge if an image has more pixels or bytes than allowed."""
        self.check(height, width)
        self.check_bytes(count)

    def check_bytes(self, count: int) -> None:
        """Raise TooLarge if an array has more bytes than allowed."""
        if count > self.bytes:
            raise TooLarge(f"unpacks to {count} bytes; at most {self.bytes} are read")


LIMITS = Limits()


class TooLarge(ValueError):
    """An image that unpacks to more than is read; the message says how much."""


def decode_image(
    extension: str, data: Data, limits: Limits = LIMITS, bands: int | None = None, reading: Reading = AS_IT_COMES
) -> np.ndarray:
    """Decode an image into an array (height, width, bands).

    Palettes are applied, pages of a TIFF become bands, and an image is rotated as its file says.

    Args:
        extension: File extension without a dot, such as "png".
        data: Contents of the file.
        limits: Bounds on the size of the image.
        bands: Expected number of bands, which helps to tell transparency from data.
        reading: How transparency, orientation and missing values are handled.

    Returns:
        Image (height, width, bands) of the file's dtype; with reading.missing it may become float32 or float64.

    Raises:
        TooLarge: If the image unpacks to more than `limits`.
        ValueError: If the file cannot be decoded or is not an image of real numbers; says why.
    """
    return image_of(read_image(extension, data, limits), reading, bands)


def read_image(extension: str, data: Data, limits: Limits = LIMITS) -> Picture:
    """Decode an image as its file stores it.

    Args:
        extension: File extension without a dot, such as "png".
        data: Contents of the file.
        limits: Bounds on the size of the image.

    Returns:
        The numbers, (H, W) or (H, W, bands), and what the file says about them.

    Raises:
        TooLarge: If the image unpacks to more than `limits`.
        ValueError: If the file cannot be decoded or is not an image of real numbers; says why.
    """
    picture = _decode(extension, data, False, IMAGE_KEYS, limits)
    require_numbers(picture.array, "an image is (height, width) or (height, width, bands), of integers or real numbers")
    limits.check(*picture.array.shape[:2])
    return picture


def read_mask(extension: str, data: Data) -> Picture:
    """Decode a mask as its file stores it.

    Raises:
        ValueError: If the file cannot be decoded, is too large or is not an array of numbers; says why.
    """
    picture = _decode(extension, data, True, MASK_KEYS, LIMITS)
    require_numbers(picture.array, "a mask is (height, width), of integers")
    return picture


def require_numbers(array: np.ndarray, wanted: str) -> None:
    """Raise ValueError, which says what is wanted, unless an array (*,) has two or three axes and holds numbers."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"has shape {array.shape}; {wanted}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"has dtype {array.dtype}; {wanted}")


def decode_mask(extension: str, data: Data, values: Values = AS_LABELS) -> np.ndarray:
    """Decode a mask into integer values.

    The values of a palette image are its indices, except for a palette of black and white.

    Args:
        extension: File extension without a dot, such as "png".
        data: Contents of the file.
        values: How colours, soft edges and files in which 0 is white are handled.

    Returns:
        Mask (height, width), uint8 if the values fit, else int32.

    Raises:
        ValueError: If the file cannot be decoded or does not hold labels; says why.
    """
    return values.of(read_mask(extension, data))


def _decode(extension: str, data: Data, labels: bool, keys: tuple[str, ...], limits: Limits) -> Picture:
    """Decode a file of any known format.

    Args:
        extension: File extension without a dot.
        data: Contents of the file.
        labels: Whether palette indices are wanted instead of colours.
        keys: Names to look for in a .npz.
        limits: Bounds on the size of the array.

    Raises:
        TooLarge: If the file unpacks to more than `limits`.
        ValueError: If the file cannot be decoded, or the extension is unknown.
    """
    try:
        if extension in PICTURES:
            return _read_picture(bytes(data), labels, limits)
        if extension in ("tif", "tiff"):
            return _read_tiff(data, labels, limits)
        if extension == "npy":
            return Picture(_read_npy(data))
        if extension == tiles.FORMAT:
            array = tiles.decode(data, limits.check_image)
            return Picture(array[..., 0] if array.shape[2] == 1 else array)
        if extension == "npz":
            return Picture(read_npz(io.BytesIO(data), keys, limits))
    except TooLarge as error:
        raise TooLarge(f"the {extension} file does not decode: {error}") from error
    # Decoders fail in many ways on bytes that are not an image.
    except Exception as error:
        raise ValueError(f"the {extension} file does not decode: {error}") from error
    raise ValueError(f"is a .{extension} file; images and masks are {', '.join(EXTENSIONS)}")


def _read_picture(data: bytes, labels: bool, limits: Limits) -> Picture:
    """Decode a PNG, JPEG, BMP or GIF, whatever its extension; of several images in a JPEG the first."""
    if data.startswith(png.MAGIC):
        data, orientation = png.essential(data)
        if png.is_plain(data):
            limits.check(*png.shape(data))
            array = png.decode_plain(data)
            return Picture(array, (array.shape[2] - 1,) if png.has_alpha(data) else (), True, orientation)
    try:
        opened = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP", "GIF"))
    except UnidentifiedImageError as error:
        raise ValueError("it is no whole PNG, JPEG, BMP or GIF file") from error
    with opened as image:
        limits.check(image.height, image.width)
        if image.format == "JPEG":
            pixels = max(1, image.height * image.width)
            tiff.check_scans(data, min(MAX_SCANS, LARGEST_SCANS * limits.pixels // pixels))
        if image.format == "GIF" and getattr(image, "is_animated", False):
            raise ValueError("it holds several images; write the one to use to a file of its own")
        found = image.getexif().get(ORIENTATION_TAG, 1)
        orientation = found if found in range(1, 9) else 1
        # GIF writers renumber colours, so their indices have no meaning.
        by_index = labels and image.format != "GIF"
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3) if by_index and image.mode == "P" else None
        if image.format == "JPEG" and image.mode in ("L", "RGB") and data.endswith(END_OF_JPEG):
            # The same library as Pillow's, and the same values, without its copies. Pillow alone tells that a file is cut off.
            return Picture(imagecodecs.jpeg8_decode(data), (), True, orientation)
        array, alpha = _pixels(image, by_index)
        if labels and image.format == "PNG" and data[25] == 0 and data[24] in SHORT:
            # Undo pillow's stretching to 8 bits.
            array = array // SHORT[data[24]]
        if image.format == "GIF" and array.ndim == 3 and (array == array[..., :1]).all():
            array, alpha = array[..., 0], ()
    return Picture(array, alpha, True, orientation, palette=palette)


def _pixels(image: Image.Image, labels: bool) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return Pillow's pixels, (H, W) or (H, W, bands), and which of the bands are transparency."""
    if image.mode == "P" and labels:
        return np.asarray(image), ()
    if image.mode == "1":
        return np.asarray(image.convert("L")), ()
    if image.mode in ("LA", "RGBA"):
        return np.asarray(image), (len(image.mode) - 1,)
    if image.mode in ("L", "RGB", "F", "I") or image.mode.startswith("I;16"):
        return np.asarray(image), ()
    # A palette with transparent colours.
    if image.mode == "P" and "transparency" in image.info:
        return np.asarray(image.convert("RGBA")), (3,)
    return np.asarray(image.convert("RGB")), ()


def _read_tiff(data: Data, labels: bool, limits: Limits) -> Picture:
    with tiff.open_tiff(data, limits.pixels) as file:
        series = tiff.series_of(file)
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
        invalid = None if labels else _invalid(file, series, len(data), limits)
        array = series.asarray().reshape([length for _, length in axes])
        # Move the bands to the last axis.
        array = np.transpose(array, sorted(range(len(names)), key=lambda i: "YX".find(names[i]) % 3))
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and array.ndim == 2:
            colours = tiff.colours_of(page)
            said = tiff.said(page, 1) | {"invalid": invalid}
            if labels:
                return Picture(array, palette=colours, **said)
            if said["nodata"] is not None and (missing := array == said["nodata"]).any():
                # The index means "no value"; it is not a colour component.
                array, said["nodata"] = (
                    np.where(missing[..., None], np.nan, colours[array]).astype(np.float32),
                    math.nan,
                )
                return Picture(array, **said)
            return Picture(colours[array], **(said | {"nodata": None}))
        return Picture(array, **tiff.said(page, array.shape[2] if array.ndim == 3 else 1), invalid=invalid)


def _invalid(file: tifffile.TiffFile, series: Any, size: int, limits: Limits) -> np.ndarray | None:
    """Return where the mask of a series says that pixels are not valid (H, W) bool, or None if all are."""
    mask = tiff.mask_of(file, series)
    if mask is None:
        return None
    limits.check_bytes(mask.nbytes)
    tiff.guard(mask, size)
    sides = tiff.sides_of(mask)
    valid: np.ndarray = mask.asarray().reshape(sides["Y"], sides["X"]) != 0
    return None if valid.all() else ~valid


def _read_npy(data: Data) -> np.ndarray:
    if len(data) < NPY_HEAD:
        raise ValueError(f"has {len(data)} bytes, less than a header")
    start = _npy_start(data)
    shape, fortran_order, dtype = _npy_header(bytes(data[:start]))
    count = math.prod(shape)
    # A pickle, or a claimed size that would allocate memory before the file turns out to be too short.
    if dtype.hasobject or start + count * dtype.itemsize > len(data):
        raise ValueError(f"claims shape {shape} of {dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran_order else "C")


def _npy_start(data: Data) -> int:
    # The offset of the array, from the format version and the header's length that precedes it.
    return 12 + int.from_bytes(data[8:12], "little") if data[6] > 1 else 10 + int.from_bytes(data[8:10], "little")


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    # Parsing is the slowest part; most samples of a data set share one header.
    file = io.BytesIO(header)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    return read[min(2, np.lib.format.read_magic(file)[0])](file)


def read_npz(stream: BinaryIO, keys: tuple[str, ...], limits: Limits) -> np.ndarray:
    """Read one array from a .npz: the first of the keys that it has, or its only array.

    Args:
        stream: The open archive.
        keys: Names to look for, in this order.
        limits: Bounds on the array's pixels and bytes.

    Returns:
        The array, of any shape (*,) and dtype without objects.

    Raises:
        TooLarge: If the array unpacks to more than `limits`.
        ValueError: If there is no such array, or the archive is not one that numpy writes.
    """
    with zipfile.ZipFile(stream) as archive:
        names = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        found = [key for key in keys if key in names] or (list(names) if len(names) == 1 else [])
        if not found:
            raise ValueError(f"holds {', '.join(names) or 'no arrays'}; looked for {', '.join(keys)}")
        member = archive.getinfo(names[found[0]])
        limits.check_bytes(member.file_size)
        # With other methods a small piece may unpack to any size.
        if member.compress_type not in ZIP_METHODS:
            raise ValueError("is compressed by a method that numpy does not use; save it with numpy.savez_compressed")
        if member.file_size > DEFLATE_RATIO * member.compress_size + DEFLATE_RATIO:
            raise ValueError(f"claims {member.file_size} bytes out of {member.compress_size}")
        with archive.open(member) as file:
            # Check the claimed shape before anything is unpacked.
            start = file.read(12)
            start += file.read(_npy_start(start) - 12)
            shape, _, _ = _npy_header(start)
            if len(shape) > 1:
                limits.check(*shape[:2])
            # Nothing beyond the size in the archive's directory is unpacked.
            return _read_npy(start + file.read())


@lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the bytes that numpy writes before an array of this shape and dtype."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(np.empty(shape, dtype)))
    return file.getvalue()
