"""Requests that get no image: each with its status and a word of the reason."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from tests.jobs.serving import Reply, Server

# These are settings of the server that the tests start.
MAX_BODY = 1_000_000
MAX_PIXELS = 500_000
BODY_SECONDS = 1.0

Send = Callable[[Server], Reply]
HEAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\n"


def png(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a picture, by default as PNG."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    """Encode an array as .npy."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def tif(array: np.ndarray, **options: Any) -> bytes:
    """Encode a picture as TIFF."""
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def picture(height: int = 40, width: int = 60, bands: int = 3, seed: int = 0) -> np.ndarray:
    """Return a picture of blobs."""
    small = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, bands), dtype=np.uint8)
    return np.ascontiguousarray(small.repeat(8, 0).repeat(8, 1)[:height, :width])


def header_of(shape: str, dtype: str = "|u1") -> bytes:
    """Return the start of a .npy file that claims a shape."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


def png_claiming(width: int, height: int) -> bytes:
    """Return a small PNG that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(bytes(50_000))) + chunk(b"IEND", b"")


def tile_bomb() -> bytes:
    """Return a TIFF of 16 x 16 whose only tile is a PNG of 6000 x 6000."""
    data = imagecodecs.png_encode(np.zeros((6000, 6000), np.uint8))
    # Width, height, bits, compression (PNG), black is zero, offset, samples, rows, bytes.
    tags = [(256, 16), (257, 16), (258, 8), (259, 34933), (262, 1), (273, 8), (277, 1), (278, 16), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def body(data: bytes, **headers: str) -> Send:
    """Return a request with a body, by default without a content type."""
    return lambda server: server.predict(data, **headers)


def raw(head: str, *pieces: bytes, pause: float = 0, finish: bool = False) -> Send:
    """Return a request of bytes, where an empty line ends the head."""
    return lambda server: server.send(f"{head}\r\n".encode(), *pieces, pause=pause, finish=finish)


def chunked(data: bytes) -> bytes:
    """Encode a body in chunks, so that its length is unknown beforehand."""
    pieces = [data[i : i + 65536] for i in range(0, len(data), 65536)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])


GOOD = picture()
PICKLE = npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)
NAN = np.where(np.arange(60)[:, None] == 7, np.nan, GOOD.astype(np.float32))
NOISE = np.random.default_rng(1).integers(0, 255, 700, dtype=np.uint8).tobytes()

