"""Keep the chunks of a PNG that its pixels depend on, and decode no more than these pixels."""

import struct
import zlib

import imagecodecs
import numpy as np
from PIL import Image

from deepskip.data_shards.pictures import ORIENTATION_TAG

MAGIC = b"\x89PNG\r\n\x1a\n"
# Chunks that pixels and orientation depend on. Texts and profiles, which may unpack to any size, are skipped.
KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
MAX_PARTS = 2**18
PART = struct.Struct(">I4s")
# Samples of a pixel by colour type; types 4 and 6 have alpha.
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Pairs of (bit depth, colour type) that libspng does not know or returns with transparency.
UNLIKE_SPNG = ((16, 2), (16, 4))
# Pairs of (bit depth, colour type) that are decoded here: grey and colour of 8 bits, colour and transparency of 16 bits.
# Pillow silently reads the latter as 8 bits, and takes longer for the others.
PLAIN = ((8, 0), (8, 2), (8, 6), (16, 2), (16, 4), (16, 6))
# Interlaced images have more rows, each of which begins with one more byte.
MARGIN, STEP = 2**20, 2**20


def essential(data: bytes) -> tuple[bytes, int]:
    """Return a PNG without the chunks that its pixels do not depend on, and its orientation.

    Args:
        data: Contents of the file.

    Returns:
        The PNG, and the orientation as EXIF numbers it, 1 to 8.

    Raises:
        ValueError: If it has more than MAX_PARTS chunks.
    """
    at, found, kept = len(MAGIC), 0, [MAGIC]
    orientation, whole = 1, False
    while len(data) - at >= PART.size and not whole:
        length, kind = PART.unpack_from(data, at)
        found += 1
        if found > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS} chunks")
        # The last 4 bytes are the checksum.
        end = at + PART.size + length + 4
        if kind in KEPT:
            kept.append(data[at:end])
        if kind == b"eXIf":
            orientation = orientation_of(data[at + PART.size : end - 4])
        whole = kind == b"IEND"
        at = end
    return (data if len(kept) == found + 1 else b"".join(kept)), orientation


def orientation_of(exif: bytes) -> int:
    """Return the orientation number, 1 to 8, in EXIF data; 1 if it cannot be read."""
    try:
        found = Image.Exif()
        found.load(exif)
        said = found.get(ORIENTATION_TAG, 1)
    # Pillow raises errors of many kinds for invalid EXIF data.
    except Exception:
        return 1
    return said if said in range(1, 9) else 1


def shape(data: bytes) -> tuple[int, int]:
    """Return the height and width of a PNG.

    Raises:
        ValueError: If it has no header.
    """
    if data[12:16] != b"IHDR" or len(data) < 26:
        raise ValueError("it has no header")
    return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


def is_plain(data: bytes) -> bool:
    """Return whether `decode_plain` reads this PNG."""
    return data[12:16] == b"IHDR" and tuple(data[24:26]) in PLAIN


def has_alpha(data: bytes) -> bool:
    """Return whether a PNG's last sample is transparency."""
    return data[25] in (4, 6)


def decode_plain(data: bytes) -> np.ndarray:
    """Decode a PNG for which `is_plain` holds.

    Returns:
        Array (height, width) or (height, width, samples), where transparency is the last sample.

    Raises:
        ValueError: If the rows unpack to more bytes than the image has.
    """
    if tuple(data[24:26]) in UNLIKE_SPNG:
        check_rows(data)
        array = imagecodecs.png_decode(data)
    else:
        # Unlike libpng, libspng does not unpack what follows the last row.
        array = imagecodecs.spng_decode(data)
    # A transparent colour (tRNS) does not add a band.
    return array if array.ndim == 2 else array[..., : SAMPLES[data[25]]]


def check_rows(data: bytes) -> None:
    """Raise ValueError if the rows unpack to more bytes than the image has, since libpng would unpack all of them."""
    height, width = shape(data)
    size = height * (1 + (width * data[24] * SAMPLES.get(data[25], 4) + 7) // 8)
    unpacker, left, at = zlib.decompressobj(), size + MARGIN, len(MAGIC)
    while len(data) - at >= PART.size and left > 0:
        length, kind = PART.unpack_from(data, at)
        packed = data[at + PART.size : at + PART.size + length] if kind == b"IDAT" else b""
        while packed and left > 0:
            left -= len(unpacker.decompress(packed, STEP))
            packed = unpacker.unconsumed_tail
        at += PART.size + length + 4
    if left <= 0:
        raise ValueError(f"its rows unpack to more than the {size} bytes that they have")
