"""Arrays that are written as their rows come, in threads of their own, so that no output is ever whole in memory but a PNG."""

import contextlib
import queue
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from deepskip.data_shards.decoding import npy_header
from deepskip.jobs.prediction.georeference import Tag
from deepskip.jobs.prediction.rasters import zarr_of

# side of the tiles of a TIFF and of the chunks of a Zarr array that are written, pixels
TIFF_TILE = 512
ZARR_CHUNK = 1024
PART = ".part"


@dataclass(frozen=True)
class Layout:
    """What is to be written: (height, width) or (height, width, channels), its dtype, and a GeoTIFF's tags."""

    shape: tuple[int, ...]
    dtype: np.dtype
    tags: tuple[Tag, ...] = ()


def write_png(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Writes labels or colours of 8 bits."""
    Image.fromarray(np.concatenate(list(rows))).save(path, "PNG")


def write_npy(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Writes an array as numpy.save does."""
    with path.open("wb") as file:
        file.write(npy_header(layout.shape, layout.dtype))
        for block in rows:
            file.write(np.ascontiguousarray(block, layout.dtype).data)


def write_npz(path: Path, layout: Layout, rows: Iterable[np.ndarray], name: str) -> None:
    """Writes an array as numpy.savez_compressed does."""
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{name: np.concatenate(list(rows))})


def write_tiff(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Writes a compressed TIFF, in tiles where it is large."""
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
    """Cuts rows into whole tiles, row by row of them; what is missing at the right and at the bottom is 0."""
    for block in in_blocks(rows, TIFF_TILE):
        short = [-n % TIFF_TILE for n in block.shape[:2]]
        padded = np.pad(block, [(0, short[0]), (0, short[1]), *[(0, 0)] * (block.ndim - 2)])
        for left in range(0, padded.shape[1], TIFF_TILE):
            yield np.ascontiguousarray(padded[:, left : left + TIFF_TILE])


def write_zarr(path: Path, layout: Layout, rows: Iterable[np.ndarray]) -> None:
    """Writes a Zarr array of chunks of 1024 x 1024 pixels."""
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
}


def in_blocks(rows: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Brings rows into blocks of `size`, the last one as it comes."""
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
    """One file on its way: rows go to a writer in a thread, under a temporary name until it is placed."""

    def __init__(self, path: Path, kind: str, layout: Layout) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.temporary = path, path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
        self.rows: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=2)
        self.error: BaseException | None = None
        self.ended = self.stopped = False
        self.thread = threading.Thread(target=self._write, args=(WRITERS[kind], layout), daemon=True)
        self.thread.start()

    def put(self, rows: np.ndarray) -> None:
        """Hands on the next rows; raises what the writer raised."""
        if self.error:
            raise self.error
        self.rows.put(rows)

    def finish(self) -> None:
        """Waits until all is written; raises what the writer raised."""
        self.rows.put(None)
        self.thread.join()
        if self.error:
            raise self.error

    def place(self) -> None:
        """Gives the file its name, in the place of whatever had it."""
        if self.temporary.is_dir() and self.path.is_dir():
            shutil.rmtree(self.path)
        self.temporary.replace(self.path)

    def discard(self) -> None:
        """Ends the writer, if it is still at work, and removes what it wrote."""
        self.stopped = True
        if self.thread.is_alive():
            self.rows.put(None)
            self.thread.join()
        remove(self.temporary)

    def _write(self, write: Callable[[Path, Layout, Iterable[np.ndarray]], None], layout: Layout) -> None:
        try:
            write(self.temporary, layout, self._coming())
        # whatever it is, the one who waits must hear of it
        except BaseException as error:
            self.error = error
            # nobody may wait for room in the queue
            while not self.ended:
                self.ended = self.rows.get() is None

    def _coming(self) -> Iterator[np.ndarray]:
        while (block := self.rows.get()) is not None:
            yield block
        self.ended = True
        if self.stopped:
            raise InterruptedError


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
        path.unlink()
