"""Images of one size that came at about the same time go through the network together.

Serve's own batching knows the order of arrival alone: among images of many sizes it makes batches of which each size is a
part. Here the oldest image takes with it those of its own kind, wherever they stand in the queue.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Waiting(NamedTuple):
    """An image in the queue, since when (s), and where its result goes."""

    image: np.ndarray
    since: float
    result: asyncio.Future[tuple[np.ndarray, int]]


class Batches:
    """forward(images) computes a result for each of several images of one shape and type, in a thread.

    most: images of a batch. pixels: of all images of a batch together, where there are several. wait: seconds that the oldest
    waits for others while fewer are there.
    """

    def __init__(
        self, forward: Callable[[list[np.ndarray]], list[np.ndarray]], most: int, pixels: int, wait: float
    ) -> None:
        self.forward, self.most, self.pixels, self.wait = forward, most, pixels, wait
        self.queue: list[Waiting] = []
        self.worker: asyncio.Task[None] | None = None

    async def run(self, image_HWC: np.ndarray) -> tuple[np.ndarray, int]:
        """Gives the result for an image, and how many images were computed together with it, itself included."""
        result: asyncio.Future[tuple[np.ndarray, int]] = asyncio.get_running_loop().create_future()
        self.queue.append(Waiting(image_HWC, time.monotonic(), result))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self.work())
        return await result

    async def work(self) -> None:
        """Computes batch after batch until the queue is empty."""
        while self.queue:
            first = self.queue[0]
            most = max(1, min(self.most, self.pixels // (first.image.shape[0] * first.image.shape[1])))
            left = first.since + self.wait - time.monotonic()
            if left > 0 and sum(kind(each.image) == kind(first.image) for each in self.queue) < most:
                await asyncio.sleep(left)
            batch = [each for each in self.queue if kind(each.image) == kind(first.image)][:most]
            taken = set(map(id, batch))
            self.queue = [each for each in self.queue if id(each) not in taken]
            # whoever asked may have gone
            batch = [each for each in batch if not each.result.done()]
            if batch:
                await self.compute(batch)

    async def compute(self, batch: list[Waiting]) -> None:
        """Computes one batch and hands out its results, or its error."""
        try:
            results = await asyncio.to_thread(self.forward, [each.image for each in batch])
        except Exception as error:
            for each in batch:
                if not each.result.done():
                    each.result.set_exception(error)
            return
        for each, result in zip(batch, results, strict=True):
            if not each.result.done():
                each.result.set_result((result, len(batch)))


def kind(image_HWC: np.ndarray) -> Any:
    """Gives what images must share to be computed together."""
    return image_HWC.shape, image_HWC.dtype
