"""Images that claim to be small but unpack to much or take long: name -> (extension, bytes)."""

import bz2
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache

import imagecodecs
import numpy as np
import tifffile
import xxhash
from PIL import Image

from deepskip.data_shards import tiles

Made = tuple[str, bytes]
CASES: dict[str, Callable[[], Made]] = {}
# Each tag is (tag, type, count, value).
Tags = list[tuple[int, int, int, int]]


def case(name: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Register a case under its name."""

    def listed(make: Callable[[], Made]) -> Callable[[], Made]:
        CASES[name] = make
        return make

    return listed


def tif(tags: Tags, data: bytes, following: int = 0) -> bytes:
    """Return a little-endian TIFF of one directory, whose data begin at byte 8."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    place = struct.pack("<I", 8 + len(data))
    return b"II*\0" + place + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


@lru_cache
def deflated_zeros(count: int) -> bytes:
    """Deflate `count` zeros: compress one block, and repeat it."""
    size = 2**24
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(size)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, wbits=-15)
    rest = packer.compress(bytes(count % size)) + packer.flush()
    checksum = struct.pack(">I", (count % 65521) << 16 | 1)
    return b"\x78\xda" + block * (count // size) + rest + checksum


def sixteen(compression: int) -> Tags:
    """Return the tags of an image of 16 x 16 grey bytes."""
    return [
        (256, 4, 1, 16),
        (257, 4, 1, 16),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
    ]


def small(data: bytes, compression: int, *more: tuple[int, int, int, int]) -> bytes:
    """Return a TIFF of 16 x 16 bytes in one strip of `data`."""
    strip: Tags = [(273, 4, 1, 8), (278, 4, 1, 16), (279, 4, 1, len(data))]
    return tif([*sixteen(compression), *strip, *more], data)


def tiled(data: bytes, compression: int, side: int) -> bytes:
    """Return a TIFF of 16 x 16 bytes in one tile of side x side."""
    return tif(
        [*sixteen(compression), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, len(data))], data
    )


@case("tile of 16 x 16 that unpacks to a gigabyte")
def zeros_in_a_tile() -> Made:
    piece = imagecodecs.zstd_encode(bytes(2**30), 1)
    digest = np.array([xxhash.xxh3_64_intdigest(piece)], np.uint64)
    layout = tiles.Layout(16, 16, 1, np.dtype(np.uint8), 16, 16)
    return "tiles", tiles.head_of(layout, np.array([len(piece)]), digest) + piece


@case("tiles of 2**31 x 2**31 pixels")
def endless_tiles() -> Made:
    layout = tiles.Layout(2**31, 2**31, 1, np.dtype(np.uint8), 16, 16)
    return "tiles", tiles.head_of(layout, np.array([1]), np.array([0], np.uint64)) + b"x"


for SIDE in (30_000, 60_000):
    CASES[f"TIFF of 16 x 16 in one deflated tile of {SIDE} x {SIDE}"] = lambda side=SIDE: (
        "tif",
        tiled(deflated_zeros(side * side), 8, side),
    )


@case("TIFF of 16 x 16 in one PNG tile of 20000 x 20000")
def png_tile() -> Made:
    side = 20_000
    return "tif", tiled(png(side, side, deflated_zeros((side + 1) * side)), 34933, side)


@case("TIFF of 16 x 16 in a strip that is a PNG of 20000 x 20000")
def png_strip() -> Made:
    side = 20_000
    return "tif", small(png(side, side, deflated_zeros((side + 1) * side)), 34933)


@case("TIFF of 16 x 16 in a PNG strip whose rows go on for a gigabyte")
def png_strip_that_goes_on() -> Made:
    return "tif", small(png(16, 16, deflated_zeros(2**30)), 34933)


@case("TIFF whose JPEG 2000 tile says 16 x 16 outside and is 4000 x 4000 inside")
def lying_jpeg_2000() -> Made:
    data = bytearray(imagecodecs.jpeg2k_encode(np.zeros((4000, 4000), np.uint8), level=0, codecformat="jp2"))
    at = data.index(b"ihdr")
    data[at + 4 : at + 12] = struct.pack(">II", 16, 16)
    return "tif", small(bytes(data), 34712)


