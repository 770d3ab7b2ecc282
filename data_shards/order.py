"""The order of samples, as pure functions on integers; no I/O, no state.

An epoch takes every sample once. Its order is shuffled from (seed, epoch): shards first, then samples within a window of
neighbouring shards, so that a reader of one window opens few shards. Global batch t of an epoch is samples t*G .. t*G + G - 1
of that order, whatever the world size. The whole state of a stream is its step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Slot(NamedTuple):
    """One place in a batch: epoch, sample number, and weight 1, or 0 for a repeat that only fills the batch."""

    epoch: int
    sample: int
    weight: int


def epoch_order(seed: int, epoch: int, shard_sizes: Sequence[int], window: int = 16) -> np.ndarray:
    """Gives the order of an epoch: (samples,) int64, each sample number once; window is in shards.

    Samples are numbered through the shards in the index's order.
    """
    rng = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = rng.permutation(len(shard_sizes))
    order = []
    for first in range(0, len(shards), window):
        numbers = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]])
        order.append(rng.permutation(numbers))
    return np.concatenate(order).astype(np.int64) if order else np.zeros(0, np.int64)


def steps_per_epoch(samples: int, global_batch_size: int) -> int:
    """Gives the number of global batches in an epoch, the last one partial or not."""
    return -(-samples // global_batch_size)


def rank_slots(
    order: np.ndarray, epoch: int, batch: int, global_batch_size: int, rank: int, world_size: int
) -> list[Slot]:
    """Gives a rank's places in global batch `batch` of an epoch: ceil(global_batch_size / world_size) on every rank.

    Places past the end of the epoch, or past the batch, are filled with repeats of weight 0.
    """
    per_rank = -(-global_batch_size // world_size)
    taken = order[batch * global_batch_size : (batch + 1) * global_batch_size]
    slots = []
    for position in range(rank * per_rank, (rank + 1) * per_rank):
        if position < len(taken):
            slots.append(Slot(epoch, int(taken[position]), 1))
        else:
            # repeats of other parts of the epoch, so that batch norm sees natural data
            slots.append(Slot(epoch, int(order[position % len(order)]), 0))
    return slots
