import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deepskip.data_shards.order import (
    EpochOrder,
    Slot,
    automatic_lanes,
    rank_block,
    rank_share,
    rank_slots,
    rank_windows,
    shards_ahead,
    steps_per_epoch,
)


def whole(seed: int, epoch: int, sizes: list[int], window: int) -> np.ndarray:
    return EpochOrder(seed, epoch, sizes, window).samples(0, sum(sizes))


@pytest.mark.parametrize(
    ("seed", "sizes", "window", "G", "digest"),
    [
        (0, [3, 5, 2, 4], 2, 4, "6c75fc2efe816ee4"),
        (7, [1, 0, 7, 3, 30], 1, 8, "af8b35214dbe8bab"),
        (2**40, list(range(40)), 16, 12, "2067d609f16504f9"),
        (3, [100] * 30, 4, 64, "2bf89fd943556ab4"),
        (1, [5], 16, 3, "32b128241ab24914"),
    ],
)
def test_one_lane_is_the_order_of_commit_2d1da9e(seed: int, sizes: list[int], window: int, G: int, digest: str) -> None:
    """Checkpoints of trainings from before there were lanes are resumed: this order must never change."""
    found = hashlib.sha256()
    for epoch in (0, 1, 5):
        for W in (1, 2, 3, 5, 16):
            order = EpochOrder(seed, epoch, sizes, window)
            for t in range(steps_per_epoch(sum(sizes), G)):
                for rank in range(W):
                    found.update(json.dumps(rank_slots(order, t, G, rank, W)).encode())
    assert found.hexdigest()[:16] == digest


def test_one_lane_by_eye() -> None:
    order = EpochOrder(0, 1, [3, 5, 2, 4], 2)
    steps = [[[(s.sample, s.weight) for s in rank_slots(order, t, 4, r, 3)] for r in range(3)] for t in (0, 3)]
    assert steps == [
        [[(11, 1), (13, 1)], [(2, 1), (10, 1)], [(11, 0), (13, 0)]],
        [[(6, 1), (3, 1)], [(6, 0), (3, 0)], [(6, 0), (3, 0)]],
    ]


@pytest.mark.parametrize("sizes", [[5], [1, 0, 7, 3], list(range(40)), [1000] * 30])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_every_sample_once_and_a_function_of_seed_and_epoch(sizes: list[int], window: int) -> None:
    order = whole(3, 5, sizes, window)
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    np.testing.assert_array_equal(order, whole(3, 5, sizes, window))
    if sum(sizes) > 20:
        assert not np.array_equal(order, whole(3, 6, sizes, window))
        assert not np.array_equal(order, whole(4, 5, sizes, window))


