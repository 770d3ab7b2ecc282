"""Order of a stream that grows, as a pure function of the seed, the lanes and the admission log.

The log says from which step each generation is trained on. Generations that are admitted at one step make a segment, which is
to a stream what an epoch is to a closed set: it takes each of their samples once. A share of each global batch can be
replayed: samples of the last generations before the segment, drawn from (seed, step). A step after the end of a segment,
and before the next one, is filled with replayed samples alone.

An entry that is added to the log changes no step before its own. The whole state of a stream is its log and its step.
"""

from array import array
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
    shards = [[int(size)] for size in sizes]
    return StreamOrder(0, log, shards, global_batch_size, replay=replay, replay_generations=replay_generations).segments


def replay_size(global_batch_size: int, replay: float) -> int:
    """Return the number of replayed samples in a global batch, which leaves room for one new sample at least."""
    return min(round(global_batch_size * replay), global_batch_size - 1)


class StreamOrder:
    """Order of a stream: which samples each rank takes in each step.

    Segments are appended (`admit`), and what was admitted before is not computed again. A generation takes 16 bytes, and 8 for
    each of its shards.

    Args:
        seed: Seed of the order.
        log: Admission log: generations 0, 1, 2, ... with steps that do not fall.
        shard_sizes: For each admitted generation the number of samples in each of its shards.
        global_batch_size: Number of samples in a global batch.
        window: Number of shards of a lane that are shuffled together.
        lanes: Number of lanes.
        replay: Share of a global batch that is replayed, 0 to below 1.
        replay_generations: Number of generations before a segment that are replayed.

    Raises:
        ValueError: If a number is out of range, or as `admit`.

    Attributes:
        ends: Number of samples before generation 0, 1, 2, ..., and of all.
        shard_ends: Number of shards likewise.
        sizes: Number of samples in each shard of all generations.
        firsts: First generation of each segment.
        begins: First step of each segment.
        stops: Step after the last one of each segment.
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
        if not 0 <= replay < 1 or replay_generations < 1 or global_batch_size < 1:
            raise ValueError(
                f"replay is {replay}, of {replay_generations} generations and batches of {global_batch_size}; it must be 0 to "
                "below 1, of 1 or more"
            )
        self.seed, self.window, self.lanes, self.global_batch_size = seed, window, lanes, global_batch_size
        self.replay, self.replay_generations = replay, replay_generations
        self.ends, self.shard_ends, self.sizes = array("q", [0]), array("q", [0]), array("q")
        self.firsts, self.begins, self.stops = array("q"), array("q"), array("q")
        self.order = lru_cache(maxsize=2)(self._order)
        self.admit(log, shard_sizes)

    def __len__(self) -> int:
        """Return the number of admitted generations."""
        return len(self.ends) - 1

    def admit(self, log: Sequence[Admission], shard_sizes: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Append entries to the log.

        Args:
            log: Entries of the next generations. Those of one step make a segment; all of a segment are given together.
            shard_sizes: For each of these generations, or more, the number of samples in each of its shards, (shards,).

        Raises:
            ValueError: If a generation is missing, or a segment would begin before the end of the one before it.
        """
        known = len(self)
        numbers = [entry.generation for entry in log]
        if numbers != list(range(known, known + len(log))) or len(log) > len(shard_sizes):
            raise ValueError(
                f"the admission log names generations {numbers[:20]} of {len(shard_sizes)}"
                + (f" after {known} others" if known else "")
            )
        for step, entries in groupby(log, key=lambda entry: entry.step):
            first = len(self)
            if step < self.next_step or (not first and step) or (self.begins and step == self.begins[-1]):
                raise ValueError(
                    f"generation {first} is admitted from step {step}, but "
                    + (f"the segment before it ends at step {self.next_step}" if first else "a stream begins at step 0")
                )
            for entry in entries:
                found = [int(size) for size in shard_sizes[entry.generation - known]]
                self.sizes.extend(found)
                self.ends.append(self.ends[-1] + sum(found))
                self.shard_ends.append(len(self.sizes))
            new = self.ends[-1] - self.ends[first]
            replayed = self.replay_size_of(first)
            self.firsts.append(first)
            self.begins.append(step)
            self.stops.append(step + steps_per_epoch(new, self.global_batch_size - replayed))

    def replay_size_of(self, first: int) -> int:
        """Return the number of replayed samples in each global batch of the segment whose first generation is `first`."""
        return replay_size(self.global_batch_size, self.replay) if self.pool(first) else 0

    def pool(self, stop: int) -> range:
        """Return the numbers of the samples that are replayed after generation `stop` - 1."""
        return range(self.ends[max(0, stop - self.replay_generations)], self.ends[stop])

    def segment(self, number: int) -> Segment:
        """Return a segment by its number, from 0."""
        first = self.firsts[number]
        stop = self.firsts[number + 1] if number + 1 < len(self.firsts) else len(self)
        replayed = self.replay_size_of(first)
        return Segment(
            range(first, stop),
            range(self.ends[first], self.ends[stop]),
            range(self.begins[number], self.stops[number]),
            self.pool(first),
            replayed,
        )

    @property
    def segments(self) -> list[Segment]:
        """Return all segments."""
        return [self.segment(number) for number in range(len(self.firsts))]

    @property
    def next_step(self) -> int:
        """Return the first step from which another generation can be admitted."""
        return self.stops[-1] if self.stops else 0

    def number_at(self, step: int) -> int:
        """Return the number of the segment that a step is in, or comes after.

        Raises:
            ValueError: If no generation is admitted at that step.
        """
        number = bisect_right(self.begins, step) - 1
        if step < 0 or number < 0:
            raise ValueError(f"no generation is admitted at step {step}")
        return number

    def log(self) -> np.ndarray:
        """Return the admission log: generations and steps, (generations, 2) int64."""
        counts = np.diff([*self.firsts, len(self)]) if self.firsts else np.zeros(0, np.int64)
        return np.stack([np.arange(len(self)), np.repeat(np.array(self.begins, np.int64), counts)], 1)

    def _order(self, number: int) -> EpochOrder:
        part = self.segment(number).generations
        sizes = np.array(self.sizes[self.shard_ends[part.start] : self.shard_ends[part.stop]], np.int64)
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
        number = self.number_at(step)
        segment = self.segment(number)
        if step not in segment.steps:
            # As if another segment began.
            pool = self.pool(segment.generations.stop)
            return self.replayed(step, pool, self.global_batch_size, rank, world_size)
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


def fingerprint(step: int, epochs: Sequence[int], samples: Sequence[int]) -> int:
    """Return a sum over samples that a step takes, which does not depend on their order or their division among ranks.

    A term is 32 bits of a hash of (step, epoch, sample), by SplitMix64. Sums of many steps are added up. If
    they are those of the order, each step has taken its samples, apart from a chance of about 2^-32.

    Args:
        step: The step.
        epochs: Epoch of each sample, as in its slot.
        samples: Number of each sample.
    """
    x = np.asarray(samples, np.uint64)
    for value in (np.asarray(epochs, np.uint64), np.uint64(step)):
        x = mixed(x) + value
    return int((mixed(x) >> np.uint64(32)).sum())


def mixed(x: np.ndarray) -> np.ndarray:
    """Return the next number of SplitMix64 (Steele et al., 2014) from states (n,) uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: np.ndarray = x ^ (x >> np.uint64(31))
    return found
