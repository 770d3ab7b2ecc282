"""Images as tiled TIFF files of which a window, or some bands, are read and checked alone.

Any reader of TIFF opens them: tiles, compressed by Zstandard, integers by horizontal differences. What is special lies before
the tiles, in the head: it is written in one way only, and a private tag holds the xxh3 of each tile. A sample's digest in
the index is that of the head and the mask, so that every byte that is read has been checked.

Bands lie next to each other in images of up to four bands. In others each band is a plane of tiles.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import xxhash

FORMAT = "tiles"
# The first bytes after the TIFF's own eight: this mark, the dtype, and the length of the head.
START = struct.Struct("<4sI3sBI")
TIFF, MARK = b"II*\0", b"DST"
IFD = START.size
DTYPES = tuple(np.dtype(name) for name in ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<f8"))
SAMPLE_FORMAT = {"u": 1, "i": 2, "f": 3}
DIGESTS = 65017
ZSTD, LEVEL = 50000, 3
ZSTD_DECODE: Any = imagecodecs.zstd_decode
# Images of more bands have planes.
MOST_TOGETHER = 4
MAX_HEAD = 2**24
# The head of most images; one read fetches it.
FIRST = 8192
SHORT, LONG, BYTES = 3, 4, 7

Read = Callable[[int, int], bytes | memoryview]


@dataclass(frozen=True)
class Layout:
    """How an image is cut into tiles.

    Attributes:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        bands: Number of bands.
        dtype: Type of the numbers, one of DTYPES.
        tile_height: Height of a tile in pixels, a multiple of 16.
        tile_width: Width of a tile in pixels, a multiple of 16.
    """

    height: int
    width: int
    bands: int
    dtype: np.dtype
    tile_height: int
    tile_width: int

    @property
    def planes(self) -> int:
        """Return the number of planes: that of the bands, or 1 if all bands of a pixel lie together."""
        return self.bands if self.bands > MOST_TOGETHER else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Return the number of rows and of columns of tiles."""
        return -(-self.height // self.tile_height), -(-self.width // self.tile_width)

    @property
    def count(self) -> int:
        """Return the number of tiles in all planes."""
        return self.planes * self.grid[0] * self.grid[1]

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """Return the shape of a tile: height, width, and bands of a plane."""
        return self.tile_height, self.tile_width, self.bands // self.planes


@dataclass(frozen=True)
class Head:
    """What precedes the tiles.

    Attributes:
        data: Its bytes.
        layout: How the image is cut.
        ends: End of each tile in the file, (count + 1,); the first is the end of the head.
        digests: xxh3_64 of each tile, (count,) uint64.
    """

    data: bytes
    layout: Layout
    ends: np.ndarray
    digests: np.ndarray


def can_tile(image_HWC: np.ndarray) -> bool:
    """Return whether an image's dtype and number of bands can be stored in tiles.

    Args:
        image_HWC: Image (H, W, bands).
    """
    return image_HWC.dtype.newbyteorder("<") in DTYPES and image_HWC.shape[2] < 2**16


def encode(image_HWC: np.ndarray, side: int) -> bytes:
    """Encode an image without loss as a TIFF of tiles.

    Args:
        image_HWC: Image (H, W, bands), which `can_tile`.
        side: Side of the tiles in pixels, a multiple of 16; a smaller image has smaller tiles.

    Returns:
        The file.
    """
    H, W, bands = image_HWC.shape
    dtype = image_HWC.dtype.newbyteorder("<")
    layout = Layout(H, W, bands, dtype, min(side, -(-H // 16) * 16), min(side, -(-W // 16) * 16))
    th, tw, together = layout.tile_shape
    pieces = []
    for plane in range(layout.planes):
        for top in range(0, H, th):
            for left in range(0, W, tw):
                window = image_HWC[top : top + th, left : left + tw, plane * together : (plane + 1) * together]
                pad = ((0, th - window.shape[0]), (0, tw - window.shape[1]), (0, 0))
                tile = np.pad(window.astype(dtype, copy=False), pad, mode="edge")
                if dtype.kind != "f":
                    tile = imagecodecs.delta_encode(tile, axis=1)
                pieces.append(imagecodecs.zstd_encode(np.ascontiguousarray(tile).tobytes(), LEVEL))
    counts = np.array([len(piece) for piece in pieces], np.int64)
    digests = np.array([xxhash.xxh3_64_intdigest(piece) for piece in pieces], np.uint64)
    return b"".join([head_of(layout, counts, digests), *pieces])


def head_of(layout: Layout, counts: np.ndarray, digests: np.ndarray) -> bytes:
    """Return the bytes before the tiles.

    Args:
        layout: How the image is cut.
        counts: Number of bytes of each tile, (count,).
        digests: xxh3_64 of each tile, (count,) uint64.

    Raises:
        ValueError: If the file would be larger than a TIFF can be.
    """
    colours = 3 if layout.bands == 3 and layout.dtype == np.uint8 else 1
    bands, n = layout.bands, len(counts)
    kind, bits = SAMPLE_FORMAT[layout.dtype.kind], 8 * layout.dtype.itemsize
    entries: list[tuple[int, int, int, bytes]] = [
        (256, LONG, 1, struct.pack("<I", layout.width)), (257, LONG, 1, struct.pack("<I", layout.height)),
        (258, SHORT, bands, struct.pack("<H", bits) * bands), (259, SHORT, 1, struct.pack("<H", ZSTD)),
        (262, SHORT, 1, struct.pack("<H", 2 if colours == 3 else 1)), (277, SHORT, 1, struct.pack("<H", bands)),
        (284, SHORT, 1, struct.pack("<H", 1 if layout.planes == 1 else 2)),
        (317, SHORT, 1, struct.pack("<H", 1 if layout.dtype.kind == "f" else 2)),
        (322, LONG, 1, struct.pack("<I", layout.tile_width)), (323, LONG, 1, struct.pack("<I", layout.tile_height)),
        (324, LONG, n, bytes(4 * n)), (325, LONG, n, counts.astype("<u4").tobytes()),
        (338, SHORT, bands - colours, bytes(2 * (bands - colours))), (339, SHORT, bands, struct.pack("<H", kind) * bands),
        (DIGESTS, BYTES, 8 * n, digests.astype("<u8").tobytes()),
    ]  # fmt: skip
    entries = [entry for entry in entries if entry[2]]
    at = IFD + 2 + 12 * len(entries) + 4
    table: list[bytes] = []
    values: list[bytes] = []
    place = 0
    for tag, type_, count, value in entries:
        inside = len(value) <= 4
        if tag == 324:
            place = len(table)
        table.append(
            struct.pack("<HHI", tag, type_, count) + (value.ljust(4, b"\0") if inside else struct.pack("<I", at))
        )
        if not inside:
            value += bytes(-len(value) % 2)
            values.append(value)
            at += len(value)
    ends = at + np.concatenate([[0], np.cumsum(counts)])
    if ends[-1] >= 2**32:
        raise ValueError(f"has {ends[-1]} bytes in tiles; a TIFF holds fewer than 4 GiB")
    head = bytearray(START.pack(TIFF, IFD, MARK, DTYPES.index(layout.dtype), at))
    head += struct.pack("<H", len(entries)) + b"".join(table) + bytes(4) + b"".join(values)
    offsets = ends[:-1].astype("<u4").tobytes()
    where = IFD + 2 + 12 * place + 8
    if n > 1:
        (where,) = struct.unpack_from("<I", head, where)
    head[where : where + 4 * n] = offsets
    return bytes(head)


def is_tiled(data: bytes | memoryview) -> bool:
    """Return whether the first bytes of a file are those of an image in tiles."""
    return len(data) >= START.size and bytes(data[:4]) == TIFF and bytes(data[8:11]) == MARK


def read_head(read: Read, length: int, check: Callable[[int, int, int], None]) -> Head:
    """Read what precedes the tiles.

    Args:
        read: read(offset, count) returns that many bytes of the file.
        length: Number of bytes of the file.
        check: check(height, width, bytes) raises an error if the image would be too large.

    Raises:
        ValueError: If the bytes are not a head that `head_of` writes, or the file has another length than it says.
    """
    data = bytes(read(0, min(FIRST, length)))
    if not is_tiled(data):
        raise ValueError("is not an image in tiles as DeepSkip writes it")
    _, _, _, code, size = START.unpack_from(data)
    if not IFD + 2 <= size <= min(length, MAX_HEAD) or code >= len(DTYPES):
        raise ValueError(f"has a head of {size} bytes and dtype {code}; it is damaged")
    if size > len(data):
        data += bytes(read(len(data), size - len(data)))
    data = data[:size]
    (entries,) = struct.unpack_from("<H", data, IFD)
    if len(data) < size or entries > 15 or IFD + 2 + 12 * entries > size:
        raise ValueError("has a damaged head")
    numbers = [struct.unpack_from("<HHII", data, IFD + 2 + 12 * entry) for entry in range(entries)]
    found = {tag: (count, value) for tag, _, count, value in numbers}
    try:
        width, height, tile_width, tile_height = (found[tag][1] for tag in (256, 257, 322, 323))
        bands, (n, place) = found[277][1] & 0xFFFF, found[325]
        where = found[DIGESTS][1]
    except KeyError as error:
        raise ValueError("has a damaged head") from error
    if 0 in (width, height, bands, tile_width, tile_height) or max(tile_width, tile_height) > 2**16:
        raise ValueError(f"claims {height} x {width} x {bands} in tiles of {tile_height} x {tile_width}")
    layout = Layout(height, width, bands, DTYPES[code], tile_height, tile_width)
    check(height, width, height * width * bands * layout.dtype.itemsize)
    # A tile is at most a little larger than the image.
    if tile_height >= height + 16 or tile_width >= width + 16 or n != layout.count or where + 8 * n > size:
        raise ValueError(f"claims {n} tiles of {tile_height} x {tile_width} for {height} x {width} x {bands}")
    if n == 1:
        counts = np.array([place], np.int64)
    else:
        if place + 4 * n > size:
            raise ValueError("has a damaged head")
        counts = np.frombuffer(data, "<u4", n, place).astype(np.int64)
    digests = np.frombuffer(data, "<u8", n, where)
    # There is one way to write a head, so that nothing else in it needs to be looked at.
    if size + int(counts.sum()) != length or head_of(layout, counts, digests) != data:
        raise ValueError("has a damaged head, or other tiles than it says")
    return Head(data, layout, size + np.concatenate([[0], np.cumsum(counts)]), digests)


def head_bytes(data: bytes) -> bytes:
    """Return the bytes before the tiles of a file; if it is damaged, as many as it claims that there are."""
    size: int = START.unpack_from(data)[4]
    return data[:size]


def read_window(read: Read, head: Head, rows: slice, columns: slice, bands: Sequence[int] | None = None) -> np.ndarray:
    """Read a window of an image; only the tiles that it touches are read, checked and decoded.

    Args:
        read: read(offset, count) returns that many bytes of the file.
        head: Head of the file.
        rows: Rows of the window, within the image.
        columns: Columns of the window, within the image.
        bands: Numbers of the bands to take; None takes all.

    Returns:
        Image (rows, columns, bands) of the file's dtype.

    Raises:
        ValueError: If a tile has changed or does not decode.
    """
    layout = head.layout
    th, tw, together = layout.tile_shape
    down, across = layout.grid
    in_planes = layout.planes > 1
    planes = list(range(layout.planes)) if bands is None or not in_planes else list(bands)
    places = [
        (plane, y, x)
        for plane in range(len(planes))
        for y in range(rows.start // th, -(-rows.stop // th))
        for x in range(columns.start // tw, -(-columns.stop // tw))
    ]
    numbers = [(planes[plane] * down + y) * across + x for plane, y, x in places]
    pieces = read_tiles(read, head, numbers)
    H, W = rows.stop - rows.start, columns.stop - columns.start
    out = np.empty((H, W, len(planes) * together), layout.dtype)
    tile = np.empty(layout.tile_shape, layout.dtype)
    # Planes come one after the other in the file. All those of a place are put into the window together: it lies in
    # the cache meanwhile.
    for i in sorted(range(len(places)), key=lambda i: places[i][1:]):
        plane, y, x = places[i]
        if xxhash.xxh3_64_intdigest(pieces[i]) != head.digests[numbers[i]]:
            raise ValueError(f"tile {numbers[i]} has other bytes than when it was indexed (xxh3 differs)")
        top, left = y * th, x * tw
        above, before = max(rows.start, top), max(columns.start, left)
        below, after = min(rows.stop, top + th), min(columns.stop, left + tw)
        decode_tile(pieces[i], tile, slice(above - top, below - top))
        out[
            above - rows.start : below - rows.start,
            before - columns.start : after - columns.start,
            plane * together : (plane + 1) * together,
        ] = tile[above - top : below - top, before - left : after - left]
    return out if in_planes or bands is None else np.take(out, bands, axis=2)


def decode(data: bytes | memoryview, check: Callable[[int, int, int], None]) -> np.ndarray:
    """Decode a whole file, and check each of its tiles.

    Args:
        data: Contents of the file.
        check: As in `read_head`.

    Returns:
        Image (H, W, bands) of the file's dtype.

    Raises:
        ValueError: If it is not an image in tiles, or is damaged.
    """

    def read(offset: int, count: int) -> bytes | memoryview:
        return data[offset : offset + count]

    head = read_head(read, len(data), check)
    return read_window(read, head, slice(0, head.layout.height), slice(0, head.layout.width))


def read_tiles(read: Read, head: Head, numbers: list[int]) -> list[memoryview]:
    """Read tiles, those that follow each other in one call.

    Args:
        read: read(offset, count) returns that many bytes of the file.
        head: Head of the file.
        numbers: Numbers of the tiles.

    Returns:
        The bytes of each tile.

    Raises:
        ValueError: If bytes are missing.
    """
    ends = head.ends.tolist()
    pieces: list[memoryview] = []
    first = 0
    for i in range(1, len(numbers) + 1):
        if i < len(numbers) and numbers[i] == numbers[i - 1] + 1:
            continue
        begin, stop = ends[numbers[first]], ends[numbers[i - 1] + 1]
        run = memoryview(read(begin, stop - begin))
        if len(run) != stop - begin:
            raise ValueError(f"ends after {len(run)} of {stop - begin} bytes of its tiles")
        pieces += [run[ends[number] - begin : ends[number + 1] - begin] for number in numbers[first:i]]
        first = i
    return pieces


def decode_tile(piece: memoryview, tile: np.ndarray, rows: slice) -> None:
    """Decode a tile into memory of its size, so that it cannot unpack to more.

    Args:
        piece: The compressed bytes.
        tile: Where to put it, (height, width, bands of a plane) in one piece of memory.
        rows: Rows that are wanted; in the others differences may remain.

    Raises:
        ValueError: If it does not decode, or to another size.
    """
    flat = tile.reshape(-1).view(np.uint8)
    try:
        # It is typed for bytes, and takes any buffer.
        found = ZSTD_DECODE(piece, out=flat)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"a tile does not decode: {error}") from error
    if len(found) != len(flat):
        raise ValueError(f"a tile has {len(found)} bytes in place of {len(flat)}")
    if tile.dtype.kind != "f":
        imagecodecs.delta_decode(tile[rows], axis=1, out=tile[rows])
