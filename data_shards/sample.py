"""What a sample is, and its safe encoding and decoding: bytes come from strangers, nothing in them is run or trusted."""

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from deepskip.data_shards.index import FORMATS

EXTENSIONS = FORMATS
IMAGE_KEYS = ("image", "cube", "data")
MASK_KEYS = ("mask", "masks", "label", "labels")
# bounds what a small file may unpack to
MAX_PIXELS = 2**28
MAX_BYTES = 2**31
# pages of a TIFF: bands, mostly
MAX_PAGES = 4096
# scans of a JPEG: progressive ones have about ten, and each takes as long as a whole image
MAX_SCANS = 100
# what TIFF knows of that fills a buffer of the tile's size, and no larger one
BOUNDED_COMPRESSION = ("NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "LZMA", "ZSTD", "CCITTFAX3", "CCITTFAX4")
# and images within the image, which have a size of their own
TILE_FORMATS = ("JPEG", "PNG", "WEBP", "JPEG2000")

# the bound is ours, checked before anything is unpacked; pillow's own would only warn
Image.MAX_IMAGE_PIXELS = None
# what becomes of a sample that cannot be used
ON_BAD_SAMPLE = ("error", "skip")
# axes of arrays of images
LAYOUTS = ("NHWC", "NCHW", "NHW")


Data = bytes | memoryview


@dataclass(frozen=True)
class Sample:
    """One image with its mask, on its way into a shard.

    image_HWC: (height, width, bands), any real dtype. mask_HW: integer labels. stored_image: (extension, bytes) of the
    image where its file can go into the shard as it is.
    """

    key: str
    image_HWC: np.ndarray
    mask_HW: np.ndarray
    stored_image: tuple[str, bytes] | None = None


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


class BadSample(ValueError):
    """A sample that cannot be used; says which one and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        # loader processes send their errors pickled
        return type(self), (self.shard, self.key, self.reason)


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


def encode_image(image_HWC: np.ndarray) -> tuple[str, bytes]:
    """Encodes an image without loss: PNG for 8 bits and 1 or 3 bands, else .npy; gives (extension, bytes)."""
    if image_HWC.dtype == np.uint8 and image_HWC.shape[2] in (1, 3):
        return "png", _png(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)
    return "npy", _npy(image_HWC)


def encode_mask(mask_HW: np.ndarray) -> tuple[str, bytes]:
    """Encodes labels 0 to 255 as PNG; gives (extension, bytes)."""
    if mask_HW.min() < 0 or mask_HW.max() > 255:
        raise ValueError(f"labels {mask_HW.min()} to {mask_HW.max()} do not fit 0 to 255")
    return "png", _png(mask_HW.astype(np.uint8))


def _decode(
    extension: str,
    data: Data,
    picture: Callable[[Image.Image], np.ndarray],
    keys: tuple[str, ...],
    limits: Limits,
) -> np.ndarray:
    try:
        if extension in ("png", "jpg", "jpeg"):
            if extension == "png" and (plain := _plain_png(data, limits)) is not None:
                return plain
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                limits.check(image.height, image.width)
                # within compressed data 0xff is followed by 0, so this counts no pixels
                if image.format == "JPEG" and (scans := bytes(data).count(b"\xff\xda")) > MAX_SCANS:
                    raise ValueError(f"it has {scans} scans; at most {MAX_SCANS} are read")
                return picture(image)
        if extension in ("tif", "tiff"):
            return _read_tiff(data, picture is _picture, limits)
        if extension == "npy":
            return _read_npy(data)
        if extension == "npz":
            return _read_npz(data, keys, limits)
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


def _plain_png(data: Data, limits: Limits) -> np.ndarray | None:
    """Decodes grey and colour of 8 bits, and colour of 16; gives None for what pillow must see to."""
    # depth and colour type at bytes 24 and 25: 0 is grey, 2 colour, 4 and 6 the same with alpha
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 26:
        return None
    # pillow reads 16-bit colour as 8 bits without a word, and takes nearly twice as long for 8 bits
    if (data[24], data[25]) not in ((8, 0), (8, 2), (16, 2), (16, 6)):
        return None
    contents = bytes(data)
    if b"eXIf" in contents:
        return None
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    limits.check(height, width)
    array = imagecodecs.png_decode(contents)
    if array.ndim == 2:
        return array
    # transparency, from an alpha channel or a transparent colour, comes last
    return array[..., 0] if array.shape[2] <= 2 else array[..., :3]


def _read_tiff(data: Data, palette: bool, limits: Limits) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.pages) > MAX_PAGES:
            raise ValueError(f"it has {len(file.pages)} pages; at most {MAX_PAGES} are read")
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
        for each in series.pages:
            _check_tiles(each, data)
        array = series.asarray().reshape([length for _, length in axes])
        # bands last, wherever they were
        array = np.transpose(array, sorted(range(len(names)), key=lambda i: "YX".find(names[i]) % 3))
        if palette and page.photometric == tifffile.PHOTOMETRIC.PALETTE and array.ndim == 2:
            return (page.colormap[:, array] >> 8).astype(np.uint8).transpose(1, 2, 0)
        # extra samples of kind 1 and 2 are alpha
        if array.ndim == 3 and any(int(kind) in (1, 2) for kind in page.extrasamples):
            array = array[..., : -len(page.extrasamples)]
        return array


def _check_tiles(page: tifffile.TiffPage | tifffile.TiffFrame | None, data: Data) -> None:
    """Raises ValueError where a tile of a TIFF would unpack to more than its place in the image."""
    if page is None or page.keyframe.compression.name in BOUNDED_COMPRESSION:
        return
    height, width = page.keyframe.chunks[:2] if len(page.keyframe.chunks) > 1 else (1, 1)
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if not count:
            continue
        try:
            with Image.open(io.BytesIO(data[offset : offset + count]), formats=TILE_FORMATS) as tile:
                size = tile.height, tile.width
        except UnidentifiedImageError:
            name = page.keyframe.compression.name
            raise ValueError(f"has tiles of {name}, whose size cannot be seen before they are unpacked") from None
        if size[0] > height or size[1] > width:
            raise ValueError(f"a tile of {height} x {width} holds an image of {size[0]} x {size[1]}")


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


def _read_npz(data: Data, keys: tuple[str, ...], limits: Limits) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        found = [key for key in keys if key in names] or (list(names) if len(names) == 1 else [])
        if not found:
            raise ValueError(f"holds {', '.join(names) or 'no arrays'}; looked for {', '.join(keys)}")
        member = archive.getinfo(names[found[0]])
        limits.check_bytes(member.file_size)
        with archive.open(member) as file:
            # what it claims to be, before it is unpacked
            start = file.read(12)
            start += file.read(_npy_start(start) - 12)
            shape, _, _ = _npy_header(start)
            if len(shape) > 1:
                limits.check(*shape[:2])
            return _read_npy(start + file.read())


@lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Gives the bytes that numpy writes before an array of this shape and dtype."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(np.empty(shape, dtype)))
    return file.getvalue()


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