def test_a_window_reads_few_shards() -> None:
    order = whole(0, 0, [100] * 20, 4)
    for first in range(0, 2000, 400):
        assert len(set(order[first : first + 400] // 100)) == 4


@pytest.mark.parametrize("samples", [1, 7, 64, 65])
@pytest.mark.parametrize("G", [1, 8, 12])
@pytest.mark.parametrize("W", [1, 2, 3, 5, 16])
def test_global_batches_do_not_depend_on_the_world_size(samples: int, G: int, W: int) -> None:
    order = EpochOrder(0, 2, [samples], 16)
    seen: list[int] = []
    for t in range(steps_per_epoch(samples, G)):
        ranks = [rank_slots(order, t, G, rank, W) for rank in range(W)]
        # Each rank has the same number of samples, so no collective waits.
        assert {len(slots) for slots in ranks} == {-(-G // W)}
        slots = [slot for part in ranks for slot in part]
        counted = [slot.sample for slot in slots if slot.weight]
        assert counted == order.samples(t * G, (t + 1) * G).tolist()
        assert all(0 <= slot.sample < samples and slot.epoch == 2 for slot in slots)
        seen += counted
    assert sorted(seen) == list(range(samples))


def test_what_fills_a_batch_has_weight_0() -> None:
    order = EpochOrder(1, 0, [5], 16)
    last = order.samples(3, 5).tolist()
    assert rank_slots(order, 1, 3, 0, 2) == [Slot(0, last[0], 1), Slot(0, last[1], 1)]
    assert rank_slots(order, 1, 3, 1, 2) == [Slot(0, last[0], 0), Slot(0, last[1], 0)]


def in_lanes(
    seed: int, epoch: int, sizes: list[int], window: int, lanes: int, fixed: bool
) -> list[tuple[list[int], list[int]]]:
    """Return the samples of each lane in order, and the shards of its pieces, from the definition and sample by sample."""
    first = np.cumsum(sizes) - sizes
    shuffled = np.random.default_rng([seed] if fixed else [seed, epoch]).permutation(len(sizes)).tolist()
    pairs = [(shard, int(first[shard]) + i) for shard in shuffled for i in range(sizes[shard])]
    found = []
    for lane in range(lanes):
        count = len(range(lane, sum(sizes), lanes))
        mine, pairs = pairs[:count], pairs[count:]
        pieces = [[n for s, n in mine if s == shard] for shard in dict.fromkeys(s for s, _ in mine)]
        shards = list(dict.fromkeys(s for s, _ in mine))
        if fixed:
            turn = np.random.default_rng([seed, epoch, lane + 1]).permutation(len(pieces))
            pieces, shards = [pieces[i] for i in turn], [shards[i] for i in turn]
        taken: list[int] = []
        for number in range(-(-len(pieces) // window)):
            together = [n for piece in pieces[number * window : (number + 1) * window] for n in piece]
            taken += np.random.default_rng([seed, epoch, lane + 1, number + 1]).permutation(together).tolist()
        found.append((taken, shards))
    return found


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    window=st.integers(1, 5),
    lanes=st.integers(2, 12),
    fixed=st.booleans(),
    G=st.integers(1, 40),
    W=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_lanes_are_what_their_definition_says(
    sizes: list[int], window: int, lanes: int, fixed: bool, G: int, W: int, seed: int
) -> None:
    """Check places, batches, pieces of ranks and the shards to read ahead against lists made sample by sample."""
    N, expected = sum(sizes), in_lanes(seed, 3, sizes, window, lanes, fixed)
    order, following = (EpochOrder(seed, epoch, sizes, window, lanes, fixed) for epoch in (3, 4))
    positions = [expected[p % lanes][0][p // lanes] for p in range(N)]
    assert sorted(positions) == list(range(N))
    assert order.samples(0, N).tolist() == positions
    per_rank, ends = -(-G // W), np.cumsum(sizes)
    for t in range(steps_per_epoch(N, G)):
        places = sorted(range(t * G, (t + 1) * G), key=lambda p: (p % lanes, p // lanes))
        for rank in range(W):
            mine = places[rank * per_rank : (rank + 1) * per_rank]
            slots = rank_slots(order, t, G, rank, W)
            assert [slot.sample for slot in slots if slot.weight] == [positions[p] for p in mine if p < N]
            assert len(slots) == per_rank
            # What the rank reads is among the shards that are read ahead, if it has anything to read.
            ahead = shards_ahead(order, following, rank_windows(order, rank_share(order, t, G, rank, W)))
            assert len(ahead) == len(set(ahead))
            if any(slot.weight for slot in slots):
                read = {int(np.searchsorted(ends, slot.sample, side="right")) for slot in slots}
                assert (
                    read
                    <= set(ahead)
                    <= {s for lane in {p % lanes for p in mine} for s in order.lane(lane).shards}
                    | {s for lane in {p % lanes for p in mine} for s in following.lane(lane).shards}
                )
            # Repeats are of the rank's own lanes, also at the end of the epoch.
            own = {n for lane in {p % lanes for p in mine} for n in expected[lane][0]}
            assert not own or {slot.sample for slot in slots} <= own
    if fixed:
        for lane in range(lanes):
            assert (
                set(expected[lane][0]) == set(order.lane(lane).samples(0, N)) == set(following.lane(lane).samples(0, N))
            )


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum),
    window=st.integers(1, 5),
    lanes=st.integers(1, 9),
    fixed=st.booleans(),
    G=st.integers(1, 24),
    seed=st.integers(0, 2**32),
    parts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 7)), min_size=1, max_size=5),
)
def test_stops_and_changes_of_the_world_size_lose_and_repeat_nothing(
    sizes: list[int], window: int, lanes: int, fixed: bool, G: int, seed: int, parts: list[tuple[int, int]]
) -> None:
    """Check parts of (steps until the stop, ranks), of which the last ends with the second epoch."""
    samples = sum(sizes)
    per_epoch = steps_per_epoch(samples, G)
    seen = [Counter[int](), Counter[int]()]
    alone = [EpochOrder(seed, epoch, sizes, window, lanes, fixed) for epoch in range(2)]
    step = 0
    for number, (steps, W) in enumerate(parts):
        stop = 2 * per_epoch if number == len(parts) - 1 else min(step + steps, 2 * per_epoch)
        # Each rank starts from the step alone, as after a restart.
        ranks = []
        for rank in range(W):
            orders = [EpochOrder(seed, epoch, sizes, window, lanes, fixed) for epoch in range(2)]
            steps_done = (divmod(t, per_epoch) for t in range(step, stop))
            ranks.append([rank_slots(orders[epoch], batch, G, rank, W) for epoch, batch in steps_done])
        for t in range(step, stop):
            epoch, batch = divmod(t, per_epoch)
            assert {len(taken[t - step]) for taken in ranks} == {-(-G // W)}
            counted = [s.sample for taken in ranks for s in taken[t - step] if s.weight]
            # A single rank from the start has the same samples, in the same order.
            assert counted == [s.sample for s in rank_slots(alone[epoch], batch, G, 0, 1) if s.weight]
            assert sorted(counted) == sorted(alone[epoch].samples(batch * G, (batch + 1) * G).tolist())
            seen[epoch].update(counted)
        step = stop
    assert seen == [Counter(range(samples))] * 2


@settings(max_examples=60, deadline=None)
@given(
    shards=st.integers(1, 120),
    lanes=st.sampled_from([2, 3, 8, 16, 17, 64]),
    times=st.integers(1, 4),
    more=st.integers(0, 7),
    machines=st.integers(1, 8),
    fixed=st.booleans(),
)
def test_a_machine_reads_its_share_of_the_shards(
    shards: int, lanes: int, times: int, more: int, machines: int, fixed: bool
) -> None:
    per_shard, G = 10, lanes * times + more
    # With fewer samples than lanes, some lanes are empty.
    assume(shards * per_shard >= lanes)
    order = EpochOrder(5, 2, [per_shard] * shards, 2, lanes, fixed)
    steps = range(steps_per_epoch(len(order), G))
    divided = G % lanes == 0 and G % machines == 0 and lanes % machines == 0
    # A machine's lanes are neighbours. If not all divides, it shares lanes at either end, which move with the batches.
    most = lanes / machines if divided else -(-G // machines) * lanes / G + 2 + 4 * lanes / G
    total = 0
    for machine in range(machines):
        slots = [slot for t in steps for slot in rank_slots(order, t, G, machine, machines)]
        read = {slot.sample // per_shard for slot in slots}
        # Of the shards, one at either end is cut. Lanes that move with the batches may lie at both ends of all lanes.
        assert len(read) <= shards * most / lanes + (2 if divided else 4)
        total += len(read)
    assert not divided or total <= shards + machines - 1


def test_a_batch_draws_from_more_shards_than_with_one_lane() -> None:
    mixed = []
    for window, lanes in ((16, 1), (2, 16)):
        order = EpochOrder(0, 0, [50] * 512, window, lanes)
        mixed.append(np.mean([len(set(order.samples(t * 256, (t + 1) * 256) // 50)) for t in range(100)]))
    # Windows of 32 shards in all, of which the lanes' move on at different times.
    assert mixed[0] < 24
    assert mixed[1] > 32


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.one_of(
        st.lists(st.integers(0, 9), min_size=1, max_size=30),
        st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(1, 9)).map(
            lambda drawn: [drawn[1]] * drawn[0] + [min(drawn[1:])]
        ),
    ),
    W=st.integers(1, 40),
)
def test_validation_blocks_open_few_shards(sizes: list[int], W: int) -> None:
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    blocks = [rank_block(len(shard_of), rank, W) for rank in range(W)]
    # Each image once, in the order of the split.
    assert [number for block in blocks for number in block] == list(range(len(shard_of)))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    opened = [len(set(shard_of[block.start : block.stop].tolist())) for block in blocks]
    # Each border between two ranks cuts one shard at most.
    assert sum(opened) <= len(sizes) + W - 1
    if len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]:
        assert max(opened) <= -(-len(sizes) // W) + 1


def test_any_position_of_a_huge_epoch_is_found_at_once() -> None:
    # There are 100 million samples. A permutation of all of them would take seconds and 800 MB.
    order = EpochOrder(0, 0, np.full(100_000, 1000), 16)
    middle = order.samples(90_000_000, 90_000_016)
    lane = order.lane(0)
    assert len(set(middle.tolist())) == 16
    assert set(middle // 1000) <= set(lane.window_shards(lane.window_at(90_000_000)).tolist())
    assert lane.shuffled.cache_info().currsize == 1
    # One of 1,024 machines looks at its own lanes only.
    order = EpochOrder(0, 0, np.full(100_000, 1000), 2, 4096)
    slots = rank_slots(order, 10_000, 8192, 1000, 1024)
    assert len({slot.sample for slot in slots}) == 8
    assert order.lane.cache_info().currsize == 4
    assert all(order.lane(lane).shuffled.cache_info().currsize == 1 for lane in range(4000, 4004))


@pytest.mark.parametrize(
    ("machines", "G", "lanes"),
    # One machine keeps the order without lanes; 24 does not divide 100, 20 does not divide 48, and 4,096 are too many.
    [(1, 1024, 1), (2, 64, 8), (4, 64, 16), (5, 100, 20), (6, 100, 25), (5, 48, 24), (7, 97, 28), (64, 1024, 256),
     (1024, 1024, 1024)],
)  # fmt: skip
def test_lanes_by_machines_and_batch(machines: int, G: int, lanes: int) -> None:
    assert automatic_lanes(machines, G) == lanes


def test_numbers_that_make_no_order() -> None:
    with pytest.raises(ValueError, match="the window is 0 shards; it must be 1 or more"):
        EpochOrder(0, 0, [1], 0)
    with pytest.raises(ValueError, match="the number of lanes is 0; it must be 1 or more"):
        EpochOrder(0, 0, [1], 1, 0)
