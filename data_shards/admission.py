"""Order of a stream that grows, as a pure function of the seed, the lanes and the admission log.

The log says from which step each generation is trained on. Generations that are admitted at one step make a segment, which is
to a stream what an epoch is to a closed set: it takes each of their samples once. A share of each global batch can be
replayed: samples of the last generations before the segment, drawn from (seed, step). A step after the end of a segment,
and before the next one, is filled with replayed samples alone.

An entry that is added to the log changes no step before its own. The whole state of a stream is its log and its step.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np

from deepskip.data_shards.order import EpochOrder, Slot, rank_slots, steps_per_epoch

# Marks the random numbers of replays; no epoch is as large.
REPLAY = 2**30


class Admission(NamedTuple):
    """An entry of the admission log: a generation is trained on from a step.

    Attributes:
        generation: Number of the generation, from 0.
        step: Step, counted from the start of the training.
    """

    generation: int
    step: int


class Segment(NamedTuple):
    """The steps that take the samples of the generations that were admitted together, each once.

    Attributes:
        generations: Their numbers.
        samples: Numbers of their samples in the chain.
        steps: Steps of the segment.
        replayed: Numbers of the samples that may be replayed in these steps; none in a first segment.
        replay: Number of replayed samples in each global batch.
    """

    generations: range
    samples: range
    steps: range
    replayed: range
    replay: int


def segments(
    log: Sequence[Admission],
    sizes: Sequence[int] | np.ndarray,
    global_batch_size: int,
    replay: float = 0.0,
    replay_generations: int = 1,
) -> list[Segment]:
    """Return the segments of an admission log.

    Args:
        log: The log: generations 0, 1, 2, ... with steps that do not fall.
        sizes: Number of samples in each admitted generation, (generations,) or more.
        global_batch_size: Number of samples in a global batch.
        replay: Share of a global batch that is replayed, 0 to below 1.
        replay_generations: Number of generations before the segment that are replayed.

    Raises:
        ValueError: If a number is out of range, a generation is missing, or a segment would begin before the end of the one
            before it.
    """
    if not 0 <= replay < 1 or replay_generations < 1 or global_batch_size < 1:
        raise ValueError(
            f"replay is {replay}, of {replay_generations} generations and batches of {global_batch_size}; it must be 0 to "
            "below 1, of 1 or more"
        )
    if [entry.generation for entry in log] != list(range(len(log))) or len(log) > len(sizes):
        raise ValueError(
            f"the admission log names generations {[entry.generation for entry in log][:20]} of {len(sizes)}"
        )
    ends = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).tolist()
    found: list[Segment] = []
    for step, entries in groupby(log, key=lambda entry: entry.step):
        numbers = [entry.generation for entry in entries]
        first, stop = numbers[0], numbers[-1] + 1
        earliest = found[-1].steps.stop if found else 0
        if step < earliest or (not found and step):
            raise ValueError(
                f"generation {first} is admitted from step {step}, but "
                + (f"the segment before it ends at step {earliest}" if found else "a stream begins at step 0")
            )
        before = range(ends[max(0, first - replay_generations)], ends[first])
        samples = range(ends[first], ends[stop])
        replayed = replay_size(global_batch_size, replay) if before else 0
        count = steps_per_epoch(len(samples), global_batch_size - replayed)
        found.append(Segment(range(first, stop), samples, range(step, step + count), before, replayed))
    return found


def replay_size(global_batch_size: int, replay: float) -> int:
    """Return the number of replayed samples in a global batch, which leaves room for one new sample at least."""
    return min(round(global_batch_size * replay), global_batch_size - 1)


class StreamOrder:
    """Order of a stream: which samples each rank takes in each step.

    Args:
        seed: Seed of the order.
        log: Admission log.
        shard_sizes: For each admitted generation the number of samples in each of its shards.
        global_batch_size: Number of samples in a global batch.
        window: Number of shards of a lane that are shuffled together.
        lanes: Number of lanes.
        replay: Share of a global batch that is replayed, 0 to below 1.
        replay_generations: Number of generations before a segment that are replayed.

    Raises:
        ValueError: As `segments`.
    """

    def __init__(
        self,
        seed: int,
        log: Sequence[Admission],
        shard_sizes: Sequence[Sequence[int] | np.ndarray],
        global_batch_size: int,
        window: int = 16,
        lanes: int = 1,
        replay: float = 0.0,
        replay_generations: int = 1,
    ) -> None:
        self.seed, self.window, self.lanes, self.global_batch_size = seed, window, lanes, global_batch_size
        self.shard_sizes = [np.asarray(sizes, np.int64) for sizes in shard_sizes[: len(log)]]
        totals = [int(sizes.sum()) for sizes in self.shard_sizes]
        self.segments = segments(log, totals, global_batch_size, replay, replay_generations)
        self.begins = [segment.steps.start for segment in self.segments]
        # What may be replayed after the last segment, as if another one began.
        ends = np.concatenate([[0], np.cumsum(totals)]).tolist()
        self.idle = [
            range(ends[max(0, segment.generations.stop - replay_generations)], ends[segment.generations.stop])
            for segment in self.segments
        ]
        self.order = lru_cache(maxsize=2)(self._order)

    @property
    def next_step(self) -> int:
        """Return the first step from which another generation can be admitted."""
        return self.segments[-1].steps.stop if self.segments else 0

    def _order(self, number: int) -> EpochOrder:
        part = self.segments[number].generations
        sizes = np.concatenate(self.shard_sizes[part.start : part.stop])
        return EpochOrder(self.seed, number, sizes, self.window, self.lanes)

    def slots(self, step: int, rank: int, world_size: int) -> list[Slot]:
        """Return the places of one rank in the global batch of a step.

        Samples are numbered through the chain. The epoch of a new sample is the number of its segment. That of a replayed
        one is REPLAY + step, so that it is augmented anew.

        Args:
            step: Step, counted from the start of the training.
            rank: Rank, 0 to world_size - 1.
            world_size: Number of ranks.

        Returns:
            The same number of slots on every rank: new samples, then replayed ones, each with repeats of weight 0 if they do
            not divide.

        Raises:
            ValueError: If no generation is admitted, or there is nothing to replay.
        """
        number = bisect_right(self.begins, step) - 1
        if step < 0 or number < 0:
            raise ValueError(f"no generation is admitted at step {step}")
        segment = self.segments[number]
        if step not in segment.steps:
            return self.replayed(step, self.idle[number], self.global_batch_size, rank, world_size)
        new = self.global_batch_size - segment.replay
        slots = rank_slots(self.order(number), step - segment.steps.start, new, rank, world_size)
        first = segment.samples.start
        found = [Slot(slot.epoch, slot.sample + first, slot.weight) for slot in slots]
        return found + self.replayed(step, segment.replayed, segment.replay, rank, world_size)

    def replayed(self, step: int, samples: range, count: int, rank: int, world_size: int) -> list[Slot]:
        """Return one rank's piece of the samples that are replayed in a step.

        Args:
            step: The step.
            samples: Numbers of the samples to draw from, each once if there are enough.
            count: Number of samples over all ranks.
            rank: Rank, 0 to world_size - 1.
            world_size: Number of ranks.

        Raises:
            ValueError: If there are no samples to draw from.
        """
        if count == 0:
            return []
        if not samples:
            raise ValueError(f"there is nothing to replay in step {step}")
        rng = np.random.default_rng([self.seed, REPLAY, step])
        drawn = (rng.choice(len(samples), count, replace=len(samples) < count) + samples.start).tolist()
        per_rank = -(-count // world_size)
        places = range(rank * per_rank, (rank + 1) * per_rank)
        return [Slot(REPLAY + step, drawn[place % count], int(place < count)) for place in places]
