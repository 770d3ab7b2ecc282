"""Follow the pointer of published models: check a new model before the replicas take it over."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from deepskip import publishing
from deepskip.checkpoint import DataState

logger = logging.getLogger(__name__)


class Following:
    """The published model that replicas are told to answer by.

    Args:
        path: folder or URL of the published models.
        sha256: digest of the model that the server began with.
        data: its data: a model of other bands or classes is refused.
        seconds: time between looks.

    Attributes:
        wanted: digest of the newest model that was found whole.
        answering: digest of the model that answered last.
        since: when `wanted` was taken, in seconds since 1970.
        faults: why a newer model is not taken over, by who found it: the "server" or a "replica".
    """

    def __init__(self, path: str, sha256: str, data: DataState, seconds: float) -> None:
        self.path, self.data, self.seconds = path, data, seconds
        self.wanted = self.answering = sha256
        self.since = time.time()
        self.faults: dict[str, str] = {}

    def look(self) -> None:
        """Read the pointer, and check the model that it names if that is new."""
        try:
            pointer = publishing.read_pointer(self.path)
            if pointer is None:
                raise publishing.BrokenPublication(f"{self.path} has no {publishing.POINTER} any more")
            if pointer.sha256 != self.wanted:
                publishing.load_like(self.path, pointer.sha256, self.data)
                self.wanted, self.since = pointer.sha256, time.time()
                logger.warning("taking over model %s, IoU %s", pointer.sha256, pointer.iou)
        # Whatever is wrong with what is published, the old model answers.
        except Exception as error:
            self.report("server", f"the published model is not taken over: {error}")
        else:
            self.report("server", "")

    def report(self, who: str, fault: str) -> None:
        """Record a fault, or that there is none, and log it once."""
        if fault and fault != self.faults.get(who):
            logger.warning("%s", fault)
        self.faults[who] = fault

    def answered(self, sha256: str, fault: str) -> None:
        """Record which model answered, and why its replica could not take over another."""
        self.answering = sha256
        self.report("replica", fault)

    def state(self) -> dict[str, Any]:
        """Return what /healthz reports of it."""
        fault = "; ".join(each for each in self.faults.values() if each)
        return {"model": self.answering, "wanted": self.wanted, "since": self.since, "fault": fault}

    async def watch(self, prepare: Callable[[str], Awaitable[tuple[str, str]]]) -> None:
        """Look from time to time, and tell replicas that have no requests, until cancelled.

        Args:
            prepare: tells a replica the digest of the model to load, and returns that of its present one and its fault.
        """
        while True:
            await asyncio.sleep(self.seconds)
            await asyncio.to_thread(self.look)
            try:
                self.answered(*await prepare(self.wanted))
            # A replica that does not answer is started again by Ray Serve.
            except Exception:
                logger.debug("no replica was told", exc_info=True)
