"""Simulate what each of many machines reads of a data set in an epoch, on the functions that give the order of samples."""

from dataclasses import dataclass

import numpy as np

from deepskip.data_shards.order import EpochOrder, rank_share, rank_slots, steps_per_epoch


@dataclass(frozen=True)
class Fetched:
    """What a machine reads in an epoch, in shards; the most of all machines.

    Attributes:
        fetched: Shards that it fetches, each by one request.
        opened: Shards of which it reads a sample.
        cached: Shards that its cache must hold: two windows of each of its lanes.
        all_machines: Shards that all machines fetch together.
    """

    fetched: int
    opened: int
    cached: int
    all_machines: int


def simulate(
    machines: int, shards: int, per_shard: int, global_batch_size: int, window: int, lanes: int, windows: int = 200
) -> Fetched:
    """Return what a machine with one rank reads in an epoch.

    Args:
        machines: Number of machines.
        shards: Number of shards, all of one size.
        per_shard: Samples in a shard.
        global_batch_size: Samples in a step over all machines.
        window: Shards of a lane that are shuffled together.
        lanes: Number of lanes. With one, read-ahead fetches every shard.
        windows: With one lane, opened shards are counted in this number of windows, and the rest is taken to be like them.
    """
    order = EpochOrder(0, 0, np.full(shards, per_shard), window, lanes)
    if lanes == 1:
        some = min(windows, -(-shards // window))
        steps = range(some * window * per_shard // global_batch_size)
        slots = (slot for t in steps for slot in rank_slots(order, t, global_batch_size, machines // 2, machines))
        opened = len({slot.sample // per_shard for slot in slots})
        return Fetched(shards, round(opened * shards / (some * window)), 2 * window, shards * machines)
    # If the lanes divide the batch, every step of a machine has the same ones.
    steps = range(1 if global_batch_size % lanes == 0 else min(lanes, steps_per_epoch(len(order), global_batch_size)))
    most, cached, total = 0, 0, 0
    for rank in range(machines):
        own = {s.lane for t in steps for s in rank_share(order, t, global_batch_size, rank, machines)}
        found = {int(shard) for lane in own for shard in order.lane(lane).shards}
        most, cached, total = max(most, len(found)), max(cached, 2 * window * len(own)), total + len(found)
    return Fetched(most, most, cached, total)
