"""Keeps the codecs of a stranger's Zarr array from running code (pickle is one) and from unpacking more than a chunk."""

import gzip
import io
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# by zarr's names of version 2 and 3; all of them give bytes that have the chunk's size, or nearly
ALLOWED = {
    "bytes", "transpose", "sharding_indexed", "crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3", "gzip", "zlib",
    "zstd", "blosc", "lz4", "shuffle", "delta", "bitround", "quantize", "fixedscaleoffset", "packbits", "astype",
}  # fmt: skip
# checksums and the like beside a chunk's own bytes
MARGIN = 2**16
# bytes of the largest chunk of each array that is being read: zarr decodes in threads of its own, and knows no array there
reading: list[int] = []
lock = threading.Lock()
patched = False


def check_codecs(array: Any) -> None:
    """Refuses codecs that are not known to be harmless; raises ValueError that names them."""
    strange = sorted(set(names_of(array.metadata.to_dict())) - ALLOWED)
    if strange:
        raise ValueError(f"is written with {', '.join(strange)}; codecs that are read: {', '.join(sorted(ALLOWED))}")


@contextmanager
def within(chunk_bytes: int) -> Iterator[None]:
    """Has decoders unpack no more than a chunk, or a shard where chunks lie in shards, while the block reads."""
    with lock:
        bound_codecs()
        reading.append(chunk_bytes + MARGIN)
    try:
        yield
    finally:
        with lock:
            reading.remove(chunk_bytes + MARGIN)


def most() -> int:
    """Gives what may be unpacked at once; arrays that others read in this process are theirs."""
    with lock:
        return max(reading, default=sys.maxsize - 1)


def names_of(metadata: dict[str, Any]) -> Iterable[str]:
    """Gives the names of an array's codecs, those within shards too."""
    for codec in (*(metadata.get("codecs") or ()), *(metadata.get("index_codecs") or ())):
        name = str(codec.get("name", codec)).removeprefix("numcodecs.")
        yield name
        yield from names_of(codec.get("configuration") or {})
    for codec in (metadata.get("compressor"), *(metadata.get("filters") or ())):
        if codec is not None:
            yield str(codec.get("id", codec) if isinstance(codec, dict) else codec)


def bound_codecs() -> None:
    """Puts a bound before each decoder of numcodecs, once in a process; zarr has no setting for one."""
    global patched
    if patched:
        return
    import numcodecs

    for kind, unpack in ((numcodecs.GZip, unpack_gzip), (numcodecs.Zlib, unpack_zlib), (numcodecs.Zstd, unpack_zstd)):
        kind.decode = bounded_unpacker(unpack)
    for kind, size in ((numcodecs.Blosc, blosc_size), (numcodecs.LZ4, lz4_size)):
        kind.decode = sized(kind.decode, size)
    patched = True


def too_large(size: int) -> ValueError:
    """Makes the error of a chunk that unpacks to more than it may."""
    return ValueError(f"a chunk unpacks to {size} bytes or more; at most {most()} are taken")


def bounded_unpacker(unpack: Callable[[bytes], bytes]) -> Callable[..., Any]:
    """Makes a codec's decode of a function that unpacks one byte more than is allowed at most."""

    def decode(self: Any, buf: Any, out: Any = None) -> Any:
        from numcodecs.compat import ensure_bytes, ndarray_copy

        data = unpack(ensure_bytes(buf))
        if len(data) > most():
            raise too_large(len(data))
        return ndarray_copy(data, out)

    return decode


def unpack_gzip(data: bytes) -> bytes:
    """Unpacks gzip."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(most() + 1)
    # an OSError, which would look as if the storage failed
    except gzip.BadGzipFile as error:
        raise ValueError(str(error)) from error


def unpack_zlib(data: bytes) -> bytes:
    """Unpacks zlib; raises zlib.error for data that are cut off."""
    unpacker, allowed = zlib.decompressobj(), most()
    unpacked = unpacker.decompress(data, allowed + 1)
    if not unpacker.eof and len(unpacked) <= allowed:
        raise zlib.error("incomplete data")
    return unpacked


def unpack_zstd(data: bytes) -> bytes:
    """Unpacks Zstandard, into a buffer of what is allowed: frames need not say their size."""
    import imagecodecs

    allowed = most()
    # no buffer of that size where nothing bounds it
    return bytes(imagecodecs.zstd_decode(data, out=allowed if allowed < sys.maxsize - 1 else None))


def sized(decode: Callable[..., Any], size_of: Callable[[bytes], int]) -> Callable[..., Any]:
    """Looks at what a decoder would unpack to first."""

    def look_and_decode(self: Any, buf: Any, out: Any = None) -> Any:
        from numcodecs.compat import ensure_bytes

        data = ensure_bytes(buf)
        if (size := size_of(data)) > most():
            raise too_large(size)
        return decode(self, data, out)

    return look_and_decode


def blosc_size(data: bytes) -> int:
    """Reads the size from a header of Blosc; 0 where there is none, which Blosc itself refuses."""
    return int(struct.unpack_from("<I", data, 4)[0]) if len(data) >= 16 else 0


def lz4_size(data: bytes) -> int:
    """Reads the size that numcodecs puts before LZ4; it takes negative ones for very large ones."""
    return int(struct.unpack_from("<I", data)[0]) if len(data) >= 4 else 0
