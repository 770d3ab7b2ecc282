from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepskip.data_shards.order import EpochOrder, Slot, rank_slots, steps_per_epoch


def whole(seed: int, epoch: int, sizes: list[int], window: int) -> np.ndarray:
    return EpochOrder(seed, epoch, sizes, window).samples(0, sum(sizes))


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


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum),
    window=st.integers(1, 5),
    G=st.integers(1, 24),
    seed=st.integers(0, 2**32),
    parts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 7)), min_size=1, max_size=5),
)
def test_stops_and_changes_of_the_world_size_lose_and_repeat_nothing(
    sizes: list[int], window: int, G: int, seed: int, parts: list[tuple[int, int]]
) -> None:
    """Check parts of (steps until the stop, ranks), of which the last ends with the second epoch."""
    samples = sum(sizes)
    per_epoch = steps_per_epoch(samples, G)
    seen = [Counter[int](), Counter[int]()]
    step = 0
    for number, (steps, W) in enumerate(parts):
        stop = 2 * per_epoch if number == len(parts) - 1 else min(step + steps, 2 * per_epoch)
        # Each rank starts from the step alone, as after a restart.
        ranks = []
        for rank in range(W):
            taken = []
            for t in range(step, stop):
                epoch, batch = divmod(t, per_epoch)
                taken.append(rank_slots(EpochOrder(seed, epoch, sizes, window), batch, G, rank, W))
            ranks.append(taken)
        for t in range(step, stop):
            epoch, batch = divmod(t, per_epoch)
            counted = [s.sample for taken in ranks for s in taken[t - step] if s.weight]
            # A single rank from the start has the same samples.
            alone = rank_slots(EpochOrder(seed, epoch, sizes, window), batch, G, 0, 1)
            assert counted == [s.sample for s in alone if s.weight]
            seen[epoch].update(counted)
        step = stop
    assert seen == [Counter(range(samples))] * 2


def test_any_position_of_a_huge_epoch_is_found_at_once() -> None:
    # There are 100 million samples. A permutation of all of them would take seconds and 800 MB.
    order = EpochOrder(0, 0, np.full(100_000, 1000), 16)
    middle = order.samples(90_000_000, 90_000_016)
    assert len(set(middle.tolist())) == 16
    assert set(middle // 1000) <= set(order.window_shards(order.window_at(90_000_000)).tolist())
    assert order.shuffled.cache_info().currsize == 1
