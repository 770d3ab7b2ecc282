"""The part of a chain that a stream reads: its newest generations, so that memory does not grow with the chain.

Samples and shards keep their numbers in the chain.
"""

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from deepskip.data_shards import manifest, storage
from deepskip.data_shards.entries import STORED, SampleEntry
from deepskip.data_shards.index import BrokenIndex, Index, ShardEntry, load_samples
from deepskip.data_shards.manifest import Generation


@dataclass(frozen=True)
class Part:
    """Generations that were added together.

    Attributes:
        generations: Their numbers.
        first_sample: Number of the first sample in the chain.
        first_shard: Number of the first shard in the chain.
        index: Index of these generations alone.
    """

    generations: range
    first_sample: int
    first_shard: int
    index: Index


@dataclass(frozen=True)
class ChainWindow(Index):
    """Index of some successive generations of a chain, with the properties of generation 0; it has no table of its own.

    Attributes:
        parts: The generations that it holds.
    """

    parts: tuple[Part, ...] = field(default=(), compare=False)

    @property
    def stop(self) -> Part:
        """Return an empty part that begins where the window ends."""
        last = self.parts[-1]
        index = last.index
        generations = range(last.generations.stop, last.generations.stop)
        return Part(generations, last.first_sample + index.num_samples, last.first_shard + len(index.shards), index)

    @property
    def num_samples(self) -> int:
        """Return the number of samples that the window holds."""
        return sum(part.index.num_samples for part in self.parts)

    @property
    def has_statistics(self) -> bool:
        """Return whether the window holds the statistics of each image."""
        return all(part.index.has_statistics for part in self.parts if part.index.num_samples)

    def _places(self, samples: Sequence[int]) -> list[tuple[Part, np.ndarray]]:
        """Return for each part that holds some of the samples their places in the list: (n,) int64."""
        firsts = [part.first_sample for part in self.parts]
        which = np.searchsorted(firsts, samples, side="right") - 1
        return [(self.parts[number], np.flatnonzero(which == number)) for number in np.unique(which).tolist()]

    def statistics_of(self, samples: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and standard deviation of each band of one image, or of N images, as `Index.statistics_of`."""
        several = [samples] if isinstance(samples, int) else samples
        mean, std = np.empty((2, len(several), self.bands), np.float32)
        for part, places in self._places(several):
            mean[places], std[places] = part.index.statistics_of([several[i] - part.first_sample for i in places])
        return (mean[0], std[0]) if isinstance(samples, int) else (mean, std)

    def entries(self, samples: list[int]) -> list[SampleEntry]:
        """Return the index entries of samples, by their numbers in the chain."""
        found: dict[int, SampleEntry] = {}
        for part, places in self._places(samples):
            own = part.index.entries([samples[i] - part.first_sample for i in places])
            for i, entry in zip(places.tolist(), own, strict=True):
                found[i] = entry._replace(shard=entry.shard + part.first_shard, number=samples[i])
        return [found[i] for i in range(len(samples))]

    def keys(self, samples: list[int]) -> list[str]:
        """Return the keys of samples, by their numbers in the chain."""
        return [entry.key for entry in self.entries(samples)]

    def _part_of_shard(self, shard: int) -> Part:
        return self.parts[bisect_right([part.first_shard for part in self.parts], shard) - 1]

    def shard(self, number: int) -> ShardEntry:
        """Return a shard by its number in the chain."""
        part = self._part_of_shard(number)
        return part.index.shards[number - part.first_shard]

    def shard_range(self, shard: int) -> range:
        """Return the numbers of the samples of a shard."""
        part = self._part_of_shard(shard)
        own = part.index.shard_range(shard - part.first_shard)
        return range(own.start + part.first_sample, own.stop + part.first_sample)

    def shard_location(self, shard: int) -> str:
        """Return the path or URL of a shard."""
        part = self._part_of_shard(shard)
        return part.index.shard_location(shard - part.first_shard)

    def shards_of(self, samples: list[int]) -> list[int]:
        """Return the numbers of the shards that hold samples, each once, in ascending order."""
        found = [
            shard + part.first_shard
            for part, places in self._places(samples)
            for shard in part.index.shards_of([samples[i] - part.first_sample for i in places])
        ]
        return sorted(found)


def window_of(index: Index) -> ChainWindow:
    """Return the window of the generations that an index was loaded with, which begins with generation 0."""
    names = index.__dataclass_fields__
    own = {name: getattr(index, name) for name in names} | {"shards": (), "samples": index.samples.schema.empty_table()}
    return ChainWindow(**own, parts=(Part(range(max(1, len(index.generations))), 0, 0, index),))


def extended(
    window: ChainWindow, generations: Sequence[Generation], at: Part | None = None, cache: storage.Cache | None = None
) -> ChainWindow:
    """Return a window with further generations, whose samples files are read.

    Args:
        window: The window.
        generations: Successive generations, the next ones of the chain.
        at: Where they begin in the chain, if the window does not hold those before them.
        cache: Where the samples files of a remote split are kept.

    Raises:
        BrokenIndex: If a samples file is damaged or missing.
        OSError: If it cannot be read.
    """
    begin = at or window.stop
    try:
        with ThreadPoolExecutor(manifest.READERS) as pool:
            tables = list(pool.map(lambda each: load_samples(window.location, each.raw, cache), generations))
    except (ValueError, FileNotFoundError, storage.ChangedFile) as error:
        raise BrokenIndex(f"a generation of {window.location} cannot be read: {error}") from error
    formats = [tuple(each.raw["formats"]) for each in generations]
    # A single one stays mapped from the disk; others are copied.
    table, stored = (tables[0], formats[0]) if len(tables) == 1 else (manifest.join_tables(tables, formats), STORED)
    base = window.parts[0].index
    shards = tuple(ShardEntry(**shard) for each in generations for shard in each.raw["shards"])
    index = replace(base, shards=shards, samples=table, formats=stored, generations=())
    numbers = range(generations[0].number, generations[-1].number + 1)
    return replace(window, parts=(*window.parts, replace(begin, generations=numbers, index=index)))


def shortened(window: ChainWindow, generation: int) -> ChainWindow:
    """Return a window without the parts that lie before a generation; the last part stays."""
    kept = tuple(part for part in window.parts[:-1] if part.generations.stop > generation)
    return replace(window, parts=(*kept, window.parts[-1]))
