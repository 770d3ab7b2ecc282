"""The replicas: bytes of an image in, bytes of an answer out."""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from deepskip import inference
from deepskip.data_shards.decoding import Limits, TooLarge, decode_image
from deepskip.data_shards.pictures import Reading
from deepskip.jobs.serving.answers import Answer, encode
from deepskip.jobs.serving.batches import Batches
from deepskip.predictor import Predictor

# decoded images held at once, bytes; decoding waits until there is room
DECODED_BYTES = 2**29
# bytes of a value of an image, by which the limit in pixels becomes one in bytes
VALUE_BYTES = 4
# values larger than this overflow in the network
LARGEST_VALUE = 1e30
T = TypeVar("T")


class Model:
    """One replica of the model, as a Serve deployment.

    state: of a checkpoint. max_pixels: of an image. batch, batch_wait: as in the settings. threads: of the network, and that
    decode and encode beside it.
    """

    def __init__(
        self, state: dict[str, Any], device: str, max_pixels: int, batch: int, batch_wait: float, threads: int
    ) -> None:
        close_back_door()
        torch.set_num_threads(threads)
        self.predictor = Predictor(state, device)
        bands = self.predictor.bands
        self.limits = Limits(max_pixels, max_pixels * max(bands, 3) * VALUE_BYTES)
        # apart, since decoding waits for room that encoding makes
        self.decoders, self.encoders = Slots(threads), Slots(threads)
        self.room = Room(DECODED_BYTES)
        most = (inference.TILE // inference.enlarged_by(self.predictor.network)) ** 2
        self.batches = Batches(self.forward, batch, most, batch_wait)
        # the first pass through the network takes longest
        self.predictor.predict(np.zeros((64, 64, bands), np.float32))

    async def segment(self, body: bytes, extension: str, answer: str) -> Answer:
        """Answers one request. extension: what kind of file the body is. answer: one of answers.FORMATS."""
        started = time.perf_counter()
        try:
            # one image more than there is room for, since its size is known only then
            image = await self.decoders.run(self.read, body, extension, ready=self.room.left)
        except TooLarge as error:
            return Answer(413, reason=f"the image: {error}")
        except ValueError as error:
            return Answer(422, reason=f"the image: {error}")
        with self.room.taken(image.nbytes):
            decoded = time.perf_counter()
            prepared = await asyncio.to_thread(self.predictor.prepared, image)
            try:
                p_VHW, number = await self.batches.run(prepared)
            except torch.OutOfMemoryError:
                return Answer(
                    413, reason=f"the image: its {image.shape[0]} x {image.shape[1]} pixels do not fit into the GPU"
                )
            segmented = time.perf_counter()
            made = await self.encoders.run(encode, image, p_VHW, answer)
        made.batch = number
        ended = time.perf_counter()
        made.seconds = {"decode": decoded - started, "network": segmented - decoded, "encode": ended - segmented}
        return made

    def read(self, body: bytes, extension: str) -> np.ndarray:
        """Decodes an image and looks whether the model can take it; raises ValueError."""
        bands = self.predictor.bands if self.predictor.preparation["bands"] is None else None
        reading = Reading(missing=True, nodata=self.predictor.nodata)
        image = decode_image(extension, body, self.limits, bands, reading)
        if self.predictor.preparation["bands"] is None and image.shape[2] != self.predictor.bands:
            raise ValueError(f"has {image.shape[2]} bands; the model takes {self.predictor.bands}")
        if image.dtype.kind == "f" and np.abs(image).max(initial=0, where=~np.isnan(image)) > LARGEST_VALUE:
            raise ValueError(f"has values beyond {LARGEST_VALUE:g}")
        return image

    def forward(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Computes the probabilities (V, H, W) of images of one size; a single one may be large, and is cut into tiles."""
        try:
            x_NHWC = torch.from_numpy(np.stack(images, dtype=np.float32, casting="unsafe"))
            return list(self.predictor.probabilities(x_NHWC.permute(0, 3, 1, 2)).cpu().numpy())
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
            torch.cuda.empty_cache()
        return [p_VHW for image in images for p_VHW in self.forward([image])]

    async def describe(self) -> dict[str, Any]:
        """Says what the model takes and gives."""
        resampled = self.predictor.preparation["bands"] is not None
        return {"bands": None if resampled else self.predictor.bands, "classes": self.predictor.num_classes}


class Slots:
    """Runs functions in so many threads. A slot is free when its function has ended, not when its caller has left."""

    def __init__(self, count: int) -> None:
        self.free = asyncio.Semaphore(count)
        self.threads = ThreadPoolExecutor(count)

    async def run(self, function: Callable[..., T], *arguments: Any, ready: asyncio.Event | None = None) -> T:
        """Runs a function in the next slot, once `ready` is set."""
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
    """Counts bytes that are held; whoever would hold more waits until others have left room."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.left = asyncio.Event()
        self.left.set()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Holds so many bytes for the length of a block."""
        self.change(count)
        try:
            yield
        finally:
            self.change(-count)

    def change(self, count: int) -> None:
        """Takes or gives back bytes, and tells those who wait."""
        self.held += count
        if self.held < self.most:
            self.left.set()
        else:
            self.left.clear()


def close_back_door() -> None:
    """Keeps Serve from opening a port of each replica that takes pickles from anybody, on every interface.

    By it deployments may call each other over gRPC; the front calls as actors do, behind Ray's own token. Serve has no
    setting for it: it binds to [::] when the model is loaded. Does nothing outside a replica.
    """
    replica = sys.modules.get("ray.serve._private.replica")
    if replica is not None:
        # another version of Ray may open it in another way, which must not go unseen
        assert hasattr(replica, "add_port_to_grpc_server"), (
            "this Ray Serve opens its gRPC port in a way that is not known"
        )
        replica.add_port_to_grpc_server = lambda server, address: 0  # type: ignore[attr-defined]
