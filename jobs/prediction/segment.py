"""Images through the network and out: small ones several at once, large ones tile by tile, the next being read meanwhile."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from deepskip.allocator import give_back_freed_memory
from deepskip.data_shards import trouble
from deepskip.data_shards.pictures import Reading
from deepskip.data_shards.preparation import band_statistics, resample_bands, shrunk
from deepskip.inference import filled, normalize, to_probabilities, without_values
from deepskip.jobs.prediction import memory
from deepskip.jobs.prediction.done import is_done
from deepskip.jobs.prediction.inputs import Item, opened
from deepskip.jobs.prediction.options import Options
from deepskip.jobs.prediction.outputs import Outputs
from deepskip.jobs.prediction.rasters import Raster
from deepskip.predictor import Predictor
from deepskip.tiling import Span, batches, enlarged_rows, spans, stitched

# small images that are read ahead, with the bytes of their files, and images that wait to be written
AHEAD, AHEAD_BYTES, WRITING = 16, 2**23, 8
# images that wait for others of their size, and the bytes of them that are in memory
WAITING, WAITING_BYTES = 64, 2**27
# rows of an enlarged result at a time
ROWS = 512
# what is told of how far a large image is: share of it, 0 to 1, and pixels
Told = Callable[[float, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of an image: pixels, and why it could not be segmented. skipped: it was done before. note: to be told."""

    name: str
    pixels: int = 0
    fault: str | None = None
    skipped: bool = False
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Gives it as plain values."""
        return asdict(self)


@dataclass
class Loaded:
    """An image that is open. ready: what the network takes (H, W, bands), where the image is in memory or was shrunk."""

    item: Item
    raster: Raster
    ready: np.ndarray | None
    open_files: contextlib.ExitStack

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network takes."""
        if self.ready is not None:
            return self.ready.shape[0], self.ready.shape[1]
        return self.raster.height, self.raster.width


class CannotWrite(RuntimeError):
    """No output can be written, of this image or any other; what led to it says why."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Tells what a whole machine is short of, a full disk above all, from what is wrong with one image."""
    try:
        yield
    except OSError as error:
        if trouble.in_words(error):
            raise CannotWrite(str(error)) from error
        raise


