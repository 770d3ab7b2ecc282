"""Codecs of untrusted Zarr arrays execute nothing, and unpack no more than a chunk."""

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from deepskip.jobs.prediction.rasters import open_raster
from tests.attacks import forked

IMAGE = np.random.default_rng(0).integers(0, 255, (100, 80, 3), np.uint8)
LARGE = bytes(2**28)
# Each bomb is name: (format, compressor, function that packs the bomb).
BOMBS: dict[str, tuple[int, Any, Callable[[], bytes]]] = {
    "gzip, version 2": (2, numcodecs.GZip(), lambda: gzip.compress(LARGE, 1)),
    "gzip, version 3": (3, GzipCodec(), lambda: gzip.compress(LARGE, 1)),
    "gzip of two members": (3, GzipCodec(), lambda: 2 * gzip.compress(LARGE, 1)),
    "zlib": (2, numcodecs.Zlib(), lambda: zlib.compress(LARGE, 1)),
    "zstd, version 2": (2, numcodecs.Zstd(), lambda: imagecodecs.zstd_encode(LARGE)),
    "zstd, version 3": (3, ZstdCodec(), lambda: imagecodecs.zstd_encode(LARGE)),
    "blosc, version 2": (2, numcodecs.Blosc(), lambda: numcodecs.Blosc().encode(LARGE)),
    "blosc, version 3": (3, BloscCodec(), lambda: numcodecs.Blosc().encode(LARGE)),
    "lz4": (2, numcodecs.LZ4(), lambda: numcodecs.LZ4().encode(LARGE)),
    "lz4 of a negative size": (2, numcodecs.LZ4(), lambda: b"\xff" * 4 + bytes(64)),
    "uncompressed and short": (3, None, lambda: b"abc"),
}
# These are entries of .zarray.
STRANGE: dict[str, dict[str, Any]] = {
    "pickle as compressor": {"compressor": {"id": "pickle"}},
    "pickle as filter": {"filters": [{"id": "pickle"}]},
    "json as filter": {"filters": [{"id": "json2"}]},
    "msgpack as filter": {"filters": [{"id": "msgpack2"}]},
    "bzip2": {"compressor": {"id": "bz2", "level": 1}},
    "lzma": {"compressor": {"id": "lzma"}},
    "none that there is": {"compressor": {"id": "os.system"}},
}


def array(folder: Path, version: int, compressor: Any) -> Path:
    """Write the image as an array of four chunks."""
    path = folder / "image.zarr"
    made = zarr.create_array(
        path, shape=IMAGE.shape, chunks=(64, 64, 3), dtype="u1", zarr_format=version, compressors=compressor
    )
    made[:] = IMAGE
    return path


def read(path: Path) -> np.ndarray:
    """Read the whole image as a prediction does."""
    with open_raster(path, "zarr", 3) as raster:
        return raster.read(slice(0, raster.height), slice(0, raster.width))


@pytest.mark.parametrize("name", BOMBS)
def test_a_chunk_that_unpacks_to_more_than_its_shape(name: str, tmp_path: Path) -> None:
    version, compressor, bomb = BOMBS[name]
    path = array(tmp_path, version, compressor)
    np.testing.assert_array_equal(read(path), IMAGE)
    chunk = next(
        each
        for each in sorted(path.rglob("*"))
        if each.is_file() and each.name not in ("zarr.json", ".zarray", ".zattrs")
    )
    chunk.write_bytes(bomb())
    outcome = forked.run(lambda: read(path).shape)
    assert (outcome.error, outcome.killed) == ("ValueError", 0), outcome
    assert "does not decode" in outcome.said
    assert outcome.megabytes < 64


@pytest.mark.parametrize("name", STRANGE)
def test_a_codec_that_is_not_known_to_be_harmless(name: str, tmp_path: Path) -> None:
    path = array(tmp_path, 2, None)
    metadata = json.loads((path / ".zarray").read_text())
    (path / ".zarray").write_text(json.dumps(metadata | STRANGE[name]))
    # A pickle codec would execute these chunks.
    for chunk in path.glob("[0-9]*"):
        if chunk.is_file():
            chunk.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "PWNED").encode() + b"'\ntR.")
    outcome = forked.run(lambda: read(path).shape)
    assert (outcome.error, outcome.killed) == ("ValueError", 0), outcome
    assert not (tmp_path / "PWNED").exists()


def test_shards_are_read(tmp_path: Path) -> None:
    path = tmp_path / "image.zarr"
    made = zarr.create_array(path, shape=IMAGE.shape, chunks=(32, 32, 3), shards=(64, 64, 3), dtype="u1")
    made[:] = IMAGE
    np.testing.assert_array_equal(read(path), IMAGE)
