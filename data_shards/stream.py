"""Batches out of a split: each rank's share of every global batch, from any step, and the images of a validation split."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from deepskip.data_shards import storage
from deepskip.data_shards.dataset import Batch, Shards
from deepskip.data_shards.order import EpochOrder, Slot, rank_slots, steps_per_epoch

# told the epochs and the numbers of a batch's samples, returns what else the batch carries
Entries = Callable[[list[int], list[int]], dict[str, Any]]
# remote shards that are fetched at once
FETCHES = 8


class ReadAhead:
    """Fetches the shards of the window in use and of the next into the cache, in threads, in the order of the epoch."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="deepskip-fetch")
        self.asked: OrderedDict[int, Future[Path]] = OrderedDict()

    def want(self, numbers: Sequence[int]) -> None:
        """Sees to it that shards come, those named first first; an error is left to whoever reads the shard."""
        for number in numbers:
            if number not in self.asked:
                self.asked[number] = self.pool.submit(self.shards.local_path, number)
        for number in [n for n in self.asked if n not in numbers]:
            self.asked.pop(number).cancel()

    def close(self) -> None:
        """Stops what has not begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def check_cache(shards: Shards, window: int) -> None:
    """Raises ValueError where the cache cannot hold the largest window of a remote split's shards, and the next."""
    if shards.cache is None or not storage.is_remote(shards.index.base or shards.folder):
        return
    largest = sum(sorted((shard.bytes for shard in shards.index.shards), reverse=True)[: 2 * window])
    if largest > shards.cache.limit:
        raise ValueError(
            f"two windows of {window} shards of {shards.folder} have {largest / 1e9:.2f} GB, the cache at "
            f"{shards.cache.folder} {shards.cache.limit / 1e9:.2f} GB; raise data.cache_gb or lower data.shuffle_window"
        )


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
) -> Iterator[Batch]:
    """Yields this rank's share of global batch first_step, first_step + 1, and so on without end.

    loader_workers: decoding processes. window: shards that are shuffled together. entries: makes what else a batch carries,
    where the batch is made; it goes to the loader's processes pickled. Raises ValueError for a split without
    samples, or a cache too small for the window.
    """
    if len(shards) == 0:
        raise ValueError(f"{shards.folder} holds no samples")
    check_cache(shards, window)
    ahead = ReadAhead(shards) if storage.is_remote(shards.index.base or shards.folder) else None

    def slots() -> Iterator[list[Slot]]:
        per_epoch = steps_per_epoch(len(shards), global_batch_size)
        epoch, batch = divmod(first_step, per_epoch)
        while True:
            order = EpochOrder(seed, epoch, shards.index.shard_sizes, window)
            for t in range(batch, per_epoch):
                if ahead is not None:
                    number = order.window_at(t * global_batch_size)
                    ahead.want([*order.window_shards(number).tolist(), *order.window_shards(number + 1).tolist()])
                yield rank_slots(order, t, global_batch_size, rank, world_size)
            epoch, batch = epoch + 1, 0

    try:
        if loader_workers:
            loader = DataLoader(
                shards,
                batch_sampler=slots(),
                collate_fn=partial(collated, entries),
                num_workers=loader_workers,
                prefetch_factor=4,
                pin_memory=torch.cuda.is_available(),
            )
            yield from map(unpack_small, loader)
        else:
            yield from (with_entries(entries, shards[batch]) for batch in slots())
    finally:
        if ahead is not None:
            ahead.close()


def with_entries(entries: Entries | None, batch: Batch) -> Batch:
    """Add to a batch what `entries` makes for its samples."""
    return batch if entries is None else batch | entries(batch["epoch"], batch["sample"])


def collated(entries: Entries | None, batch: Batch) -> Batch:
    """Make a batch ready to leave a loader's process."""
    return pack_small(with_entries(entries, batch))


def pack_small(batch: Batch) -> Batch:
    """Makes arrays of a batch's small tensors, of two axes at most: a tensor goes to another process by a file of its own."""
    return {name: x.numpy() if isinstance(x, torch.Tensor) and x.ndim <= 2 else x for name, x in batch.items()}


def unpack_small(batch: Batch) -> Batch:
    """Makes tensors of them again, pinned where there is a GPU: a copy of others would wait for it."""
    arrays = {name: torch.from_numpy(x) for name, x in batch.items() if isinstance(x, np.ndarray)}
    if torch.cuda.is_available():
        arrays = {name: x.pin_memory() for name, x in arrays.items()}
    return batch | arrays


def whole_images(
    shards: Shards, rank: int, world_size: int, skipped: Callable[[dict[str, Any]], None] = lambda report: None
) -> Iterator[Batch]:
    """Yields every world_size-th sample from number `rank` on, whole, one a batch; all ranks together each sample once.

    skipped: told of each bad sample that is left out.
    """
    for sample in range(rank, len(shards), world_size):
        batch = shards[[Slot(0, sample, 1)]]
        for report in batch["bad"]:
            skipped(report)
        if not batch["bad"]:
            yield batch