# These are refused at once.
BAD: dict[str, tuple[Send, int, str]] = {
    "no body": (body(b""), 400, "no body"),
    "an empty body in chunks": (raw(HEAD + "Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"), 400, "no body"),
    "a format that is none": (lambda s: s.predict(png(GOOD), "jpeg2000"), 400, "mask, overlay, polygons"),
    "two formats": (lambda s: s.predict(png(GOOD), "mask&format=overlay"), 400, "mask, overlay, polygons"),
    "another query": (lambda s: s.predict(png(GOOD), "mask&threshold=0.2"), 400, "threshold"),
    "another method": (lambda s: s.ask("GET", "/predict"), 405, "Method Not Allowed"),
    "another path": (lambda s: s.ask("POST", "/../../etc/passwd", png(GOOD)), 404, "Not Found"),
    "text": (body(b"hello", Content_Type="text/plain"), 415, "text/plain"),
    "a form": (body(b"--x\r\n", Content_Type="multipart/form-data; boundary=x"), 415, "bytes of one image"),
    "compressed": (body(zlib.compress(png(GOOD)), Content_Encoding="deflate"), 415, "deflate"),
    "a body of 10 GB, announced": (raw(HEAD + "Content-Length: 10000000000\r\n"), 413, "10000000000 bytes"),
    "a body too large, in chunks": (raw(HEAD + "Transfer-Encoding: chunked\r\n", chunked(bytes(2 * MAX_BODY))), 413, "more"),
    "a length that is none": (raw(HEAD + "Content-Length: many\r\n"), 400, ""),
    "two lengths": (raw(HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"), 400, ""),
    "chunks that are none": (raw(HEAD + "Transfer-Encoding: chunked\r\n\r\nzz\r\n"), 400, ""),
    "no HTTP": (raw("\x16\x03\x01 hello\r\n"), 400, ""),
    "a head too large": (raw(HEAD + "X: " + "x" * 100_000 + "\r\n"), 400, ""),
    # The sender has left, so nobody gets a reply.
    "a body cut off": (raw(HEAD + "Content-Length: 5000\r\n", png(GOOD), finish=True), 0, ""),
    "another site's name": (body(png(GOOD), Host="evil.example"), 403, "evil.example"),
    "noise": (body(NOISE), 415, "begins with"),
    "a GIF": (body(png(GOOD, "GIF")), 415, "GIF8"),
    "an archive": (body(b"PK\x03\x04" + NOISE), 415, "begins with"),
    "JSON as an image": (body(b'{"image": 1}', Content_Type="image/png"), 415, "begins with"),
    "a JPEG that is said to be PNG": (body(png(GOOD, "JPEG"), Content_Type="image/png"), 415, "begins as image/jpeg"),
    "a PNG cut off": (body(png(GOOD)[:-60]), 422, "does not decode"),
    "a PNG's first bytes": (body(png(GOOD)[:8]), 422, "does not decode"),
    "a PNG of damaged pixels": (body(png(GOOD)[:60] + bytes(40) + png(GOOD)[100:]), 422, "does not decode"),
    "a JPEG cut off": (body(png(GOOD, "JPEG")[:400]), 422, "does not decode"),
    "a TIFF cut off": (body(tif(GOOD, photometric="rgb")[:3000]), 422, "does not decode"),
    "an array cut off": (body(npy(GOOD)[:-1]), 422, "claims shape"),
    "a PNG of 60,000 x 60,000": (body(png_claiming(60000, 60000)), 413, "60000 x 60000"),
    "a PNG of zeros": (body(png(np.zeros((5000, 5000, 3), np.uint8))), 413, "5000 x 5000"),
    "a JPEG of zeros": (body(png(np.zeros((5000, 5000), np.uint8), "JPEG")), 413, "5000 x 5000"),
    "a TIFF of zeros": (body(tif(np.zeros((5000, 5000), np.uint8), compression="zlib")), 413, "at most"),
    "a TIFF of many bands": (body(tif(np.zeros((300, 500, 500), np.uint8), compression="zlib")), 413, "bytes"),
    "a TIFF whose tile is larger": (body(tile_bomb()), 422, "6000 x 6000"),
    "a JPEG of 200 scans": (body(png(GOOD, "JPEG") + b"\xff\xda" * 200), 422, "scans"),
    "NaN": (body(npy(NAN)), 422, "nan or infinite"),
    "infinity": (body(npy(NAN * 0 + np.inf)), 422, "nan or infinite"),
    "values too large": (body(npy(GOOD.astype(np.float64) * 1e40)), 422, "beyond"),
    "a pickle": (body(PICKLE), 422, "object"),
    "complex numbers": (body(npy(GOOD.astype(complex))), 422, "complex"),
    "words": (body(npy(np.array([["a", "b"]]))), 422, "dtype"),
    "an array that claims more": (body(header_of("(90000, 90000, 3)") + bytes(100)), 422, "claims shape"),
    "a negative shape": (body(header_of("(-40, -60, 3)") + bytes(7200)), 422, ""),
    "a header that never ends": (body(header_of("(" * 4000) + bytes(100)), 422, "does not decode"),
    "an array of one axis": (body(npy(GOOD.ravel())), 422, "shape"),
    "an array of four axes": (body(npy(GOOD[None])), 422, "shape"),
    "an empty array": (body(npy(GOOD[:0])), 422, "shape"),
    "four bands": (body(npy(picture(bands=4))), 422, "has 4 bands; the model takes 3"),
    "one band": (body(png(GOOD[..., 0])), 422, "has 1 bands; the model takes 3"),
}  # fmt: skip
# These take BODY_SECONDS.
SLOW: dict[str, tuple[Send, int, str]] = {
    "a slow body": (
        raw(HEAD + "Content-Length: 50000\r\n", *[png(GOOD)[:20]] * 4, pause=BODY_SECONDS / 3), 408, "bytes came"
    ),
    "a body that does not come": (raw(HEAD + "Content-Length: 50000\r\n"), 408, "0 bytes came"),
}  # fmt: skip
