"""Batches of a split: each rank's share of every global batch, from any step, and the images of a validation split."""

import itertools
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepskip.data_shards import storage
from deepskip.data_shards.dataset import Batch, Shards, SkipReport
from deepskip.data_shards.index import ShardEntry
from deepskip.data_shards.order import (
    EpochOrder,
    Slot,
    Stretch,
    rank_block,
    rank_share,
    rank_slots,
    rank_windows,
    shards_ahead,
    steps_per_epoch,
)
from deepskip.data_shards.sample import BadSample
from deepskip.data_shards.scan import BrokenShard

# Remote shards that are fetched at the same time.
FETCHES = 8
# A validation starts loader processes only if its images take longer than this to read, in seconds: to start and end them takes
# 0.1 to 0.3 s (2 cores), and the copies between processes cost more than small images.
WORTH_PROCESSES = 1.0
# Images from whose reading that time is estimated.
TRIED = 3


class Added(TypedDict):
    """Entries of a batch of N samples that the training draws.

    Attributes:
        draws: The changes of each sample, (N, 7 + bands) float32.
        noise_seed: Seed of the noise of each sample, N integers.
    """

    draws: Tensor
    noise_seed: list[int]


# Given the epochs and numbers of the samples of a batch, return additional entries of the batch.
Entries = Callable[[list[int], list[int]], Added]


class ReadAhead:
    """Prefetch shards into the cache with threads, in the order of the epoch.

    Args:
        shards: A remote split with a cache.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="deepskip-fetch")
        self.asked: OrderedDict[int, Future[Path]] = OrderedDict()

    def want(self, numbers: Sequence[int]) -> None:
        """Fetch shards in the given order, keep them in the cache, and cancel waiting fetches of all others.

        An error is not raised here, but when the shard is read.

        Args:
            numbers: Shards of the windows in use and of the next ones.
        """
        for number in numbers:
            # What is in the cache is touched, so that the cache removes other copies first.
            if number not in self.asked or self.asked[number].done():
                self.asked[number] = self.pool.submit(self.shards.local_path, number)
        wanted = set(numbers)
        for number in [n for n in self.asked if n not in wanted]:
            self.asked.pop(number).cancel()

    def close(self) -> None:
        """Cancel all fetches that have not started."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class SmallCache(ValueError):
    """A cache that cannot hold what a machine reads at a time; the message has both sizes and the settings to change."""


def check_cache(
    shards: Shards, window: int, lanes: int = 1, entries: Sequence[ShardEntry] | None = None, started: bool = False
) -> None:
    """Raise SmallCache if the cache cannot hold two windows of the largest shards of a remote split for each lane.

    Args:
        shards: The split; nothing is checked if it is local or has no cache.
        window: Number of shards that are shuffled together.
        lanes: Number of lanes that the ranks of this machine read.
        entries: The shards that are read; None are all of the split.
        started: Whether the training has made steps. Then it continues with a warning: shards that do not fit are fetched more
            often. It may have lost machines, so that this one reads more lanes, or a large generation may have come.

    Raises:
        SmallCache: If the shards do not fit.
    """
    if shards.cache is None or not storage.is_remote(shards.index.base or shards.folder):
        return
    read = shards.index.shards if entries is None else entries
    largest = sum(sorted((shard.bytes for shard in read), reverse=True)[: 2 * window * lanes])
    if largest > shards.cache.limit:
        where = f" in each of this machine's {lanes} lanes" if lanes > 1 else ""
        text = (
            f"two windows of {window} shards{where} of {shards.folder} have {largest / 1e9:.2f} GB, but the cache at "
            f"{shards.cache.folder} holds {shards.cache.limit / 1e9:.2f} GB"
        )
        if not started:
            raise SmallCache(f"{text}; raise data.cache_gb or lower data.shuffle_window")
        warnings.warn(f"{text}: shards are fetched more than once. Raise data.cache_gb", stacklevel=2)


