"""Guard against codecs of untrusted Zarr arrays that run code, such as pickle, or decompress to more than a chunk."""

import gzip
import io
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# The names are those of zarr 2 and 3. The output of each codec has the size of the chunk, or nearly.
ALLOWED = {
    "bytes", "transpose", "sharding_indexed", "crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3", "gzip", "zlib",
    "zstd", "blosc", "lz4", "shuffle", "delta", "bitround", "quantize", "fixedscaleoffset", "packbits", "astype",
}  # fmt: skip
# Checksums and similar data add a little to the bytes of a chunk.
MARGIN = 2**16
# The largest chunk, in bytes, of each array that is being read. It is global because zarr decodes in its own threads, where
# the array is unknown.
reading: list[int] = []
lock = threading.Lock()
patched = False


def check_codecs(array: Any) -> None:
    """Validate that an array uses only codecs that are known to be harmless.

    Raises:
        ValueError: The array uses other codecs; the message names them.
    """
    strange = sorted(set(names_of(array.metadata.to_dict())) - ALLOWED)
    if strange:
        raise ValueError(f"uses unsupported codecs {', '.join(strange)}; supported are {', '.join(sorted(ALLOWED))}")


@contextmanager
def within(chunk_bytes: int) -> Iterator[None]:
    """Limit what decoders decompress at once while the block reads.

    Args:
        chunk_bytes: Size of a chunk, or of a shard if the chunks lie in shards.
    """
    with lock:
        bound_codecs()
        reading.append(chunk_bytes + MARGIN)
    try:
        yield
    finally:
        with lock:
            reading.remove(chunk_bytes + MARGIN)


def most() -> int:
    """Return how many bytes may be decompressed at once; other code's arrays are unlimited while none is read here."""
    with lock:
        return max(reading, default=sys.maxsize - 1)


def names_of(metadata: dict[str, Any]) -> Iterable[str]:
    """Yield the names of an array's codecs, including those within shards."""
    for codec in (*(metadata.get("codecs") or ()), *(metadata.get("index_codecs") or ())):
        name = str(codec.get("name", codec)).removeprefix("numcodecs.")
        yield name
        yield from names_of(codec.get("configuration") or {})
    for codec in (metadata.get("compressor"), *(metadata.get("filters") or ())):
        if codec is not None:
            yield str(codec.get("id", codec) if isinstance(codec, dict) else codec)


def bound_codecs() -> None:
    """Patch the decoders of numcodecs with a size limit, once per process, because zarr has no setting for one."""
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
    """Return the error for a chunk that decompresses to more than the limit."""
    return ValueError(f"a chunk decompresses to {size} bytes or more; the limit is {most()}")


def bounded_unpacker(unpack: Callable[[bytes], bytes]) -> Callable[..., Any]:
    """Return a codec's decode method with a size limit.

    Args:
        unpack: Function that decompresses at most one byte more than the limit.
    """

    def decode(self: Any, buf: Any, out: Any = None) -> Any:
        from numcodecs.compat import ensure_bytes, ndarray_copy

        data = unpack(ensure_bytes(buf))
        if len(data) > most():
            raise too_large(len(data))
        return ndarray_copy(data, out)

    return decode


def unpack_gzip(data: bytes) -> bytes:
    """Decompress gzip up to one byte over the limit.

    Raises:
        ValueError: The data are not gzip.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(most() + 1)
    # BadGzipFile is an OSError, which would look like a failure of the storage.
    except gzip.BadGzipFile as error:
        raise ValueError(str(error)) from error


def unpack_zlib(data: bytes) -> bytes:
    """Decompress zlib up to one byte over the limit.

    Raises:
        zlib.error: The data are truncated or corrupt.
    """
    unpacker, allowed = zlib.decompressobj(), most()
    unpacked = unpacker.decompress(data, allowed + 1)
    if not unpacker.eof and len(unpacked) <= allowed:
        raise zlib.error("incomplete data")
    return unpacked


def unpack_zstd(data: bytes) -> bytes:
    """Decompress Zstandard into a buffer of the size limit, because frames need not state their size."""
    import imagecodecs

    allowed = most()
    # Without a limit there can be no buffer of its size.
    return bytes(imagecodecs.zstd_decode(data, out=allowed if allowed < sys.maxsize - 1 else None))


def sized(decode: Callable[..., Any], size_of: Callable[[bytes], int]) -> Callable[..., Any]:
    """Return a codec's decode method that checks the decompressed size first.

    Args:
        decode: The codec's own decode method.
        size_of: Function that reads the decompressed size from the head of the data.
    """

    def look_and_decode(self: Any, buf: Any, out: Any = None) -> Any:
        from numcodecs.compat import ensure_bytes

        data = ensure_bytes(buf)
        if (size := size_of(data)) > most():
            raise too_large(size)
        return decode(self, data, out)

    return look_and_decode


def blosc_size(data: bytes) -> int:
    """Read the decompressed size from a Blosc header; return 0 for data without one, which Blosc itself refuses."""
    return int(struct.unpack_from("<I", data, 4)[0]) if len(data) >= 16 else 0


def lz4_size(data: bytes) -> int:
    """Read the decompressed size that numcodecs puts before LZ4 data; read as unsigned, a negative one is very large."""
    return int(struct.unpack_from("<I", data)[0]) if len(data) >= 4 else 0