@case("TIFF whose JPEG strip has 400 scans")
def jpeg_in_tiff() -> Made:
    data = jpeg_of_scans(16, 400)
    return "tif", small(data, 7)


PACKERS: dict[str, tuple[int, Callable[[], bytes]]] = {
    "deflate": (8, lambda: deflated_zeros(2**30)),
    "zstd": (50000, lambda: imagecodecs.zstd_encode(bytes(2**28))),
    "lzma": (34925, lambda: lzma.compress(bytes(2**26))),
    "packbits": (32773, lambda: b"\x81\0" * 2**20),
    "LZW": (5, lambda: imagecodecs.lzw_encode(bytes(2**24))),
}
for PACKER, (CODE, PACK) in PACKERS.items():
    CASES[f"TIFF strip of 256 bytes that unpacks to millions, {PACKER}"] = lambda code=CODE, pack=PACK: (
        "tif",
        small(pack(), code),
    )


@case("TIFF of a million empty directories")
def many_directories() -> Made:
    n = 1_000_000
    chain = b"".join(struct.pack("<HI", 0, 8 + 6 * (i + 1)) for i in range(n - 1))
    return "tif", b"II*\0" + struct.pack("<I", 8) + chain + struct.pack("<HI", 0, 0)


@case("TIFF whose directories go round")
def circle() -> Made:
    return "tif", b"II*\0" + struct.pack("<IHIHI", 8, 0, 14, 0, 8)


@case("TIFF of 65535 tags that claim 2 GB each")
def claiming_tags() -> Made:
    tags = b"".join(struct.pack("<HHII", i, 2, 2**31, 8) for i in range(65535))
    return "tif", b"II*\0" + struct.pack("<IH", 8, 65535) + tags + bytes(4)


@case("TIFF whose strips claim to be four milliards")
def claiming_strips() -> Made:
    shape: Tags = [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    return "tif", tif([*shape, (273, 4, 2**32 - 1, 8), (278, 4, 1, 16), (279, 4, 2**32 - 1, 8)], bytes(256))


@case("TIFF of 400 thousand strips")
def many_strips() -> Made:
    n = 400_000
    shape: Tags = [(256, 4, 1, 1), (257, 4, 1, n), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    return "tif", tif([*shape, (273, 4, n, 8), (278, 4, 1, 1), (279, 4, n, 8)], bytes(4 * n))


@case("TIFF of 2000 tags that share 4 MB")
def sharing_tags() -> Made:
    return "tif", small(bytes(2**22), 1, *[(40000 + i, 3, 2**21, 8) for i in range(2000)])


@case("TIFF whose 60000 strips share 4 MB each")
def sharing_strips() -> Made:
    n, data = 60_000, bytes(2**22)
    shape: Tags = [(256, 4, 1, 1), (257, 4, 1, n), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    places, lengths = struct.pack("<I", 8) * n, struct.pack("<I", 2**22) * n
    more: Tags = [(273, 4, n, 8 + len(data)), (278, 4, 1, 1), (279, 4, n, 8 + len(data) + len(places))]
    return "tif", tif([*shape, *more], data + places + lengths)


@case("TIFF of 4000 directories within one, each of 4000")
def directories_within() -> Made:
    n = 4000
    inner = struct.pack("<HHHII", 1, 330, 4, n, 8) + bytes(4)
    places = b"".join(struct.pack("<I", 8 + 4 * n + i * len(inner)) for i in range(n))
    return "tif", small(places + inner * n, 1, (330, 4, n, 8))


def ome(pixels: str, more: str = "", inside: str = "") -> Made:
    """Return an OME-TIFF of 48 x 64 with a description."""
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?>{more}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="Image:0"><Pixels BigEndian="false" DimensionOrder="XYCZT" ID="Pixels:0" Type="uint8" {pixels}>'
        f'<Channel ID="C:0" SamplesPerPixel="1"/>{inside}</Pixels></Image></OME>'
    )
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((48, 64), np.uint8), description=text.encode(), metadata=None)
    return "tif", file.getvalue()


SIZES = 'SizeX="64" SizeY="48" SizeC="1" SizeT="1" SizeZ="1"'
OME_CASES = {
    "of a milliard planes": ('SizeX="64" SizeY="48" SizeC="1" SizeT="1" SizeZ="1000000000"', "<TiffData/>"),
    "of a milliard columns": ('SizeX="1000000000" SizeY="1000000" SizeC="1" SizeT="1" SizeZ="1"', "<TiffData/>"),
    "whose data take a milliard planes": (SIZES, '<TiffData IFD="0" PlaneCount="1000000000"/>'),
    "whose data begin at plane 900000000": (SIZES, '<TiffData IFD="900000000" PlaneCount="1"/>'),
    "of 40000 pieces of data": (SIZES, "<TiffData/>" * 40_000),
    "of -1 planes": ('SizeX="64" SizeY="48" SizeC="1" SizeT="1" SizeZ="-1"', "<TiffData/>"),
    "of 8 MB of description": (SIZES, "<TiffData/>" + "<a/>" * 2**21),
}
for NAME, (PIXELS, INSIDE) in OME_CASES.items():
    CASES[f"OME-TIFF {NAME}"] = lambda pixels=PIXELS, inside=INSIDE: ome(pixels, inside=inside)


@case("OME-TIFF whose entities unfold a milliard times")
def laughs() -> Made:
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    return ome(SIZES, f'<!DOCTYPE OME [<!ENTITY l0 "lollollol">{entities}]>', "&l9;")


@case("ImageJ TIFF of a milliard images")
def imagej() -> Made:
    file = io.BytesIO()
    tifffile.imwrite(
        file, np.zeros((48, 64), np.uint8), metadata=None,
        description="ImageJ=1.54f\nimages=1000000000\nslices=1000000000\nloop=false\n",
    )  # fmt: skip
    return "tif", file.getvalue()


@case("shaped TIFF of a milliard pages")
def shaped() -> Made:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((48, 64), np.uint8), metadata=None, description='{"shape": [1000000000, 48, 64]}')
    return "tif", file.getvalue()


