"""Batch images of one size that arrive at about the same time, so that they go through the network together.

Ray Serve's own batching only uses the order of arrival, so its batches mix images of different sizes. Here a batch is the
oldest image with others of the same size and dtype, wherever they are in the queue.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np


class Waiting(NamedTuple):
    """An image in the queue.

    Attributes:
        image: the image (H, W, bands).
        since: when it came, s (time.monotonic).
        result: future that receives the result, and the number of images in its batch.
    """

    image: np.ndarray
    since: float
    result: asyncio.Future[tuple[np.ndarray, int]]


class Batches:
    """A queue of images, which are computed in batches of one shape and dtype.

    Attributes:
        forward: called in a thread with a batch, a list of images (H, W, bands) of one shape and dtype; returns a list of
            results, one array per image.
        most: largest number of images in a batch.
        pixels: largest number of pixels in a batch of several images; a larger image goes alone.
        wait: time, in seconds, that the oldest image waits for others while its batch is not full and others are announced.
        announced: number of images that are on their way to the queue.
        queue: the images that wait, oldest first.
        worker: the task that computes batches; None or done while the queue is empty.
    """

    def __init__(
        self, forward: Callable[[list[np.ndarray]], list[np.ndarray]], most: int, pixels: int, wait: float
    ) -> None:
        self.forward, self.most, self.pixels, self.wait = forward, most, pixels, wait
        self.announced = 0
        self.queue: list[Waiting] = []
        # One thread: OpenMP starts a team for each thread that computes, and teams of one process disturb each other.
        self.thread = ThreadPoolExecutor(1)
        self.worker: asyncio.Task[None] | None = None

    @contextmanager
    def announcing(self) -> Iterator[None]:
        """Announce an image while the block runs, which prepares it; earlier images wait for it."""
        self.announced += 1
        try:
            yield
        finally:
            self.announced -= 1

    async def run(self, image_HWC: np.ndarray) -> tuple[np.ndarray, int]:
        """Compute the result for one image, in a batch with others.

        Args:
            image_HWC: the image (H, W, bands).

        Returns:
            The result, an array as `forward` returns it, and the number of images in the batch, this one included.

        Raises:
            Exception: the error of `forward`, if it failed for the batch.
        """
        result: asyncio.Future[tuple[np.ndarray, int]] = asyncio.get_running_loop().create_future()
        self.queue.append(Waiting(image_HWC, time.monotonic(), result))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self.work())
        return await result

    async def work(self) -> None:
        """Compute batches until the queue is empty."""
        while self.queue:
            first = self.queue[0]
            most = max(1, min(self.most, self.pixels // (first.image.shape[0] * first.image.shape[1])))
            left = first.since + self.wait - time.monotonic()
            if left > 0 and self.announced and sum(kind(each.image) == kind(first.image) for each in self.queue) < most:
                await asyncio.sleep(left)
            batch = [each for each in self.queue if kind(each.image) == kind(first.image)][:most]
            taken = set(map(id, batch))
            self.queue = [each for each in self.queue if id(each) not in taken]
            # Clients may have left meanwhile; their futures are cancelled.
            batch = [each for each in batch if not each.result.done()]
            if batch:
                await self.compute(batch)

    async def compute(self, batch: list[Waiting]) -> None:
        """Compute one batch, and set the result, or the error, of each of its images."""
        try:
            images = [each.image for each in batch]
            results = await asyncio.get_running_loop().run_in_executor(self.thread, self.forward, images)
        except Exception as error:
            for each in batch:
                if not each.result.done():
                    each.result.set_exception(error)
            return
        for each, result in zip(batch, results, strict=True):
            if not each.result.done():
                each.result.set_result((result, len(batch)))


def kind(image_HWC: np.ndarray) -> Any:
    """Return the shape and dtype of an image (H, W, bands); images of one batch have both in common."""
    return image_HWC.shape, image_HWC.dtype
