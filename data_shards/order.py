"""Order of samples, as pure functions of integers without I/O or state.

An epoch takes every sample once. Its order is shuffled from (seed, epoch): first the shards, then the samples within a
window of neighbouring shards. So a reader has few shards open. Global batch t of an epoch is positions t*G .. t*G + G - 1
of that order, where G is the global batch size, whatever the world size. The whole state of a stream is its step.
Any position is found by one search among the windows: only the window that holds it is ever shuffled.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Slot(NamedTuple):
    """One place in a batch.

    Attributes:
        epoch: Epoch, counted from 0.
        sample: Number of the sample.
        weight: 1, or 0 for a repeat that only fills the batch.
    """

    epoch: int
    sample: int
    weight: int


class EpochOrder:
    """Order of one epoch: a permutation of the sample numbers, computed window by window on demand.

    Args:
        seed: Seed of the shuffle.
        epoch: Epoch, counted from 0; seed and epoch together determine the order.
        shard_sizes: Number of samples in each shard, (shards,). Samples are numbered through the shards in index order.
        window: Number of shards that are shuffled together, 1 or more.

    Raises:
        ValueError: If the window is less than 1.
    """

    def __init__(self, seed: int, epoch: int, shard_sizes: Sequence[int] | np.ndarray, window: int) -> None:
        if window < 1:
            raise ValueError(f"the window is {window} shards; it must be 1 or more")
        sizes = np.asarray(shard_sizes, np.int64)
        self.seed, self.epoch, self.window = seed, epoch, window
        self.first_numbers = np.cumsum(sizes) - sizes
        self.sizes = sizes
        self.shards = np.random.default_rng([seed, epoch]).permutation(len(sizes))
        ends = np.cumsum(sizes[self.shards])
        # The last window may have fewer shards.
        self.window_ends = np.append(ends[window - 1 : -1 : window], ends[-1:])
        self.shuffled = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return int(self.window_ends[-1]) if len(self.window_ends) else 0

    def window_at(self, position: int) -> int:
        """Return the number of the window that holds a position."""
        return int(np.searchsorted(self.window_ends, position, side="right"))

    def window_shards(self, number: int) -> np.ndarray:
        """Return the shards of a window: (window,) int64, fewer in the last one, none after it."""
        return self.shards[number * self.window : (number + 1) * self.window]

    def _shuffled(self, number: int) -> np.ndarray:
        shards = self.window_shards(number)
        numbers = np.concatenate([np.arange(self.sizes[s]) + self.first_numbers[s] for s in shards])
        return np.random.default_rng([self.seed, self.epoch, number]).permutation(numbers)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Return the sample numbers at positions start .. stop - 1, cut at the end of the epoch: (n,) int64."""
        stop = min(stop, len(self))
        parts = []
        while start < stop:
            number = self.window_at(start)
            first = int(self.window_ends[number - 1]) if number else 0
            end = min(stop, int(self.window_ends[number]))
            parts.append(self.shuffled(number)[start - first : end - first])
            start = end
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def steps_per_epoch(samples: int, global_batch_size: int) -> int:
    """Return the number of global batches in an epoch; the last one may be partial."""
    return -(-samples // global_batch_size)


def rank_slots(order: EpochOrder, batch: int, global_batch_size: int, rank: int, world_size: int) -> list[Slot]:
    """Return the places of one rank in a global batch.

    Places after the end of the epoch, or of the batch, are filled with repeats of weight 0.

    Args:
        order: The order of the epoch.
        batch: Number of the global batch in the epoch, counted from 0.
        global_batch_size: Number of samples in a global batch.
        rank: Rank, 0 to world_size - 1.
        world_size: Number of ranks.

    Returns:
        ceil(global_batch_size / world_size) slots, the same number on every rank.
    """
    per_rank = -(-global_batch_size // world_size)
    taken = order.samples(batch * global_batch_size, (batch + 1) * global_batch_size).tolist()
    slots = []
    for position in range(rank * per_rank, (rank + 1) * per_rank):
        if position < len(taken):
            slots.append(Slot(order.epoch, taken[position], 1))
        else:
            # Repeats show batch norm natural data; taken from this batch, they need no other shard.
            slots.append(Slot(order.epoch, taken[position % len(taken)], 0))
    return slots
