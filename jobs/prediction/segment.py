"""Segment images: small ones in batches, large ones tile by tile, while the next ones are read and results are written."""

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
from deepskip.checkpoint import NetworkState
from deepskip.data_shards import trouble
from deepskip.data_shards.pictures import Reading
from deepskip.data_shards.preparation import band_statistics, shrunk
from deepskip.inference import filled, normalize, to_probabilities, without_values
from deepskip.jobs.prediction import memory
from deepskip.jobs.prediction.done import forget, is_done
from deepskip.jobs.prediction.inputs import Item, opened
from deepskip.jobs.prediction.options import Options
from deepskip.jobs.prediction.outputs import Outputs
from deepskip.jobs.prediction.rasters import Raster, suspected
from deepskip.predictor import Predictor
from deepskip.tiling import Span, batches, enlarged_rows, spans, stitched

# The limits on small images that are read ahead, on the bytes of their files, and on images that wait to be written.
AHEAD, AHEAD_BYTES, WRITING = 16, 2**23, 8
# The limits on images that wait for others of their size, and on the bytes that they hold in memory.
WAITING, WAITING_BYTES = 64, 2**27
# The rows of an enlarged result, or of an image's statistics, that are computed at once.
ROWS = 512
# Reports progress within a large image: its finished share, 0 to 1, and its finished pixels.
Told = Callable[[float, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """Describe the result for one image.

    Attributes:
        name: Name of the image's outputs.
        pixels: Segmented pixels; 0 if it failed or was skipped.
        fault: Why the image could not be segmented, or None.
        skipped: Whether the image was done before.
        note: Remark for the user, or None.
    """

    name: str
    pixels: int = 0
    fault: str | None = None
    skipped: bool = False
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


@dataclass
class Loaded:
    """Hold an open image.

    Attributes:
        item: The image's item.
        raster: The image as stored.
        ready: Network input (H, W, bands), before normalisation, if the image is in memory or was shrunk; else None.
        open_files: Stack that closes the image.
        note: Remark for the user, or None.
    """

    item: Item
    raster: Raster
    ready: np.ndarray | None
    open_files: contextlib.ExitStack
    note: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network input, pixels."""
        if self.ready is not None:
            return self.ready.shape[0], self.ready.shape[1]
        return self.raster.height, self.raster.width


class CannotWrite(RuntimeError):
    """Raised if no output of any image can be written; its cause gives the reason."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Convert errors that concern the whole machine, such as a full disk, so that they are not taken for one bad image.

    Raises:
        CannotWrite: The block failed because the machine lacks disk space, permissions or the like.
    """
    try:
        yield
    except OSError as error:
        if trouble.in_words(error):
            raise CannotWrite(str(error)) from error
        raise


class PredictionWorker:
    """Segment images with the model of a checkpoint.

    Args:
        state: State of the checkpoint.
        options: Settings of the prediction.
        out: Folder of the outputs.
        made_by: Fingerprint of the model and of the settings that decide the outputs.
        processes: Number of processes that share the device's memory.

    Raises:
        ValueError: The device of the settings is missing.
    """

    def __init__(self, state: NetworkState, options: Options, out: Path, made_by: str, processes: int = 1) -> None:
        self.device = memory.device_of(options.device)
        # Returning freed memory costs time, which pays off only under a memory limit.
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
        """Number of logits per pixel."""
        return self.segmenter.num_classes

    def run(self, items: Sequence[Item], told: Told = lambda share, pixels: None) -> Iterator[Outcome]:
        """Segment images; an image that fails yields an outcome with a fault and does not stop the others.

        Args:
            items: The images.
            told: Called with the finished share (0 to 1) and pixels of a large image.

        Yields:
            One outcome per image, not in the order of the items.

        Raises:
            CannotWrite: The machine lacks disk space, permissions or the like.
        """
        with ThreadPoolExecutor(2, "read") as readers, ThreadPoolExecutor(2, "write") as writers:
            writing: deque[Future[Outcome]] = deque()
            # Images wait here for others of their size.
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
        """Yield the opened images in order, reading small files ahead; skipped and failed ones come as outcomes."""
        coming: deque[tuple[int, Future[Loaded | Outcome]]] = deque()
        for item in items:
            while coming and (len(coming) == AHEAD or sum(size for size, _ in coming) + item.bytes > AHEAD_BYTES):
                yield coming.popleft()[1].result()
            coming.append((item.bytes, readers.submit(self.load, item)))
        for _, future in coming:
            yield future.result()

    def load(self, item: Item) -> Loaded | Outcome:
        """Open one image, and prepare it if it is in memory or must be shrunk.

        Returns:
            The open image, or the outcome of an image that is already done or cannot be opened.
        """
        if is_done(self.out, item, self.made_by):
            return Outcome(item.name, skipped=True)
        forget(self.out, item)
        open_files = contextlib.ExitStack()
        try:
            bands, longest_side = self.preparation["bands"], self.preparation["longest_side"]
            wanted = self.predictor.image_bands
            raster = open_files.enter_context(opened(item, None if bands else wanted, self.reading))
            if not bands and raster.bands != wanted:
                raise ValueError(f"has {raster.bands} bands; the model takes {wanted}")
            note, value = None, suspected(raster)
            if value is not None:
                note = f"has values of {value:g}, far from all others, which may mean no data: --nodata={value:g}"
            ready = raster.whole
            if ready is None and longest_side and max(raster.height, raster.width) > longest_side:
                shape, columns = (raster.height, raster.width, raster.bands), slice(0, raster.width)
                ready = shrunk(lambda a, b: raster.read(slice(a, b), columns), shape, raster.dtype, longest_side)
            if ready is not None:
                ready = self.predictor.prepared(ready)
            return Loaded(item, raster, ready, open_files, note)
        except (ValueError, OSError) as error:
            open_files.close()
            return fault(item, error)

    def small(self, group: Sequence[Loaded], writers: ThreadPoolExecutor) -> list[Future[Outcome]]:
        """Segment images of one size in a batch, and write their outputs in other threads.

        If the device's memory runs out, the batch is halved; then a single image is segmented in tiles.

        Args:
            group: The images.
            writers: Threads that write.

        Returns:
            The future outcome of each image.
        """
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
        # One of the images is bad: segment each alone to find it.
        except (ValueError, OSError) as error:
            if len(group) > 1:
                return [future for each in group for future in self.small([each], writers)]
            group[0].open_files.close()
            return [done_already(fault(group[0].item, error))]
        return [writers.submit(self.write, each, p_VHW) for each, p_VHW in zip(group, found, strict=True)]

    def window(self, image: Loaded, rows: slice | None = None, columns: slice | None = None) -> np.ndarray:
        """Read the network input of an image, or a window of it, before normalisation.

        Args:
            image: The image.
            rows: Rows of the window; all by default.
            columns: Columns of the window; all by default.

        Returns:
            Array (rows, columns, bands), nan at missing pixels.
        """
        rows, columns = rows or slice(0, image.size[0]), columns or slice(0, image.size[1])
        if image.ready is not None:
            return image.ready[rows, columns]
        window = image.raster.read(rows, columns)
        return self.predictor.of_network_bands(window)

    @torch.inference_mode()
    def probabilities(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Compute the probabilities of whole images.

        Args:
            images_NHWC: Images before normalisation (N, H, W, C), float32, nan at missing pixels.

        Returns:
            Probabilities (N, V, H, W), float32.
        """
        images = torch.from_numpy(images_NHWC).to(self.device).permute(0, 3, 1, 2)
        normalized, nowhere_NHW = self.segmenter.normalized_where_seen(images)
        return without_values(to_probabilities(self.logits(normalized)), nowhere_NHW).cpu().numpy()

    def logits(self, normalized_NCHW: Tensor) -> Tensor:
        """Compute the logits (N, V, H, W), fp32, of normalised images (N, C, H, W) without cutting them into tiles."""
        return self.predictor.logits(normalized_NCHW, in_tiles=False)

    def write(self, image: Loaded, p_VHW: np.ndarray) -> Outcome:
        """Write the outputs of an image and close it.

        Args:
            image: The image.
            p_VHW: Probabilities (V, h, w). They are enlarged to the raster's size if the image was shrunk.
        """
        H, W = image.raster.height, image.raster.width

        def rows() -> Iterator[tuple[int, np.ndarray]]:
            if p_VHW.shape[1:] == (H, W):
                yield 0, p_VHW
            else:
                # Enlarge the probabilities rather than the labels, so that outlines are smooth.
                for top in range(0, H, ROWS):
                    bottom = min(top + ROWS, H)
                    p_VrW = enlarged_rows(p_VHW, H, W, top, bottom)
                    if image.raster.nodata:
                        window = self.predictor.of_network_bands(image.raster.read(slice(top, bottom), slice(0, W)))
                        nowhere = torch.from_numpy(np.isnan(window).all(2))
                        p_VrW = without_values(torch.from_numpy(p_VrW)[None], nowhere[None])[0].numpy()
                    yield top, p_VrW

        try:
            return self.outcome(image, rows())
        except (ValueError, OSError) as error:
            return fault(image.item, error)
        finally:
            image.open_files.close()

    def large(self, image: Loaded, told: Told) -> Outcome:
        """Segment an image tile by tile and close it; if the device's memory runs out, retry with smaller tiles.

        Args:
            image: The image.
            told: Called with the finished share (0 to 1) and pixels of the image.
        """
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
        """Write the outputs of an image while its probabilities arrive; after an error none of them is kept.

        Args:
            image: The image.
            rows: First row and probabilities (V, rows, W) of each stripe, from top to bottom.

        Raises:
            CannotWrite: The machine lacks disk space, permissions or the like.
        """
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
        place = image.raster.place.note if self.options.polygons == "geojson" else None
        note = "; ".join(filter(None, (image.note, place))) or None
        return Outcome(image.item.name, image.raster.height * image.raster.width, note=note)

    def tiled(self, image: Loaded, told: Told) -> Iterator[tuple[int, np.ndarray]]:
        """Compute an image's probabilities from overlapping tiles.

        Args:
            image: The image.
            told: Called with the finished share (0 to 1) and pixels of the image.

        Yields:
            First row and probabilities (V, rows, W), float32, of each stripe, from top to bottom.
        """
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
        """Return the mean and standard deviation that an image is normalised by.

        An image's own statistics are accumulated by Chan, Golub and LeVeque's formula for the variance of joined samples.

        Args:
            image: The image.
            tile: Side of the windows that are read, pixels.

        Returns:
            Two tensors (1, bands), or None twice for a network without normalisation.
        """
        if self.segmenter.how == "none":
            return None, None
        if self.segmenter.how in ("dataset", "robust"):
            return self.segmenter.mean, self.segmenter.std
        H, W = image.size
        # Read a window at a time and add up the squared deviations in fp64.
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
    """Yield the same items, each computed in a thread while the previous one is in use."""
    nothing: Any = object()
    coming = reader.submit(next, items, nothing)
    while (item := coming.result()) is not nothing:
        coming = reader.submit(next, items, nothing)
        yield item


def too_many(waiting: Sequence[Loaded]) -> bool:
    """Return whether the images that wait for others of their size are too many, or hold too much memory."""
    held = sum(each.raster.whole.nbytes for each in waiting if each.raster.whole is not None)
    return len(waiting) >= WAITING or held >= WAITING_BYTES


def fault(item: Item, error: Exception) -> Outcome:
    """Return the outcome of an image that failed with an error."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return Outcome(item.name, fault=f"{item} {reason}")


def done_already(outcome: Outcome) -> "Future[Outcome]":
    """Return a future that already holds an outcome."""
    future: Future[Outcome] = Future()
    future.set_result(outcome)
    return future