class PredictionWorker:
    """Segments images with the model of a checkpoint's state.

    out: folder of the outputs. made_by: fingerprint of model and settings. processes: how many share the device's memory.
    Raises ValueError for a device that is not there.
    """

    def __init__(self, state: dict[str, Any], options: Options, out: Path, made_by: str, processes: int = 1) -> None:
        self.device = memory.device_of(options)
        # others would pay its time for memory that they have
        if options.memory_gb is not None and self.device.type == "cpu":
            give_back_freed_memory()
        precision = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
        self.predictor = Predictor(state, self.device, options.flips, precision)
        self.segmenter, self.preparation = self.predictor.segmenter, self.predictor.preparation
        self.options, self.out, self.made_by = options, out, made_by
        nodata = self.predictor.nodata if options.nodata is None else options.nodata
        self.reading = Reading(options.alpha, options.orientation, missing=True, nodata=nodata)
        self.plan = memory.plan(self.segmenter, options, self.device, processes)

    @property
    def num_classes(self) -> int:
        """Number of the network's logits a pixel."""
        return self.segmenter.num_classes

    def run(self, items: Sequence[Item], told: Told = lambda share, pixels: None) -> Iterator[Outcome]:
        """Segments images; an image that cannot be is an outcome with a fault, and the others go on."""
        with ThreadPoolExecutor(2, "read") as readers, ThreadPoolExecutor(2, "write") as writers:
            writing: deque[Future[Outcome]] = deque()
            # images of one size wait for each other
            groups: dict[tuple[int, int], list[Loaded]] = {}
            for loaded in self.loaded(items, readers):
                if isinstance(loaded, Outcome):
                    writing.append(done_already(loaded))
                elif loaded.size[0] * loaded.size[1] > self.plan.tile**2:
                    writing.append(done_already(self.large(loaded, told)))
                else:
                    groups.setdefault(loaded.size, []).append(loaded)
                    if len(groups[loaded.size]) >= self.plan.images(*loaded.size):
                        writing.extend(self.small(groups.pop(loaded.size), writers))
                    elif too_many([each for group in groups.values() for each in group]):
                        writing.extend(self.small(groups.pop(next(iter(groups))), writers))
                while writing and (writing[0].done() or len(writing) > WRITING):
                    yield writing.popleft().result()
            for group in groups.values():
                writing.extend(self.small(group, writers))
            while writing:
                yield writing.popleft().result()

    def loaded(self, items: Sequence[Item], readers: ThreadPoolExecutor) -> Iterator[Loaded | Outcome]:
        """Opens images, small files ahead of their turn."""
        coming: deque[tuple[int, Future[Loaded | Outcome]]] = deque()
        for item in items:
            while coming and (len(coming) == AHEAD or sum(size for size, _ in coming) + item.bytes > AHEAD_BYTES):
                yield coming.popleft()[1].result()
            coming.append((item.bytes, readers.submit(self.load, item)))
        for _, future in coming:
            yield future.result()

    def load(self, item: Item) -> Loaded | Outcome:
        """Opens one image, and prepares it where it is in memory; an image that was done meanwhile is passed over."""
        if is_done(self.out, item, self.made_by):
            return Outcome(item.name, skipped=True)
        open_files = contextlib.ExitStack()
        try:
            bands, longest_side = self.preparation["bands"], self.preparation["longest_side"]
            raster = open_files.enter_context(opened(item, None if bands else self.segmenter.bands, self.reading))
            if not bands and raster.bands != self.segmenter.bands:
                raise ValueError(f"has {raster.bands} bands; the model takes {self.segmenter.bands}")
            ready = raster.whole
            if ready is None and longest_side and max(raster.height, raster.width) > longest_side:
                shape, columns = (raster.height, raster.width, raster.bands), slice(0, raster.width)
                ready = shrunk(lambda a, b: raster.read(slice(a, b), columns), shape, raster.dtype, longest_side)
            if ready is not None:
                ready = self.predictor.prepared(ready)
            return Loaded(item, raster, ready, open_files)
        except (ValueError, OSError) as error:
            open_files.close()
            return fault(item, error)

    def small(self, group: Sequence[Loaded], writers: ThreadPoolExecutor) -> list[Future[Outcome]]:
        """Segments images of one size together."""
        try:
            found = self.probabilities(np.stack([np.asarray(self.window(each), np.float32) for each in group]))
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            if len(group) > 1:
                self.plan.batch = len(group) // 2
                middle = len(group) // 2
                return self.small(group[:middle], writers) + self.small(group[middle:], writers)
            if not memory.smaller(self.plan):
                group[0].open_files.close()
                return [done_already(fault(group[0].item, error))]
            return [done_already(self.large(group[0], lambda share, pixels: None))]
        # fault names what is wrong with the image
        except (ValueError, OSError) as error:
            if len(group) > 1:
                return [future for each in group for future in self.small([each], writers)]
            group[0].open_files.close()
            return [done_already(fault(group[0].item, error))]
        return [writers.submit(self.write, each, p_VHW) for each, p_VHW in zip(group, found, strict=True)]

    def window(self, image: Loaded, rows: slice | None = None, columns: slice | None = None) -> np.ndarray:
        """Reads what the network takes of an image, or a window of it: (rows, columns, bands)."""
        rows, columns = rows or slice(0, image.size[0]), columns or slice(0, image.size[1])
        if image.ready is not None:
            return image.ready[rows, columns]
        window = image.raster.read(rows, columns)
        bands = self.preparation["bands"]
        return resample_bands(window, bands) if bands else window

    @torch.inference_mode()
    def probabilities(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Computes the probabilities (N, V, H, W) of whole images."""
        images = torch.from_numpy(images_NHWC).to(self.device).permute(0, 3, 1, 2)
        normalized, nowhere_NHW = self.segmenter.normalized_where_seen(images)
        return without_values(to_probabilities(self.logits(normalized)), nowhere_NHW).cpu().numpy()

    def logits(self, normalized_NCHW: Tensor) -> Tensor:
        """Computes logits in fp32; tiles are as the plan has them."""
        return self.predictor.logits(normalized_NCHW, in_tiles=False)

    def write(self, image: Loaded, p_VHW: np.ndarray) -> Outcome:
        """Writes the outputs of an image from its probabilities, enlarged where the image was shrunk."""
        H, W = image.raster.height, image.raster.width

        def rows() -> Iterator[tuple[int, np.ndarray]]:
            if p_VHW.shape[1:] == (H, W):
                yield 0, p_VHW
            else:
                # probabilities are enlarged rather than labels: outlines come out smooth
                for top in range(0, H, ROWS):
                    yield top, enlarged_rows(p_VHW, H, W, top, min(top + ROWS, H))

        try:
            return self.outcome(image, rows())
        except (ValueError, OSError) as error:
            return fault(image.item, error)
        finally:
            image.open_files.close()

    def large(self, image: Loaded, told: Told) -> Outcome:
        """Segments an image tile by tile, with smaller tiles where the memory was too little."""
        with image.open_files:
            while True:
                try:
                    rows = self.tiled(image, told)
                    if image.size == (image.raster.height, image.raster.width):
                        return self.outcome(image, rows)
                    return self.write(image, np.concatenate([p_VrW for _, p_VrW in rows], axis=1))
                except (ValueError, OSError) as error:
                    return fault(image.item, error)
                except torch.OutOfMemoryError as error:
                    torch.cuda.empty_cache()
                    if not memory.smaller(self.plan):
                        return fault(image.item, error)

    def outcome(self, image: Loaded, rows: Iterable[tuple[int, np.ndarray]]) -> Outcome:
        """Writes the outputs of an image as rows of its probabilities come."""
        with writing():
            outputs = Outputs(self.out, image.item, image.raster, self.num_classes, self.options)
        try:
            for top, p_VrW in rows:
                with writing():
                    outputs.rows(top, p_VrW)
            with writing():
                outputs.finish(self.made_by)
        except BaseException:
            outputs.discard()
            raise
        note = image.raster.place.note if self.options.polygons == "geojson" else None
        return Outcome(image.item.name, image.raster.height * image.raster.width, note=note)

    def tiled(self, image: Loaded, told: Told) -> Iterator[tuple[int, np.ndarray]]:
        """Computes an image's probabilities in stripes of rows (V, rows, width), from overlapping tiles."""
        H, W = image.size
        by_rows = image.ready is None and image.raster.by_rows
        band_bytes = image.raster.dtype.itemsize * image.raster.bands if by_rows else 0
        tile = self.plan.tile_of(W, 8 * self.num_classes + band_bytes)
        rows, columns = spans(H, tile, self.plan.overlap), spans(W, tile, self.plan.overlap)
        mean, std = self.statistics(image, tile)
        batch = self.plan.images(tile, tile)

        def windows() -> Iterator[np.ndarray]:
            for row in rows:
                down = slice(row.start, row.stop)
                stripe = self.window(image, down) if by_rows else None
                for group in batches(columns, batch):
                    across = [slice(column.start, column.stop) for column in group]
                    found = [self.window(image, down, a) if stripe is None else stripe[:, a] for a in across]
                    yield np.stack([np.asarray(window, np.float32) for window in found])

        def logits_of(row: Span, group: Sequence[Span]) -> Tensor:
            images = torch.from_numpy(next(coming)).to(self.device).permute(0, 3, 1, 2)
            if image.raster.nodata:
                images, _ = filled(images, mean if mean is not None else self.segmenter.mean)
            if mean is not None and std is not None:
                images = normalize(images, mean, std)
            return self.logits(images)

        with ThreadPoolExecutor(1, "tiles") as reader:
            coming = one_ahead(windows(), reader)
            for top, logits_VrW in stitched(logits_of, rows, columns, self.num_classes, batch):
                p_VrW = to_probabilities(logits_VrW[None])
                if image.raster.nodata:
                    bottom = top + logits_VrW.shape[1]
                    nowhere = np.isnan(self.window(image, slice(top, bottom))).all(2)
                    p_VrW = without_values(p_VrW, torch.from_numpy(nowhere[None]))
                yield top, p_VrW[0].numpy()
                told((top + logits_VrW.shape[1]) / H, (top + logits_VrW.shape[1]) * W)

    def statistics(self, image: Loaded, tile: int) -> tuple[Tensor | None, Tensor | None]:
        """Gives each band's mean and deviation, by which an image is normalised: two tensors (1, bands), or None twice."""
        if self.segmenter.how == "none":
            return None, None
        if self.segmenter.how == "dataset":
            return self.segmenter.mean, self.segmenter.std
        H, W = image.size
        # a window at a time, in fp64: sums of squares around the mean add up by Chan's rule
        step = W if image.ready is None and image.raster.by_rows else tile
        count, mean_C, squares_C = (np.zeros(self.segmenter.bands) for _ in range(3))
        for top in range(0, H, ROWS):
            for left in range(0, W, step):
                window = self.window(image, slice(top, min(top + ROWS, H)), slice(left, min(left + step, W)))
                here_C, deviation_C = band_statistics(window)
                new = np.full(self.segmenter.bands, window.shape[0] * window.shape[1])
                if image.raster.nodata:
                    new -= np.isnan(window).sum((0, 1))
                apart, together = here_C - mean_C, np.maximum(count + new, 1)
                squares_C += deviation_C**2 * new + apart**2 * (count * new / together)
                count += new
                mean_C += apart * (new / together)
        std_C = np.sqrt(squares_C / np.maximum(count, 1))
        mean, std = (torch.tensor(values[None], dtype=torch.float32, device=self.device) for values in (mean_C, std_C))
        return mean, std


def one_ahead(items: Iterator[T], reader: ThreadPoolExecutor) -> Iterator[T]:
    """Gives the same items, each made in a thread while the one before is worked on."""
    nothing: Any = object()
    coming = reader.submit(next, items, nothing)
    while (item := coming.result()) is not nothing:
        coming = reader.submit(next, items, nothing)
        yield item


def too_many(waiting: Sequence[Loaded]) -> bool:
    """Says whether images that wait for others of their size have waited long enough."""
    held = sum(each.raster.whole.nbytes for each in waiting if each.raster.whole is not None)
    return len(waiting) >= WAITING or held >= WAITING_BYTES


def fault(item: Item, error: Exception) -> Outcome:
    """Says of an image what is wrong with it."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return Outcome(item.name, fault=f"{item} {reason}")


def done_already(outcome: Outcome) -> "Future[Outcome]":
    """Makes a future of what is known."""
    future: Future[Outcome] = Future()
    future.set_result(outcome)
    return future
