"""Write arrays in background threads as their rows arrive; only PNG, npz and small TIFF files are held in memory whole."""

import contextlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from deepskip.data_shards import storage
from deepskip.data_shards.decoding import npy_header
from deepskip.jobs.prediction.georeference import Tag
from deepskip.jobs.prediction.rasters import zarr_of

# The sides of the tiles of a TIFF and of the chunks of a Zarr array, pixels.
TIFF_TILE = 512
ZARR_CHUNK = 1024


@dataclass(frozen=True)
class Layout:
    """Describe an array to write.

    Attributes:
        shape: Shape (height, width) or (height, width, channels).
        dtype: Data type.
        tags: GeoTIFF tags, for TIFF files.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tags: tuple[Tag, ...] = ()


def write_png(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Write labels (rows, W) or colours (rows, W, 3), uint8, as PNG; the layout is not used."""
    Image.fromarray(np.concatenate(list(rows))).save(path, "PNG")


def write_bytes(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Write blocks of bytes (n,), uint8, as they are; the layout is not used."""
    path.write_bytes(b"".join(block.tobytes() for block in rows))


def write_npy(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Write blocks of rows (rows, W) or (rows, W, channels) as numpy.save does."""
    with path.open("wb") as file:
        file.write(npy_header(layout.shape, layout.dtype))
        for block in rows:
            file.write(np.ascontiguousarray(block, layout.dtype).data)


def write_npz(path: Path, layout: Layout, rows: Iterable[np.ndarray], name: str) -> None:
    """Write blocks of rows (rows, W) or (rows, W, channels) as numpy.savez_compressed does, as the array `name`."""
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{name: np.concatenate(list(rows))})


def write_tiff(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Write blocks of rows (rows, W) or (rows, W, channels) as a compressed TIFF, which is tiled if it is large."""
    size = int(np.prod(layout.shape)) * layout.dtype.itemsize
    channels = {"planarconfig": "contig"} if len(layout.shape) == 3 else {}
    options: dict[str, Any] = {
        "photometric": "minisblack",
        "compression": "deflate",
        "metadata": None,
        "extratags": layout.tags,
        **channels,
    }
    with tifffile.TiffWriter(path, bigtiff=size > 2**32 - 2**25) as file:
        if max(layout.shape[:2]) <= TIFF_TILE:
            file.write(np.concatenate(list(rows)), **options)
        else:
            tile = {"tile": (TIFF_TILE, TIFF_TILE)}
            file.write(tiff_tiles(rows), shape=layout.shape, dtype=layout.dtype, **tile, **options)


def tiff_tiles(rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the tiles of blocks of rows (rows, W) or (rows, W, channels), row by row of tiles.

    Tiles (TIFF_TILE, TIFF_TILE) or (TIFF_TILE, TIFF_TILE, channels) are padded with 0 at the right and at the bottom.
    """
    for block in in_blocks(rows, TIFF_TILE):
        short = [-n % TIFF_TILE for n in block.shape[:2]]
        padded = np.pad(block, [(0, short[0]), (0, short[1]), *[(0, 0)] * (block.ndim - 2)])
        for left in range(0, padded.shape[1], TIFF_TILE):
            yield np.ascontiguousarray(padded[:, left : left + TIFF_TILE])


def write_zarr(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Write blocks of rows (rows, W) or (rows, W, channels) as a Zarr array with chunks of ZARR_CHUNK x ZARR_CHUNK pixels.

    Raises:
        ValueError: zarr is not installed.
    """
    dimensions = ("y", "x", "class")[: len(layout.shape)]
    chunks = tuple(min(n, ZARR_CHUNK) for n in layout.shape)
    array = zarr_of(
        lambda zarr: zarr.create_array(
            path, shape=layout.shape, chunks=chunks, dtype=layout.dtype, dimension_names=dimensions
        )
    )
    top = 0
    for block in in_blocks(rows, ZARR_CHUNK):
        array[top : top + len(block)] = block
        top += len(block)


WRITERS: dict[str, Callable[[Path, Layout, Iterable[np.ndarray]], None]] = {
    "png": write_png,
    "npy": write_npy,
    "npz": partial(write_npz, name="mask"),
    "tif": write_tiff,
    "zarr": write_zarr,
    "pgw": write_bytes,
}


def in_blocks(rows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield rows (rows, W) or (rows, W, channels) in blocks of `size` rows; the last one may have fewer."""
    held: list[np.ndarray] = []
    for block in rows:
        held.append(block)
        while sum(map(len, held)) >= size:
            joined = np.concatenate(held)
            yield joined[:size]
            held = [joined[size:]]
    rest = np.concatenate(held) if held else np.empty(0)
    if len(rest):
        yield rest


class Sink:
    """Write one file in a background thread, under a temporary name until it is complete.

    Args:
        path: Final path of the file.
        kind: Format, a key of WRITERS.
        layout: Description of the array.
    """

    def __init__(self, path: Path, kind: str, layout: Layout) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.temporary = path, storage.temporary_beside(path)
        self.rows: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=2)
        self.error: BaseException | None = None
        self.ended = self.stopped = False
        self.thread = threading.Thread(target=self._write, args=(WRITERS[kind], layout), daemon=True)
        self.thread.start()

    def put(self, rows: np.ndarray) -> None:
        """Queue the next rows (rows, W) or (rows, W, channels) for writing; raise the error of the writer if it failed."""
        if self.error:
            raise self.error
        self.rows.put(rows)

    def finish(self) -> None:
        """Wait until all rows are written; raise the error of the writer if it failed."""
        self.rows.put(None)
        self.thread.join()
        if self.error:
            raise self.error

    def place(self) -> None:
        """Rename the file to its final name, replacing any older one."""
        if self.temporary.is_dir() and self.path.is_dir():
            shutil.rmtree(self.path)
        self.temporary.replace(self.path)

    def discard(self) -> None:
        """Stop the writer if it is still running, and remove the temporary file."""
        self.stopped = True
        if self.thread.is_alive():
            self.rows.put(None)
            self.thread.join()
        remove(self.temporary)

    def _write(self, write: Callable[[Path, Layout, Iterable[np.ndarray]], None], layout: Layout) -> None:
        try:
            write(self.temporary, layout, self._coming())
        # Any error must reach the thread that calls put() or finish().
        except BaseException as error:
            self.error = error
            # Drain the queue, so that put() never blocks on a full one.
            while not self.ended:
                self.ended = self.rows.get() is None

    def _coming(self) -> Iterator[np.ndarray]:
        while (block := self.rows.get()) is not None:
            yield block
        self.ended = True
        if self.stopped:
            raise InterruptedError


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
        path.unlink()
