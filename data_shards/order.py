"""Order of samples, as pure functions of integers without I/O or state.

An epoch takes every sample once. Its shards are shuffled from (seed, epoch), and the sequence of their samples is cut into
lanes, stretches of the same length. In each lane, samples are shuffled within windows of neighbouring shards, so that a reader
has few shards open. Position p of an epoch is place p // L of lane p % L, where L is the number of lanes.

Global batch t of an epoch is positions t*G .. t*G + G - 1, where G is the global batch size, whatever the world size. A rank
takes an equal piece of the batch sorted by lane, so that it reads a few lanes only, always the same ones if L divides G. The
whole state of a stream is its step. Any place is found by a search among the windows of its lane: only the window that holds
it is ever shuffled.
"""

from bisect import bisect_right
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


class Stretch(NamedTuple):
    """Places start .. stop - 1 of a lane."""

    lane: int
    start: int
    stop: int


class Lane:
    """Order of the samples of one lane, computed window by window on demand.

    Args:
        key: Integers that seed the shuffle; the number of the window is added.
        shards: Shard of each of its pieces: (pieces,) int64. A shard at its end may be cut, and shared with the next lane.
        first_numbers: Number of the first sample of each piece: (pieces,) int64.
        sizes: Number of samples of each piece: (pieces,) int64.
        window: Number of pieces that are shuffled together.
        first_window: What is added to the number of a window in the seed.
    """

    def __init__(
        self,
        key: list[int],
        shards: np.ndarray,
        first_numbers: np.ndarray,
        sizes: np.ndarray,
        window: int,
        first_window: int = 0,
    ) -> None:
        self.key, self.first_window, self.window = key, first_window, window
        self.shards, self.first_numbers, self.sizes = shards, first_numbers, sizes
        ends = np.cumsum(sizes)
        # The last window may have fewer pieces.
        self.window_ends = np.append(ends[window - 1 : -1 : window], ends[-1:])
        self.num_samples = int(ends[-1]) if len(ends) else 0
        self.shuffled = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return self.num_samples

    def window_at(self, place: int) -> int:
        """Return the number of the window that holds a place."""
        return int(np.searchsorted(self.window_ends, place, side="right"))

    def window_shards(self, number: int) -> np.ndarray:
        """Return the shards of a window: (window,) int64, fewer in the last one, none after it."""
        return self.shards[number * self.window : (number + 1) * self.window]

    def _shuffled(self, number: int) -> np.ndarray:
        pieces = range(number * self.window, min((number + 1) * self.window, len(self.sizes)))
        numbers = np.concatenate([np.arange(self.sizes[i]) + self.first_numbers[i] for i in pieces])
        return np.random.default_rng([*self.key, number + self.first_window]).permutation(numbers)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Return the sample numbers at places start .. stop - 1, cut at the end of the lane: (n,) int64."""
        stop = min(stop, len(self))
        parts = []
        while start < stop:
            number = self.window_at(start)
            first = int(self.window_ends[number - 1]) if number else 0
            end = min(stop, int(self.window_ends[number]))
            parts.append(self.shuffled(number)[start - first : end - first])
            start = end
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class EpochOrder:
    """Order of one epoch: a permutation of the sample numbers.

    Args:
        seed: Seed of the shuffle.
        epoch: Epoch, counted from 0; it determines the order together with the other arguments.
        shard_sizes: Number of samples in each shard, (shards,). Samples are numbered through the shards in index order.
        window: Number of shards of a lane that are shuffled together, 1 or more.
        lanes: Number of lanes, 1 or more.
        fixed: Whether a lane has the same samples in every epoch, in another order.

    Raises:
        ValueError: If the window or the number of lanes is less than 1.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        shard_sizes: Sequence[int] | np.ndarray,
        window: int,
        lanes: int = 1,
        fixed: bool = False,
    ) -> None:
        for name, value, unit in (("window", window, " shards"), ("number of lanes", lanes, "")):
            if value < 1:
                raise ValueError(f"the {name} is {value}{unit}; it must be 1 or more")
        self.seed, self.epoch, self.window, self.lanes, self.fixed = seed, epoch, window, lanes, fixed
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.first_numbers = np.cumsum(self.sizes) - self.sizes
        self.shards = np.random.default_rng([seed] if fixed else [seed, epoch]).permutation(len(self.sizes))
        self.ends = np.cumsum(self.sizes[self.shards])
        self.num_samples = int(self.ends[-1]) if len(self.ends) else 0
        self.lane = lru_cache(maxsize=None)(self._lane)

    def __len__(self) -> int:
        return self.num_samples

    def lane_size(self, number: int) -> int:
        """Return the number of samples in a lane; lanes differ by at most 1."""
        # These are the positions p below the epoch's length with p % lanes == number.
        return (self.num_samples - number + self.lanes - 1) // self.lanes

    def _lane(self, number: int) -> Lane:
        # Lanes of one sample more come first.
        size, more = divmod(len(self), self.lanes)
        start = number * size + min(number, more)
        stop = start + self.lane_size(number)
        # Shards without samples between two lanes belong to neither; those at the ends of the epoch stay.
        first = int(np.searchsorted(self.ends, start, side="right")) if number else 0
        last = int(np.searchsorted(self.ends, stop)) + 1 if number < self.lanes - 1 else len(self.shards)
        shards, ends = self.shards[first:last], self.ends[first:last]
        begins = ends - self.sizes[shards]
        low = np.maximum(begins, start)
        first_numbers, sizes = self.first_numbers[shards] + low - begins, np.minimum(ends, stop) - low
        if self.lanes == 1 and not self.fixed:
            return Lane([self.seed, self.epoch], shards, first_numbers, sizes, self.window)
        key = [self.seed, self.epoch, number + 1]
        if self.fixed:
            # Otherwise the same shards would share a window in every epoch.
            turn = np.random.default_rng(key).permutation(len(shards))
            shards, first_numbers, sizes = shards[turn], first_numbers[turn], sizes[turn]
        # A seed that ends in 0 equals the one without it.
        return Lane(key, shards, first_numbers, sizes, self.window, first_window=1)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Return the sample numbers at positions start .. stop - 1, cut at the end of the epoch: (n,) int64."""
        stop = min(stop, len(self))
        found = np.zeros(max(0, stop - start), np.int64)
        for first in range(min(self.lanes, len(found))):
            place, lane = divmod(start + first, self.lanes)
            numbers = found[first :: self.lanes]
            numbers[:] = self.lane(lane).samples(place, place + len(numbers))
        return found


def steps_per_epoch(samples: int, global_batch_size: int) -> int:
    """Return the number of global batches in an epoch; the last one may be partial."""
    return -(-samples // global_batch_size)


def rank_share(order: EpochOrder, batch: int, global_batch_size: int, rank: int, world_size: int) -> list[Stretch]:
    """Return what one rank takes of a global batch: an equal piece of its places, sorted by lane.

    At the end of the epoch the places that do not exist are cut off, so that each rank keeps to its lanes there too.

    Args:
        order: The order of the epoch.
        batch: Number of the global batch in the epoch, counted from 0.
        global_batch_size: Number of samples in a global batch.
        rank: Rank, 0 to world_size - 1.
        world_size: Number of ranks.

    Returns:
        A stretch of each of the rank's lanes; empty where the lane has ended.
    """
    lanes, start, stop = order.lanes, batch * global_batch_size, (batch + 1) * global_batch_size
    per_rank = -(-global_batch_size // world_size)
    low, high = min(rank * per_rank, global_batch_size), min((rank + 1) * per_rank, global_batch_size)
    if lanes == 1:
        return [Stretch(0, min(start + low, len(order)), min(start + high, len(order)))]

    def before(lane: int) -> int:
        # Number of the batch's places in all earlier lanes. Each turn through the lanes takes one place of each.
        return (stop // lanes - start // lanes) * lane + min(stop % lanes, lane) - min(start % lanes, lane)

    stretches = []
    lane = bisect_right(range(1, lanes), low, key=before)
    while low < high:
        end = min(before(lane + 1), high)
        # The lane's first place in the batch, and those that earlier ranks take.
        place = -(-(start - lane) // lanes) + low - before(lane)
        size = order.lane_size(lane)
        stretches.append(Stretch(lane, min(place, size), min(place + end - low, size)))
        low, lane = end, lane + 1
    return stretches


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
    stretches = rank_share(order, batch, global_batch_size, rank, world_size)
    numbers = [n for lane, start, stop in stretches for n in order.lane(lane).samples(start, stop).tolist()]
    slots = [Slot(order.epoch, number, 1) for number in numbers]
    missing = per_rank - len(numbers)
    if missing:
        # Repeats show batch norm natural data, and need no shard that the rank does not read anyway.
        first = 0
        if order.lanes == 1:
            numbers = order.samples(batch * global_batch_size, (batch + 1) * global_batch_size).tolist()
            first = rank * per_rank + len(slots)
        elif not numbers:
            # The rank's lanes have ended. A lane is empty if there are fewer samples than lanes.
            lane = min(stretches[0].lane if stretches else order.lanes - 1, len(order) - 1)
            size = order.lane_size(lane)
            numbers = order.lane(lane).samples(max(0, size - missing), size).tolist()
        slots += [Slot(order.epoch, numbers[(first + i) % len(numbers)], 0) for i in range(missing)]
    return slots


def rank_block(samples: int, rank: int, world_size: int) -> range:
    """Return the samples that one rank validates: contiguous, so that it opens only the shards that hold them.

    The numbers of samples of two ranks differ by at most 1. Of S shards of one size a rank opens at most
    ceil(S / world_size) + 1. Of any shards all ranks together open at most S + world_size - 1.

    Args:
        samples: Number of samples in the split.
        rank: Rank, 0 to world_size - 1.
        world_size: Number of ranks.
    """
    return range(rank * samples // world_size, (rank + 1) * samples // world_size)


def rank_windows(order: EpochOrder, stretches: Sequence[Stretch]) -> list[Stretch]:
    """Return the windows that hold stretches of lanes: numbers of windows in the place of places."""
    found = []
    for number, start, stop in stretches:
        if start < stop:
            lane = order.lane(number)
            found.append(Stretch(number, lane.window_at(start), lane.window_at(stop - 1) + 1))
    return found


def shards_ahead(order: EpochOrder, following: EpochOrder | None, windows: Sequence[Stretch]) -> list[int]:
    """Return the shards to have at hand: those of the windows in use, then those of each lane's next window.

    Args:
        order: The order of the epoch.
        following: The order of the next epoch, whose first windows follow the last of this one; None if there is none.
        windows: The windows in use, from `rank_windows`.
    """
    found = [order.lane(lane).window_shards(n) for lane, start, stop in windows for n in range(start, stop)]
    for lane, _, stop in windows:
        after = order.lane(lane).window_shards(stop)
        found.append(following.lane(lane).window_shards(0) if following is not None and not len(after) else after)
    # A shard that is cut can be in two lanes.
    return list(dict.fromkeys(np.concatenate(found).tolist())) if found else []


def automatic_lanes(machines: int, global_batch_size: int) -> int:
    """Return a number of lanes with which each of some machines reads only its share of the shards.

    Four to eight lanes a machine: with fewer, another number of machines would cut them badly; with more, a machine has more
    shards open. Best is a number that divides the batch, so that each rank keeps its lanes, and that the machines divide.

    Args:
        machines: Number of machines, 1 or more.
        global_batch_size: Number of samples in a global batch, which is the most lanes that are of use.
    """
    if machines == 1:
        return 1
    dividing = [n for n in range(4 * machines, 8 * machines + 1) if global_batch_size % n == 0]
    return min(dividing, key=lambda n: (n % machines != 0, n), default=min(4 * machines, global_batch_size))