def jpeg_of_scans(side: int, count: int, mpo: bool = False) -> bytes:
    """Return a JPEG whose last scan is repeated; with `mpo`, add the segment of a file of several pictures."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((side, side), np.uint8)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    head, scan = data[:last], data[last : data.rindex(b"\xff\xd9")]
    if mpo:
        directory = struct.pack("<4sIH", b"II*\0", 8, 3) + struct.pack("<HHI4s", 0xB000, 7, 4, b"0100")
        directory += struct.pack("<HHIIHHII", 0xB001, 4, 1, 2, 0xB002, 7, 32, 50) + bytes(4)
        pictures = struct.pack("<LLLHH", 0x20030000, len(data), 0, 0, 0) + struct.pack("<LLLHH", 0, 100, 0, 0, 0)
        segment = b"MPF\0" + directory + pictures
        head = head[:2] + b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment + head[2:]
    return head + scan * count + b"\xff\xd9"


CASES["JPEG of 5000 x 5000 and 400 scans"] = lambda: ("jpg", jpeg_of_scans(5000, 400))
CASES["the same, which says that it holds several pictures"] = lambda: ("jpg", jpeg_of_scans(5000, 400, mpo=True))
CASES["the same, called a PNG"] = lambda: ("png", jpeg_of_scans(5000, 400, mpo=True))
CASES["JPEG of 16000 x 16000 and 90 scans"] = lambda: ("jpg", jpeg_of_scans(16000, 90))


def part(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, data: bytes, depth: int = 8, colour: int = 0, before: bytes = b"") -> bytes:
    """Return a PNG of packed rows."""
    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + part(b"IDAT", data) + part(b"IEND", b"")


for KIND, COLOUR in (("grey with alpha", 4), ("colour", 2), ("palette", 3)):

    @case(f"PNG, {KIND}, with 100 texts and a profile of 50 MB each")
    def texts(colour: int = COLOUR) -> Made:
        packed = zlib.compress(bytes(50_000_000), 9)
        more = part(b"iCCP", b"a\0\0" + packed) + part(b"zTXt", b"a\0\0" + packed) * 100
        more += part(b"PLTE", bytes(768)) if colour == 3 else b""
        rows = zlib.compress(bytes(16 * (1 + 16 * {4: 2, 2: 3, 3: 1}[colour])))
        return "png", png(16, 16, rows, colour=colour, before=more)


CASES["PNG of 60000 x 60000"] = lambda: ("png", png(60_000, 60_000, deflated_zeros(2**24)))
for DEPTH, COLOUR, SAMPLES in (
    (8, 0, 1),
    (8, 2, 3),
    (8, 3, 1),
    (8, 4, 2),
    (8, 6, 4),
    (16, 0, 1),
    (16, 2, 3),
    (16, 6, 4),
    (1, 0, 1),
):
    CASES[f"PNG of 16 x 16 x {SAMPLES} of {DEPTH} bits, kind {COLOUR}, whose rows go on for a gigabyte"] = (
        lambda depth=DEPTH, colour=COLOUR: (
            "png",
            png(16, 16, deflated_zeros(2**30), depth, colour, part(b"PLTE", bytes(768)) if colour == 3 else b""),
        )
    )
CASES["PNG of 3 million parts"] = lambda: (
    "png",
    png(16, 16, zlib.compress(bytes(272)), before=part(b"teXt", b"") * 3_000_000),
)


def npy(header: str, body: bytes = b"") -> bytes:
    """Return an .npy file with the given header, unchanged."""
    text = header.encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) + 1) + text + b"\n" + body


HEADERS = {
    "of dtype V0": "{'descr': '|V0', 'fortran_order': False, 'shape': (4, 4, 3), }",
    "of dtype S0": "{'descr': '|S0', 'fortran_order': False, 'shape': (99999999, 99999999, 3), }",
    "of sides that are true": "{'descr': '|u1', 'fortran_order': False, 'shape': (True, True, 3), }",
    "of a side of 1.5": "{'descr': '|u1', 'fortran_order': False, 'shape': (1.5, 1, 3), }",
    "of negative sides": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -3, 1), }",
    "of sides whose product is 2**64": "{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296, 3), }",
    "of records of a milliard": "{'descr': [('a', '<f4', (1000, 1000, 1000))], 'fortran_order': False, 'shape': (1, 1, 3), }",
    "of a deep shape": "{'descr': '|u1', 'fortran_order': False, 'shape': " + "(" * 90 + "1" + ",)" * 90 + ", }",
    "of dates": "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1, 1, 1), }",
    "of objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1), }",
}
for NAME, HEADER in HEADERS.items():
    CASES[f"npy {NAME}"] = lambda header=HEADER: ("npy", npy(header, bytes(64)))
CASES["npy whose header claims 4 GB"] = lambda: ("npy", b"\x93NUMPY\x02\0" + b"\xff" * 4 + bytes(100))
CASES["npy of version 9"] = lambda: ("npy", b"\x93NUMPY\x09\0" + struct.pack("<I", 50) + bytes(100))


def npz(method: int, size: int, claimed: int) -> bytes:
    """Return an archive of one array whose directory claims another size."""
    file = io.BytesIO()
    header = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10, 10, 3), }")
    with zipfile.ZipFile(file, "w", method) as archive, archive.open("image.npy", "w", force_zip64=True) as member:
        member.write(header)
        for _ in range(size // 2**24):
            member.write(bytes(2**24))
    data = bytearray(file.getvalue())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", claimed)
    return bytes(data)


for NAME, METHOD in (("deflate", zipfile.ZIP_DEFLATED), ("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
    CASES[f"npz of 64 MB that says 500 bytes, {NAME}"] = lambda method=METHOD: ("npz", npz(method, 2**26, 500))
CASES["npz of 64 MB that says 3 GB"] = lambda: ("npz", npz(zipfile.ZIP_DEFLATED, 2**26, 3 * 10**9))
CASES["bytes that are no image"] = lambda: ("tif", bz2.compress(bytes(2**20)))
