"""PNG: the parts that pixels depend on, and a decoder that unpacks no more than these pixels."""

import struct
import zlib

import imagecodecs
import numpy as np
from PIL import Image

from deepskip.data_shards.pictures import ORIENTATION_TAG

MAGIC = b"\x89PNG\r\n\x1a\n"
# what pixels depend on, and how the image is turned; texts and profiles, which may unpack to anything, are left out
KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
MAX_PARTS = 2**18
PART = struct.Struct(">I4s")
# samples of a pixel, by the kind of colour; 4 and 6 have alpha
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# (depth, kind of colour): grey and colour of 8 bits, colour and transparency of 16; pillow reads the last as 8 bits without a
# word, and takes longer for the others
# which libspng does not know, or gives with transparency
UNLIKE_SPNG = ((16, 2), (16, 4))
PLAIN = ((8, 0), (8, 2), (8, 6), (16, 2), (16, 4), (16, 6))
# interlaced rows begin more often, with a byte each
MARGIN, STEP = 2**20, 2**20


def essential(data: bytes) -> tuple[bytes, int]:
    """Gives a PNG without the parts that its pixels do not depend on, and how it says to turn it, in EXIF's number."""
    at, found, kept = len(MAGIC), 0, [MAGIC]
    orientation, whole = 1, False
    while len(data) - at >= PART.size and not whole:
        length, kind = PART.unpack_from(data, at)
        found += 1
        if found > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS} parts")
        # and a checksum
        end = at + PART.size + length + 4
        if kind in KEPT:
            kept.append(data[at:end])
        if kind == b"eXIf":
            orientation = orientation_of(data[at + PART.size : end - 4])
        whole = kind == b"IEND"
        at = end
    return (data if len(kept) == found + 1 else b"".join(kept)), orientation


def orientation_of(exif: bytes) -> int:
    """Reads how an image is turned out of EXIF data; 1 where that cannot be read."""
    try:
        found = Image.Exif()
        found.load(exif)
        said = found.get(ORIENTATION_TAG, 1)
    # pillow has errors of many kinds for what is no EXIF
    except Exception:
        return 1
    return said if said in range(1, 9) else 1


def shape(data: bytes) -> tuple[int, int]:
    """Gives height and width; raises ValueError where there is no header."""
    if data[12:16] != b"IHDR" or len(data) < 26:
        raise ValueError("it has no header")
    return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


def is_plain(data: bytes) -> bool:
    """Says whether decode_plain reads it."""
    return data[12:16] == b"IHDR" and tuple(data[24:26]) in PLAIN


def has_alpha(data: bytes) -> bool:
    """Says whether a PNG's last sample is transparency."""
    return data[25] in (4, 6)


def decode_plain(data: bytes) -> np.ndarray:
    """Decodes what is plain: (height, width) or (height, width, samples), transparency the last of them."""
    if tuple(data[24:26]) in UNLIKE_SPNG:
        check_rows(data)
        array = imagecodecs.png_decode(data)
    else:
        # unlike libpng it leaves what comes after the last row packed
        array = imagecodecs.spng_decode(data)
    # a colour that is transparent is no band
    return array if array.ndim == 2 else array[..., : SAMPLES[data[25]]]


def check_rows(data: bytes) -> None:
    """Raises ValueError where the rows unpack to more bytes than they have: libpng would unpack them to their end."""
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
