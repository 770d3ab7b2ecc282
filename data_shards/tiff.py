"""Open untrusted TIFF files: everything a file claims is bounded before tifffile, which trusts it, reads the file.

The bounds cover the directories and their tags, the planes of an OME description, and each tile's or strip's shape compared
with its image. While a tile is unpacked, they cover the size of an image inside it.
"""

import io
import math
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from deepskip.data_shards import png
from deepskip.data_shards.pictures import ORIENTATION_TAG

# Pages are mostly bands.
MAX_PAGES = 4096
# Tags of all directories, including those of pyramid levels and EXIF.
MAX_TAGS = 2**18
# Numbers in tags become Python objects: this many are allowed, plus one for this many pixels of the largest image.
FREE_NUMBERS, PIXELS_PER_NUMBER = 2**16, 32
# Bytes of a description, which is mostly XML.
MAX_TEXT = 2**22
# A piece (tile or strip) may unpack to this many times its image's size, or to this many bytes: small images have full tiles.
MAX_MARGIN, FREE_BYTES = 4, 2**25
# The pieces of all pages together may have this many times the file's size, plus these bytes: empty pieces share their bytes.
MAX_SHARING, FREE_PIECES = 16, 2**26
# Scans of a JPEG in a piece; progressive ones have about ten.
TILE_SCANS = 20
# Options by which formats that locate their images by other means than directories are read as plain TIFF.
PLAIN = {"_multifile": False, "is_mmstack": False, "is_ndtiff": False}
# Bits of a page's NewSubfileType: a mask of valid pixels; or that, or a smaller version of another page.
MASK, NOT_AN_IMAGE = 4, 1 | 4
# Tags that hold offsets of more directories: SubIFDs, EXIF, GPS, interoperability.
NESTED = (330, 34665, 34853, 40965)
DESCRIPTION = 270
GDAL_NODATA = 42113
# Kinds of extra samples that are transparency.
ALPHA = (1, 2)
# Bytes of a value by its type; types 1, 2 and 7 are read as bytes.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
AS_BYTES = (1, 2, 7)
# TIFF compressions whose decoders fill a buffer of the tile's size and no more.
BOUNDED_COMPRESSION = ("NONE", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "LZMA", "ZSTD", "CCITTFAX3", "CCITTFAX4")
# Formats of images inside a tile, which have a size of their own.
TILE_FORMATS = ("JPEG", "PNG", "WEBP", "JPEG2000")
JPEG_2000_SIZE = b"\xff\x4f\xff\x51"


class TiffError(ValueError):
    """A TIFF that is not read for what it claims; the message says what."""


