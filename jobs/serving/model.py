"""The replicas of the model: bytes of an image file in, bytes of an answer out."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from deepskip import inference, publishing
from deepskip.checkpoint import NetworkState
from deepskip.data_shards.decoding import Limits, TooLarge, decode_image
from deepskip.data_shards.pictures import AS_IT_COMES, Reading
from deepskip.jobs.serving.answers import Answer, encode
from deepskip.jobs.serving.batches import Batches
from deepskip.predictor import Predictor

# Bytes of decoded images in memory at once; decoding waits until there is room.
DECODED_BYTES = 2**29
# Bytes per value of an image, which convert the limit in pixels into one in bytes.
VALUE_BYTES = 4
# A model that could not be loaded, but is not damaged, is loaded again after this time.
RETRY_SECONDS = 5.0
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Loaded:
    """One model in memory, with the queue of the images that it computes.

    Args:
        state: a checkpoint's state, with "config", "data", "model" and "ema".
        device: "cpu" or "cuda".
        max_pixels: largest number of pixels of an image.
        batch: largest number of images that go through the network together.
        batch_wait: time, in seconds, that the first image of a batch waits for others that are being decoded.
        reading: how images are read; without a nodata value the training data's counts.
        sha256: digest of a published model; "" for another one.
    """

    def __init__(
        self,
        state: NetworkState,
        device: str,
        max_pixels: int,
        batch: int,
        batch_wait: float,
        reading: Reading,
        sha256: str,
    ) -> None:
        self.sha256 = sha256
        self.predictor = Predictor(state, device)
        nodata = self.predictor.nodata if reading.nodata is None else reading.nodata
        self.reading = replace(reading, missing=True, nodata=nodata)
        bands = self.predictor.image_bands
        self.limits = Limits(max_pixels, max_pixels * max(bands, 3) * VALUE_BYTES)
        most = (inference.TILE // inference.enlarged_by(self.predictor.network)) ** 2
        self.batches = Batches(self.forward, batch, most, batch_wait)
        # The first pass through the network takes longest, so it is done before requests come.
        self.predictor.predict(np.zeros((64, 64, bands), np.float32))

    def read(self, body: bytes, extension: str) -> np.ndarray:
        """Decode an image, and check that the model accepts it.

        Args:
            body: bytes of the image file.
            extension: kind of file of the body: "png", "jpg", "tif" or "npy".

        Returns:
            The image (H, W, bands), in the file's dtype. If pixels have no value, it is float32 or float64 with nan there.

        Raises:
            ValueError: if the file cannot be decoded, has other bands than the model, or values beyond LARGEST.
            TooLarge: if the image has too many pixels or bytes; it is a ValueError.
        """
        bands = self.predictor.image_bands if self.predictor.preparation["bands"] is None else None
        image = decode_image(extension, body, self.limits, bands, self.reading)
        if self.predictor.preparation["bands"] is None and image.shape[2] != bands:
            raise ValueError(f"has {image.shape[2]} bands; the model takes {bands}")
        return image

    def forward(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Compute the probabilities of prepared images of one size; a single image may be large, and is computed in tiles.

        If a batch does not fit into the GPU's memory, its images are computed one at a time.

        Args:
            images: arrays (H, W, bands) of one shape and dtype, with the bands of the network.

        Returns:
            For each image its probabilities (V, H, W), fp32; V = 1 is binary.

        Raises:
            torch.OutOfMemoryError: if a single image does not fit into the GPU's memory.
        """
        try:
            x_NHWC = torch.from_numpy(np.stack(images, dtype=np.float32, casting="unsafe"))
            return list(self.predictor.probabilities(x_NHWC.permute(0, 3, 1, 2)).cpu().numpy())
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
            torch.cuda.empty_cache()
        return [p_VHW for image in images for p_VHW in self.forward([image])]