def train_batches(
    shards: Shards,
    seed: int,
    global_batch_size: int,
    first_step: int,
    rank: int,
    world_size: int,
    loader_workers: int = 0,
    window: int = 16,
    entries: Entries | None = None,
    lanes: int = 1,
    fixed_lanes: bool = False,
    ranks_here: int = 1,
    last_step: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's share of the global batches first_step, first_step + 1, ...

    Args:
        shards: The split.
        seed: Seed of the order.
        global_batch_size: Number of samples in a step, over all ranks.
        first_step: Step to start at, counted from the start of the training.
        rank: Rank, 0 to world_size - 1.
        world_size: Number of ranks.
        loader_workers: Number of processes that decode samples; 0 decodes in this process.
        window: Number of shards of a lane that are shuffled together.
        entries: Makes additional entries of each batch where the batch is made. It is pickled for loader processes.
        lanes: Number of lanes, of which each rank reads its share.
        fixed_lanes: Whether a lane has the same samples in every epoch.
        ranks_here: Number of ranks that share this machine's cache.
        last_step: Step before which to end, as a training does; None yields batches without end.

    Yields:
        Batches with the additional entries.

    Raises:
        ValueError: If the split has no samples.
        SmallCache: If first_step is 0 and the cache is too small for two windows of each lane.
        BadSample: As a split raises it; also BrokenShard and OSError.
    """
    if len(shards) == 0:
        raise ValueError(f"{shards.folder} holds no samples")
    lanes_of_machine = lanes_here(lanes, global_batch_size, world_size, ranks_here)
    check_cache(shards, window, lanes_of_machine, started=first_step > 0)
    ahead = ReadAhead(shards) if storage.is_remote(shards.index.base or shards.folder) else None

    per_epoch = steps_per_epoch(len(shards), global_batch_size)

    # The epochs of this step and of the next.
    @lru_cache(maxsize=2)
    def order_of(epoch: int) -> EpochOrder:
        return EpochOrder(seed, epoch, shards.index.shard_sizes, window, lanes, fixed_lanes)

    def slots() -> Iterator[list[Slot]]:
        in_use: tuple[int, list[Stretch]] | None = None
        for step in itertools.count(first_step) if last_step is None else range(first_step, last_step):
            epoch, batch = divmod(step, per_epoch)
            if ahead is not None:
                windows = rank_windows(
                    order_of(epoch), rank_share(order_of(epoch), batch, global_batch_size, rank, world_size)
                )
                # At the end of an epoch a rank may have nothing left to read.
                if windows and in_use != (epoch, windows):
                    in_use = epoch, windows
                    ends = last_step is not None and last_step <= (epoch + 1) * per_epoch
                    ahead.want(shards_ahead(order_of(epoch), None if ends else order_of(epoch + 1), windows))
            yield rank_slots(order_of(epoch), batch, global_batch_size, rank, world_size)

    try:
        yield from read(shards, slots(), loader_workers, entries)
    finally:
        if ahead is not None:
            ahead.close()


def read(
    shards: Shards, slots: Iterator[list[Slot]], loader_workers: int = 0, entries: Entries | None = None
) -> Iterator[Batch]:
    """Yield the batches of slots, which loader processes decode ahead if there are any.

    Args:
        shards: The split.
        slots: The slots of each batch.
        loader_workers: Number of processes that decode samples; 0 decodes in this process.
        entries: Makes additional entries of each batch where the batch is made. It is pickled for loader processes.
    """
    if loader_workers:
        loader = DataLoader(
            Returned(shards),
            batch_sampler=slots,
            collate_fn=partial(collated, entries),
            num_workers=loader_workers,
            prefetch_factor=4,
            pin_memory=torch.cuda.is_available(),
        )
        yield from map(unpack_small, loader)
    else:
        yield from (with_entries(entries, shards[batch]) for batch in slots)


def lanes_here(lanes: int, global_batch_size: int, world_size: int, ranks_here: int) -> int:
    """Return how many lanes the ranks of one machine read at most.

    Args:
        lanes: Number of lanes.
        global_batch_size: Number of samples in a step, over all ranks.
        world_size: Number of ranks.
        ranks_here: Number of ranks on the machine.
    """
    steady = global_batch_size % lanes == 0
    divided = steady and global_batch_size % world_size == 0 and lanes * ranks_here % world_size == 0
    # Otherwise it shares lanes at either end with others, and these may move with the batches.
    shared = 0 if divided else 2 + (0 if steady else -(-4 * lanes // global_batch_size))
    return min(lanes, -(-lanes * ranks_here // world_size) + shared)


def with_entries(entries: Entries | None, batch: Batch) -> Batch:
    """Add to a batch what `entries` makes for its samples."""
    return batch if entries is None else {**batch, **entries(batch["epoch"], batch["sample"])}


class Returned(Dataset[Batch | Exception]):
    """A split for loader processes, which returns the errors of its data.

    Of an error that a loader process raises, torch makes one of its own, with a traceback as its text.

    Args:
        shards: The split.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitems__(self, slots: Sequence[Slot]) -> Batch | Exception:
        try:
            return self.shards[slots]
        except (BadSample, BrokenShard, OSError) as error:
            return error


def collated(entries: Entries | None, batch: Batch | Exception) -> dict[str, Any]:
    """Make a batch, or the error in its place, ready to leave a loader process."""
    return {"error": batch} if isinstance(batch, Exception) else pack_small(with_entries(entries, batch))


def pack_small(batch: Batch) -> dict[str, Any]:
    """Convert tensors of two axes or fewer to arrays: between processes, each tensor would need a shared file of its own."""
    return {name: x.numpy() if isinstance(x, torch.Tensor) and x.ndim <= 2 else x for name, x in batch.items()}


def unpack_small(packed: dict[str, Any]) -> Batch:
    """Convert the arrays of `pack_small` back to tensors, pinned if there is a GPU: copies of others would wait for it.

    Raises:
        Exception: The error of a loader process.
    """
    if "error" in packed:
        raise packed["error"]
    arrays = {name: torch.from_numpy(x) for name, x in packed.items() if isinstance(x, np.ndarray)}
    if torch.cuda.is_available():
        arrays = {name: x.pin_memory() for name, x in arrays.items()}
    return cast(Batch, packed | arrays)


def whole_images(
    shards: Shards,
    rank: int,
    world_size: int,
    skipped: Callable[[SkipReport], None] = lambda report: None,
    loader_workers: int = 0,
    ranks_here: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's block of the samples in their order, whole, as batches of one.

    All ranks together yield each sample once, and each opens only the shards of its block; the next ones are prefetched.

    Args:
        shards: The split.
        rank: Rank, 0 to world_size - 1.
        world_size: Number of ranks.
        skipped: Called with the report of each bad sample that is skipped.
        loader_workers: Number of processes that read samples, if these take long enough; 0 reads in this process.
        ranks_here: Number of ranks that share this machine's cache.

    Yields:
        Batches of one sample each.
    """
    block = rank_block(len(shards), rank, world_size)
    ahead = ReadAhead(shards) if storage.is_remote(shards.index.base or shards.folder) and len(block) else None

    def slots() -> Iterator[list[Slot]]:
        in_use = -1
        for sample in block:
            if ahead is not None and (shard := shards.index.shards_of([sample])[0]) != in_use:
                in_use = shard
                ahead.want(next_shards(shards, shard, block, ranks_here))
            yield [Slot(0, sample, 1)]

    try:
        for batch in single_images(shards, slots(), len(block), loader_workers):
            for report in batch["bad"]:
                skipped(report)
            if not batch["bad"]:
                yield batch
    finally:
        if ahead is not None:
            ahead.close()


def single_images(shards: Shards, slots: Iterator[list[Slot]], count: int, loader_workers: int) -> Iterator[Batch]:
    """Yield batches of one sample each, from loader processes if these save time.

    The first samples are read in this process, to estimate how long all take.

    Args:
        shards: The split.
        slots: The batches' slots.
        count: Number of batches.
        loader_workers: Number of loader processes; 0 reads all in this process.

    Yields:
        The batches, in the order of the slots.
    """
    seconds = math.inf
    for batch in itertools.islice(slots, TRIED if loader_workers else None):
        started = time.perf_counter()
        read = shards[batch]
        # The first of a shard may have waited for the shard.
        seconds = min(seconds, time.perf_counter() - started)
        yield read
    left = count - TRIED
    if not loader_workers or left <= 0:
        return
    if seconds * left < WORTH_PROCESSES:
        yield from (shards[batch] for batch in slots)
        return
    loader = DataLoader(
        Returned(shards),
        batch_sampler=slots,
        collate_fn=partial(collated, None),
        num_workers=min(loader_workers, left),
        # Whole images can be large, and wait in shared memory.
        prefetch_factor=2,
        pin_memory=torch.cuda.is_available(),
        # The seed of the processes would otherwise be a number of the training's generator.
        generator=torch.Generator(),
    )
    yield from map(unpack_small, loader)


def next_shards(shards: Shards, first: int, block: range, ranks_here: int) -> list[int]:
    """Return a shard and those after it that are prefetched for a block of samples.

    They take at most half of this rank's part of the cache, so that copies which the training reads next stay there.

    Args:
        shards: The split.
        first: Number of the shard in use.
        block: The samples to read, which are not empty.
        ranks_here: Number of ranks that share this machine's cache.
    """
    last = shards.index.shards_of([block[-1]])[0]
    room = shards.cache.limit / (2 * ranks_here) if shards.cache else 0.0
    found = range(first, min(first + FETCHES, last) + 1)
    ends = np.cumsum([shards.index.shards[number].bytes for number in found])
    return list(found[: max(1, int((ends <= room).sum()))])