@contextmanager
def open_tiff(source: Path | bytes | memoryview, pixels: int) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF whose directories and description are within bounds.

    Other files that an OME description names are not opened. Formats that tifffile knows and that locate their images by other
    means than directories are read as plain TIFF.

    Args:
        source: Path or contents of the file.
        pixels: Largest number of pixels of an image.

    Yields:
        The open file.

    Raises:
        TiffError: If the file claims more than is read.
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as stream:
        check_directories(stream, FREE_NUMBERS + pixels // PIXELS_PER_NUMBER)
        stream.seek(0)
        with tifffile.TiffFile(stream, **PLAIN) as file:
            if file.is_ome:
                check_ome(file.ome_metadata or "", len(file.pages), file.pages.first.size)
            if not file.is_shaped or len(file.series) == 1:
                yield file
                return
        # Written page by page, each with its own shape: alike pages are joined.
        stream.seek(0)
        with tifffile.TiffFile(stream, **PLAIN, is_shaped=False) as file:
            yield file


def series_of(file: tifffile.TiffFile) -> Any:
    """Return the first series of a TIFF, which is its image.

    Args:
        file: The open file.

    Raises:
        TiffError: If pages of the same size hold values of another type; overviews and mask pages do not count.
    """
    first, *others = file.series
    sides = sides_of(first)
    for other in others:
        if other.dtype != first.dtype and sides_of(other) == sides and not other.keyframe.subfiletype & NOT_AN_IMAGE:
            raise TiffError(f"its pages hold values of {first.dtype} and {other.dtype}; write all as one type")
    return first


def mask_of(file: tifffile.TiffFile, series: Any) -> Any | None:
    """Return the series that masks the valid pixels of another, as GDAL writes it; None without one.

    Args:
        file: The open file.
        series: Series of the image.
    """
    sides = sides_of(series)
    return next((each for each in file.series if each.keyframe.subfiletype & MASK and sides_of(each) == sides), None)


def colours_of(page: Any) -> np.ndarray:
    """Return the palette of a page (n, 3) uint8; libtiff, too, takes maps of 8 bits in place of 16."""
    colours: np.ndarray = (page.colormap >> (8 if page.colormap.max() > 255 else 0)).astype(np.uint8).T
    return colours


def sides_of(series: Any) -> dict[str, int]:
    """Return the height and width of a series."""
    return {axis: length for axis, length in zip(series.axes, series.shape, strict=True) if axis in "YX"}


def check_directories(stream: BinaryIO, numbers: int) -> None:
    """Walk over all directories of a TIFF and raise TiffError if they hold more than is read.

    Args:
        stream: The open file.
        numbers: Largest number of values in all tags together.

    Raises:
        TiffError: If the file is not a TIFF, its directories form a loop, or there are too many pages, tags or values.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    header = stream.read(16).ljust(16, b"\0")
    order = {b"II": "<", b"MM": ">"}.get(header[:2])
    version = struct.unpack(f"{order}H", header[2:4])[0] if order else 0
    if version not in (42, 43):
        raise TiffError("it does not begin like a TIFF")
    # Count of tags, one tag, offset of the next directory, and number of bytes of a value that fit into the tag itself.
    count, tag, place, inline = (
        (struct.Struct(f"{order}H"), struct.Struct(f"{order}HHI4s"), struct.Struct(f"{order}I"), 4)
        if version == 42
        else (struct.Struct(f"{order}Q"), struct.Struct(f"{order}HHQ8s"), struct.Struct(f"{order}Q"), 8)
    )
    waiting = [(place.unpack_from(header, 4 if version == 42 else 8)[0], True)]
    seen: set[int] = set()
    pages = tags = values = 0
    while waiting:
        at, is_page = waiting.pop()
        # An offset outside the file ends the chain, as in tifffile.
        if not 0 < at <= size - count.size:
            continue
        if at in seen:
            raise TiffError(f"its directories form a loop, at byte {at}")
        seen.add(at)
        pages += is_page
        if pages > MAX_PAGES or len(seen) > 2 * MAX_PAGES:
            raise TiffError(f"it has more than {MAX_PAGES} pages; at most {MAX_PAGES} are read")
        stream.seek(at)
        n = count.unpack(stream.read(count.size))[0]
        tags += n
        if tags > MAX_TAGS:
            raise TiffError(f"its directories have more than {MAX_TAGS} tags")
        entries = stream.read(n * tag.size)
        following = stream.read(place.size)
        for code, kind, number, value in tag.iter_unpack(entries[: len(entries) // tag.size * tag.size]):
            length = number * SIZES.get(kind, 1)
            if length > inline:
                if length > size:
                    raise TiffError(f"its tag {code} claims {length} bytes in a file of {size}")
                values += number if kind not in AS_BYTES else number // 64
            if values > numbers:
                raise TiffError(f"its tags hold more than {numbers} numbers")
            if code == DESCRIPTION and length > MAX_TEXT:
                raise TiffError(f"its description has {length} bytes; at most {MAX_TEXT} are read")
            if code in NESTED:
                waiting += [(each, False) for each in nested(stream, place, number, value, inline)]
        if is_page and len(following) == place.size:
            waiting.append((place.unpack(following)[0], True))


def nested(stream: BinaryIO, place: struct.Struct, number: int, value: bytes, inline: int) -> list[int]:
    """Return the offsets of the directories that a tag's value names.

    Args:
        stream: The open file.
        place: Format of an offset.
        number: Number of offsets.
        value: Value of the tag, or the offset of its values.
        inline: Number of bytes of a value that are stored in the tag itself.

    Raises:
        TiffError: If there are too many.
    """
    if number > MAX_PAGES:
        raise TiffError(f"it has {number} directories within one; at most {MAX_PAGES} are read")
    if number * place.size > inline:
        stream.seek(place.unpack(value)[0])
        value = stream.read(number * place.size)
    return [each for (each,) in place.iter_unpack(value[: min(number, len(value) // place.size) * place.size])]


def check_ome(text: str, pages: int, size: int) -> None:
    """Raise TiffError if an OME description has more planes than are read.

    Args:
        text: The description.
        pages: Number of pages of the file.
        size: Number of values of its first page.

    Raises:
        TiffError: If the description has too many planes, entities, or axes given by start and end.
    """
    if re.search(r"<!(DOCTYPE|ENTITY)", text):
        raise TiffError("its OME description declares entities")
    # tifffile would make an array of numbers for each such axis, as long as it claims.
    if "Along" in text and re.search(r"\bStart\s*=", text):
        raise TiffError("its OME description has axes by start and end, which are not read")
    sides = {axis: max(numbers(text, f"Size{axis}"), default=1) for axis in "XYZCT"}
    planes = sides["Z"] * sides["C"] * sides["T"]
    values = planes * sides["X"] * sides["Y"] * max(numbers(text, "SamplesPerPixel"), default=1)
    if planes > MAX_PAGES or values > 4 * MAX_PAGES * size:
        raise TiffError(f"its OME description has {planes} planes; at most {MAX_PAGES} are read")
    named = sum(numbers(text, "(?:NumPlanes|PlaneCount)"))
    # Each TiffData element without numbers refers to all pages.
    pieces = re.findall(r"TiffData\b[^>]*", text)
    unsaid = sum(not re.search("NumPlanes|PlaneCount|IFD", piece) for piece in pieces)
    places = max(numbers(text, "(?:IFD|First[ZCT])"), default=0)
    if max(named + unsaid * pages, len(pieces)) > 4 * MAX_PAGES or places > MAX_PAGES:
        raise TiffError(f"its OME description names more than {MAX_PAGES} planes")


def numbers(text: str, name: str) -> list[int]:
    """Return the values of an XML attribute in a text; a value that is not a plain number counts as too large."""
    found = re.findall(rf"\b{name}\s*=\s*[\"']([^\"']*)[\"']", text)
    return [int(value) if re.fullmatch(r"\d{1,9}", value) else 2**31 for value in found]


def said(page: Any, bands: int) -> dict[str, Any]:
    """Return what a page says about its numbers, as arguments of `Picture`.

    The orientation counts only if the file has no position on a map: GDAL rotates no maps.

    Args:
        page: A page of tifffile.
        bands: Number of bands of the image.
    """
    first = bands - len(page.extrasamples)
    nodata = page.tags.get(GDAL_NODATA)
    turned = page.tags.get(ORIENTATION_TAG)
    on_a_map = any(page.tags.get(code) is not None for code in (34264, 33922))
    return {
        "alpha": tuple(first + i for i, kind in enumerate(page.extrasamples) if int(kind) in ALPHA and bands > 1),
        "orientation": int(turned.value) if turned and not on_a_map and turned.value in range(1, 9) else 1,
        "white_is_zero": page.bitspersample if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE else 0,
        "nodata": number(nodata.value) if nodata is not None else None,
    }


def number(text: Any) -> float | None:
    """Parse GDAL's no-data value; None if it is not a number."""
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return None


def guard(series: Any, size: int) -> None:
    """Bound what the tiles and strips of a series unpack to, now and as each one is decoded.

    Args:
        series: A series of tifffile.
        size: Size of the file in bytes.

    Raises:
        TiffError: If the pieces claim to unpack to too much.
    """
    pages = [page for page in series.pages if page is not None]
    for key in {id(page.keyframe): page.keyframe for page in pages}.values():
        piece = math.prod(key.chunks) * key.dtype.itemsize
        if piece > max(MAX_MARGIN * key.nbytes, FREE_BYTES):
            shape = " x ".join(map(str, key.chunks))
            raise TiffError(f"a tile or strip of {shape} unpacks to {piece} bytes for an image of {key.nbytes}")
        if key.compression.name not in BOUNDED_COMPRESSION:
            key.__dict__["decode"] = bounded(key.decode, key)
    together = sum(sum(page.databytecounts) for page in pages)
    if together > MAX_SHARING * size + FREE_PIECES:
        raise TiffError(f"its tiles or strips have {together} bytes together in a file of {size}")


def bounded(decode: Callable[..., Any], page: Any) -> Callable[..., Any]:
    """Return a page's decoder with a check of the size of the image inside each tile before it is decoded."""
    height, width = page.chunks[:2] if len(page.chunks) > 1 else (1, 1)

    def look_and_decode(data: bytes | None, *arguments: Any, **options: Any) -> Any:
        if data:
            check_tile(data, height, width, page.compression.name)
        return decode(data, *arguments, **options)

    return look_and_decode


def check_tile(data: bytes, height: int, width: int, compression: str) -> None:
    """Raise TiffError if the image inside a tile is larger than the tile, or its size cannot be determined.

    Args:
        data: Contents of the tile.
        height: Height of the tile in pixels.
        width: Width of the tile in pixels.
        compression: Name of the compression, for messages.

    Raises:
        TiffError: If the image is too large, of an unknown size, or a JPEG of too many scans.
        ValueError: If the rows of a PNG unpack to more bytes than its pixels have.
    """
    try:
        with Image.open(io.BytesIO(data), formats=TILE_FORMATS) as tile:
            sizes = [(tile.height, tile.width)]
            kind = tile.format
    except UnidentifiedImageError:
        raise TiffError(
            f"has tiles of {compression}, whose size cannot be determined before they are unpacked"
        ) from None
    if kind == "JPEG2000":
        # The boxes around the codestream may claim another size than the codestream.
        for at in (match.end() for match in re.finditer(re.escape(JPEG_2000_SIZE), data)):
            right, bottom, left, top = struct.unpack(">4I", data[at + 4 : at + 20].ljust(16, b"\0"))
            sizes.append((bottom - top, right - left))
    if kind == "PNG":
        png.check_rows(data)
    if kind in ("JPEG", "MPO"):
        check_scans(data, TILE_SCANS)
    for found in sizes:
        if found[0] > height or found[1] > width:
            raise TiffError(f"a tile of {height} x {width} holds an image of {found[0]} x {found[1]}")


def check_scans(data: bytes, most: int) -> None:
    """Raise TiffError if a JPEG has more than `most` scans, each of which takes as long to decode as a whole image."""
    # Within compressed data 0xff is followed by 0, so this counts markers only.
    scans = data.count(b"\xff\xda")
    if scans > most:
        raise TiffError(f"it has {scans} scans; at most {most} are read")