class Model:
    """One replica of the model, as a Ray Serve deployment.

    Args:
        state: a checkpoint's state, with "config", "data", "model" and "ema".
        device: "cpu" or "cuda".
        max_pixels: largest number of pixels of an image.
        batch: largest number of images that go through the network together.
        batch_wait: time, in seconds, that the first image of a batch waits for others that are being decoded.
        threads: number of torch's CPU threads, of threads that decode, and of threads that encode.
        published: folder or URL of published models, of which requests name the one to take over; None for one model.
        sha256: digest of the first model, if it is published.
        reading: how images are read; without a nodata value the training data's counts.
    """

    def __init__(
        self,
        state: NetworkState,
        device: str,
        max_pixels: int,
        batch: int,
        batch_wait: float,
        threads: int,
        published: str | None = None,
        sha256: str = "",
        reading: Reading = AS_IT_COMES,
    ) -> None:
        close_back_door()
        torch.set_num_threads(threads)
        self.options = (device, max_pixels, batch, batch_wait, reading)
        self.data = state["data"]
        # A replica that is started again begins with the newest model.
        state, sha256 = newest(published, state, sha256)
        self.loaded = Loaded(state, *self.options, sha256)
        # Decoding waits for memory that encoding frees, so each has threads of its own; shared threads could deadlock.
        self.decoders, self.encoders = Slots(threads), Slots(threads)
        self.room = Room(DECODED_BYTES)
        self.published, self.fault = published, ""
        self.loading: tuple[str, asyncio.Task[None]] | None = None

    @property
    def predictor(self) -> Predictor:
        """Return the model that new requests are answered by."""
        return self.loaded.predictor

    def follow(self, sha256: str) -> None:
        """Begin to load a published model, unless it is loaded, is being loaded, or could not be loaded.

        Until it is ready, the old model answers. Requests that it has begun are answered by it to the end.

        Args:
            sha256: digest of the model.
        """
        busy = self.loading is not None and (self.loading[0] == sha256 or not self.loading[1].done())
        if self.published is not None and sha256 and sha256 != self.loaded.sha256 and not busy:
            self.loading = sha256, asyncio.create_task(self.take(sha256))

    async def take(self, sha256: str) -> None:
        """Load a published model, and answer new requests by it; if it cannot be loaded, `fault` has the reason.

        Args:
            sha256: digest of the model.
        """
        assert self.published is not None
        try:
            state = await asyncio.to_thread(publishing.load_like, self.published, sha256, self.data)
            made = await asyncio.to_thread(Loaded, state, *self.options, sha256)
        # Whatever is wrong with the new model, the old one answers.
        except Exception as error:
            fault = f"model {sha256} cannot be taken over: {error}"
            if fault != self.fault:
                logger.exception("model %s cannot be taken over", sha256)
            self.fault = fault
            if not isinstance(error, publishing.BrokenPublication) or isinstance(error, publishing.NotWhole):
                # The storage may answer again or show the whole file, and memory may be free.
                await asyncio.sleep(RETRY_SECONDS)
                self.loading = None
            return
        # One thread computes for both, while the old model has requests.
        made.batches.thread.shutdown()
        made.batches.thread = self.loaded.batches.thread
        self.loaded, self.fault = made, ""

    async def prepare(self, sha256: str) -> tuple[str, str]:
        """Begin to load a published model, and return the digest of the present one and the fault, or ""."""
        self.follow(sha256)
        return self.loaded.sha256, self.fault

    async def segment(self, body: bytes, extension: str, answer: str, sha256: str = "") -> Answer:
        """Answer one request: decode the image, run the network, and encode the answer.

        Args:
            body: bytes of the image file.
            extension: kind of file of the body: "png", "jpg", "tif" or "npy".
            answer: format of the answer, a key of answers.FORMATS.
            sha256: digest of the published model to take over; it may be loaded only after this request.

        Returns:
            The answer. Its status is 413 if the image is too large. It is 422 if the image cannot be decoded, if the model does
            not accept it, or if its outlines are too long for polygons.
        """
        started = time.perf_counter()
        self.follow(sha256)
        # The whole request is answered by one model.
        loaded = self.loaded
        try:
            # The size of an image is known only after decoding, so each thread may decode one image beyond the room.
            with loaded.batches.announcing():
                image = await self.decoders.run(loaded.read, body, extension, ready=self.room.left)
        except TooLarge as error:
            return Answer(413, reason=f"the image: {error}")
        except ValueError as error:
            return Answer(422, reason=f"the image: {error}")
        with self.room.taken(image.nbytes):
            decoded = time.perf_counter()
            with loaded.batches.announcing():
                prepared = await asyncio.to_thread(loaded.predictor.prepared, image)
            try:
                p_VHW, number = await loaded.batches.run(prepared)
            except torch.OutOfMemoryError:
                return Answer(
                    413, reason=f"the image: its {image.shape[0]} x {image.shape[1]} pixels do not fit into the GPU"
                )
            segmented = time.perf_counter()
            made = await self.encoders.run(encode, image, p_VHW, answer)
        made.batch, made.model, made.fault = number, loaded.sha256, self.fault
        ended = time.perf_counter()
        made.seconds = {"decode": decoded - started, "network": segmented - decoded, "encode": ended - segmented}
        return made

    async def describe(self) -> dict[str, Any]:
        """Return {"bands", "classes"} of the model; bands is None if images with any number of bands are resampled."""
        resampled = self.predictor.preparation["bands"] is not None
        return {"bands": None if resampled else self.predictor.image_bands, "classes": self.predictor.num_classes}


