"""Batches of a split that grows: each rank's share of every global batch, in the order of its admission log (`admission`)."""

from collections.abc import Callable, Iterator

from deepskip.data_shards import storage
from deepskip.data_shards.admission import StreamOrder
from deepskip.data_shards.dataset import Batch, Shards, SkipReport
from deepskip.data_shards.order import Slot, rank_block, rank_share, rank_windows, shards_ahead
from deepskip.data_shards.stream import Entries, ReadAhead, check_cache, lanes_here, read


def stream_batches(
    shards: Shards,
    order: StreamOrder,
    first_step: int,
    stop_step: int | None,
    rank: int,
    world_size: int,
    loader_workers: int = 0,
    entries: Entries | None = None,
    ranks_here: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's share of the global batches of a segment, or of the steps after it, which are replayed.

    Args:
        shards: The split, whose index holds what these steps take.
        order: Order of the stream.
        first_step: Step to start at, counted from the start of the training.
        stop_step: Step before which to end, in the same segment or at its end, or before the next one; None does not end.
        rank: Rank, 0 to world_size - 1.
        world_size: Number of ranks.
        loader_workers: Number of processes that decode samples; 0 decodes in this process.
        entries: Makes additional entries of each batch where the batch is made. It is pickled for loader processes.
        ranks_here: Number of ranks that share this machine's cache.

    Yields:
        Batches with the additional entries.

    Raises:
        SmallCache: If first_step is 0 and the cache is too small for two windows of each lane.
    """
    number = order.number_at(first_step)
    segment = order.segment(number)
    ahead = ReadAhead(shards) if storage.is_remote(shards.folder) else None
    if ahead is not None:
        own = [shards.index.shard(n) for n in shards_of(order, segment.generations)]
        lanes = lanes_here(order.lanes, order.global_batch_size, world_size, ranks_here)
        check_cache(shards, order.window, lanes, own, started=first_step > 0)

    def slots() -> Iterator[list[Slot]]:
        in_use = None
        step = first_step
        while stop_step is None or step < stop_step:
            if ahead is not None and step in segment.steps:
                epoch, new = order.order(number), order.global_batch_size - segment.replay
                share = rank_share(epoch, step - segment.steps.start, new, rank, world_size)
                windows = rank_windows(epoch, share)
                if windows and in_use != windows:
                    in_use = windows
                    first = order.shard_ends[segment.generations.start]
                    ahead.want([first + n for n in shards_ahead(epoch, None, windows)])
            yield order.slots(step, rank, world_size)
            step += 1

    try:
        yield from read(shards, slots(), loader_workers, entries)
    finally:
        if ahead is not None:
            ahead.close()


def shards_of(order: StreamOrder, generations: range) -> range:
    """Return the numbers of the shards of successive generations in the chain."""
    return range(order.shard_ends[generations.start], order.shard_ends[generations.stop])


def images_of(
    shards: Shards, samples: range, rank: int, world_size: int, skipped: Callable[[SkipReport], None]
) -> Iterator[Batch]:
    """Yield this rank's block of some samples in their order, whole, as batches of one.

    Args:
        shards: The split, without crops.
        samples: Numbers of the samples.
        rank: Rank, 0 to world_size - 1.
        world_size: Number of ranks.
        skipped: Called with the report of each bad sample that is skipped.
    """
    for place in rank_block(len(samples), rank, world_size):
        batch = shards[[Slot(0, samples[place], 1)]]
        for report in batch["bad"]:
            skipped(report)
        if not batch["bad"]:
            yield batch
