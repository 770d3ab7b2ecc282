"""Follow a stream of batches that grows: at the end of what is known, all ranks agree on what comes next.

It does not depend on how batches are read. The agreement is a collective once a segment, and while nothing is new one every
IDLE_SECONDS, so that no rank waits longer than that for another one, and a request to stop is heard.
"""

import time
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepskip.checkpoint import StreamState
from deepskip.ranks import broadcast_bytes
from deepskip.training_step import Batch

# Time between two agreements of ranks that wait.
IDLE_SECONDS = 0.25


class Stream(Protocol):
    """A stream of batches that grows, on one rank; its methods are called at the same step on every rank.

    Attributes:
        replays: whether batches are made of earlier samples while nothing is new; otherwise all ranks wait.
    """

    replays: bool

    def load_state_dict(self, state: StreamState | None, step: int) -> None:
        """Resume at a step from the state of a checkpoint, or begin with None; a collective over all ranks."""

    def state_dict(self) -> StreamState:
        """Return what a checkpoint must hold."""

    def batches(self, step: int) -> Iterator[Batch]:
        """Yield this rank's share of the global batches from a step to the next `limit`, or for ever if there is none."""

    def begins(self, step: int) -> bool:
        """Return whether new samples are taken from a step on, and not before it."""

    def limit(self, step: int) -> int | None:
        """Return the first later step before which is known what to take, or None if only replays are left."""

    def look(self, step: int) -> tuple[bytes, bool]:
        """Return on rank 0 what is new since `admit`, b"" if nothing is, and whether the stream has ended."""

    def record(self, step: int, news: bytes) -> None:
        """Record durably on rank 0 what is new from a step on, before any rank takes it."""

    def admit(self, step: int, news: bytes) -> None:
        """Take what is new from a step on."""

    def begun(self, step: int) -> list[tuple[int, range]]:
        """Return number and sample numbers of the generations that are trained on from a step on, if it begins a segment."""

    def images(self, samples: range) -> Iterator[Batch]:
        """Yield this rank's share of some samples as whole images, one a batch."""

    def scored(self, step: int, generation: int, counts: Tensor) -> dict[str, float]:
        """Record on rank 0 the counts (samples, 4) of `prequential.image_counts` of a generation, and return its metrics."""

    def progress(self, step: int) -> dict[str, float]:
        """Return on rank 0 how far the training is behind its data."""

    def fingerprint(self, step: int, batch: Batch) -> int:
        """Return a number below 2^40 of this rank's samples of a step, of which the sum over all ranks and steps is kept."""

    def took(self, total: int) -> None:
        """Add the fingerprints of all ranks since the last call to those of a checkpoint."""


class Outcome(Enum):
    """What comes next in a stream."""

    BATCHES = 0
    STOPPED = 1
    ENDED = 2


class StreamReader:
    """Read the batches of a stream in step with all other ranks.

    Args:
        stream: the stream.
        rank: rank of this process.
        world_size: number of ranks.
        device: device of the collectives.
        every: number of replayed steps after which is looked for what is new.
        on_device: function that copies batches to the device.
        stop_requested: returns whether this rank was asked to stop.
        begun: called on every rank with the step before the first batch with new samples is read.

    Attributes:
        waited: time that the last `next` took before it read a batch, in seconds: to wait for something new, and in `begun`.
        outcome: why the last `next` returned None.
    """

    def __init__(
        self,
        stream: Stream,
        rank: int,
        world_size: int,
        device: torch.device,
        every: int,
        on_device: Callable[[Iterator[Batch]], Iterator[Batch]],
        stop_requested: Callable[[], bool] | None,
        begun: Callable[[int], None],
    ) -> None:
        self.stream, self.rank, self.world_size, self.device, self.every = stream, rank, world_size, device, every
        self.on_device, self.stop_requested, self.begun = on_device, stop_requested, begun
        self.waited, self.outcome = 0.0, Outcome.BATCHES
        self._batches: Iterator[Batch] | None = None
        # Whether they end where what comes next is not known.
        self._bounded = False
        # Step at which what comes next is not known.
        self._until = -1

    def next(self, step: int) -> Batch | None:
        """Return the batch of a step, or None if there is none: see `outcome`."""
        self.waited = 0.0
        if step >= self._until:
            started = time.perf_counter()
            self.outcome = self._advance(step)
            self.waited = time.perf_counter() - started
            if self.outcome is not Outcome.BATCHES:
                return None
        if self._batches is None:
            self._batches = self.on_device(self.stream.batches(step))
        return next(self._batches)

    def _advance(self, step: int) -> Outcome:
        stream = self.stream
        if stream.limit(step) is None:
            found = self._agree(step)
            if found is None:
                # Those that are replayed already are read ahead.
                self._batches = None if self._bounded else self._batches
                self._until, self._bounded = step + self.every, False
                return Outcome.BATCHES
            if found is not Outcome.BATCHES:
                return found
        limit = stream.limit(step)
        assert limit is not None
        self._until, self._bounded, self._batches = limit, True, None
        if stream.begins(step):
            self.begun(step)
        return Outcome.BATCHES

    def _agree(self, step: int) -> Outcome | None:
        """Return what all ranks do at a step, when that is known; None if they replay."""
        while True:
            news, ended = self.stream.look(step) if self.rank == 0 else (b"", False)
            stop = self.stop_requested is not None and self.stop_requested()
            flags = torch.tensor([int(stop), int(bool(news)), int(ended)], device=self.device)
            if self.world_size > 1:
                dist.all_reduce(flags)
            stopped, grown, over = flags.tolist()
            if stopped:
                return Outcome.STOPPED
            if grown:
                if self.rank == 0:
                    self.stream.record(step, news)
                if self.world_size > 1:
                    news = broadcast_bytes(news, self.rank, self.device)
                self.stream.admit(step, news)
                return Outcome.BATCHES
            if over:
                return Outcome.ENDED
            if self.stream.replays:
                return None
            time.sleep(IDLE_SECONDS)