def newest(published: str | None, state: NetworkState, sha256: str) -> tuple[NetworkState, str]:
    """Return the state and the digest of the published model, or those that are given if it cannot be loaded.

    Args:
        published: folder or URL of the published models; None for one model.
        state: a model's state.
        sha256: its digest.
    """
    if published is None:
        return state, sha256
    try:
        pointer = publishing.read_pointer(published)
        if pointer is None or pointer.sha256 == sha256:
            return state, sha256
        return publishing.load_like(published, pointer.sha256, state["data"]), pointer.sha256
    # The server reports what is wrong with it.
    except (publishing.BrokenPublication, OSError):
        return state, sha256


class Slots:
    """Runs functions in `count` threads; a slot is free when its function has ended, not when its caller has left.

    Attributes:
        free: semaphore of the free slots.
        threads: the threads.
    """

    def __init__(self, count: int) -> None:
        self.free = asyncio.Semaphore(count)
        self.threads = ThreadPoolExecutor(count)

    async def run(self, function: Callable[..., T], *arguments: Any, ready: asyncio.Event | None = None) -> T:
        """Run a function in the next free slot, as soon as `ready` is set.

        Args:
            function: called in a thread.
            *arguments: its arguments.
            ready: waited for while the slot is held; None starts at once.

        Returns:
            The function's result.

        Raises:
            Exception: the function's error.
        """
        await self.free.acquire()
        loop = asyncio.get_running_loop()
        try:
            if ready is not None:
                await ready.wait()
            running = self.threads.submit(function, *arguments)
        except BaseException:
            self.free.release()
            raise
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self.free.release))
        return await asyncio.wrap_future(running)


class Room:
    """Counts bytes in memory, so that tasks can wait until there is room.

    Attributes:
        most: there is room while fewer bytes than this are held.
        held: bytes held now; may exceed `most`.
        left: event that is set while there is room.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.left = asyncio.Event()
        self.left.set()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Count `count` bytes as held while the block runs."""
        self.change(count)
        try:
            yield
        finally:
            self.change(-count)

    def change(self, count: int) -> None:
        """Add `count` bytes, or release them if it is negative, and set or clear `left`."""
        self.held += count
        if self.held < self.most:
            self.left.set()
        else:
            self.left.clear()


def close_back_door() -> None:
    """Keep Ray Serve from opening a port in each replica that unpickles data from anybody, on every network interface.

    Over this port deployments may call each other by gRPC. The front calls replicas as Ray actors instead, protected by Ray's
    token. Serve has no setting for the port, which binds to [::] when the model is loaded. Outside a replica this does nothing.

    Raises:
        AssertionError: if this version of Ray Serve opens the port in another way.
    """
    replica = sys.modules.get("ray.serve._private.replica")
    if replica is not None:
        # Another version of Ray may open the port in another way; that must be an error and not pass unnoticed.
        assert hasattr(replica, "add_port_to_grpc_server"), (
            "this version of Ray Serve opens its gRPC port in an unknown way; use a version that DeepSkip was tested with"
        )
        replica.add_port_to_grpc_server = lambda server, address: 0  # type: ignore[attr-defined]
