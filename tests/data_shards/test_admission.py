"""The order of a stream that grows: properties of random admission logs, and numbers by hand."""

from collections import Counter

import numpy as np
import pytest

from deepskip.data_shards.admission import REPLAY, Admission, StreamOrder, fingerprint, replay_size, segments
from deepskip.data_shards.order import EpochOrder, Slot, rank_slots


def random_stream(seed: int) -> tuple[StreamOrder, list[list[int]], list[Admission], dict[str, float]]:
    """Make a stream as it grows: each time some generations are admitted at the end of the last segment or later."""
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 13))
    options = {
        "window": int(rng.integers(1, 4)), "lanes": int(rng.integers(1, 4)), "replay": float(rng.choice([0, 0.25, 0.6])),
        "replay_generations": int(rng.integers(1, 4)),
    }  # fmt: skip
    shard_sizes = [rng.integers(1, 9, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 9))]
    log: list[Admission] = []
    order = StreamOrder(seed, log, shard_sizes, batch, **options)
    while len(log) < len(shard_sizes):
        step = order.next_step + (int(rng.integers(3)) if log else 0)
        together = int(rng.integers(1, 4))
        new = [Admission(n, step) for n in range(len(log), min(len(log) + together, len(shard_sizes)))]
        order.admit(new, shard_sizes[len(log) :])
        log += new
    return order, shard_sizes, log, options


def batch_of(order: StreamOrder, step: int, world_size: int) -> list[Slot]:
    """Return the samples of weight 1 of all ranks, and check that each has the same number of places."""
    pieces = [order.slots(step, rank, world_size) for rank in range(world_size)]
    assert len({len(piece) for piece in pieces}) == 1
    return [slot for piece in pieces for slot in piece if slot.weight]


@pytest.mark.parametrize("seed", range(60))
def test_each_sample_is_new_once_whatever_the_log_and_the_workers(seed: int) -> None:
    order, shard_sizes, _, options = random_stream(seed)
    seen: Counter[int] = Counter()
    generation_of = np.repeat(np.arange(len(shard_sizes)), [sum(sizes) for sizes in shard_sizes])
    for step in range(order.next_step + 2):
        batches = [sorted(batch_of(order, step, world_size)) for world_size in (1, 2, 3, 5)]
        assert all(batch == batches[0] for batch in batches)
        new = [slot for slot in batches[0] if slot.epoch < REPLAY]
        replayed = [slot.sample for slot in batches[0] if slot.epoch == REPLAY + step]
        assert len(new) + len(replayed) == len(batches[0])
        seen.update(slot.sample for slot in new)
        segment = next((each for each in order.segments if step in each.steps), None)
        begun = [each for each in order.segments if each.steps.start <= step][-1]
        if segment is None:
            # Nothing is new between two segments, and after the last one.
            assert (len(new), len(replayed)) == (0, order.global_batch_size)
            stop = begun.generations.stop
        else:
            assert {int(generation_of[slot.sample]) for slot in new} <= set(segment.generations)
            full = step < segment.steps.stop - 1
            assert len(new) == order.global_batch_size - len(replayed) or (not full and new)
            stop = segment.generations.start
            expected = replay_size(order.global_batch_size, options["replay"]) if stop else 0
            assert len(replayed) == expected
        allowed = set(range(max(0, stop - int(options["replay_generations"])), stop))
        assert {int(generation_of[sample]) for sample in replayed} <= allowed
        pool = int(np.isin(generation_of, list(allowed)).sum())
        assert len(set(replayed)) == len(replayed) or pool < len(replayed)
    assert seen == Counter(range(len(generation_of)))


@pytest.mark.parametrize("seed", range(20))
def test_a_longer_log_changes_no_earlier_step(seed: int) -> None:
    order, shard_sizes, log, options = random_stream(seed)
    for length in range(1, len(log)):
        if log[length].step == log[length - 1].step:
            continue
        # What is not admitted yet need not exist.
        earlier = StreamOrder(seed, log[:length], shard_sizes[:length], order.global_batch_size, **options)
        for step in range(log[length].step):
            assert earlier.slots(step, 0, 2) == order.slots(step, 0, 2)


@pytest.mark.parametrize("seed", range(20))
def test_segments_are_appended(seed: int) -> None:
    order, shard_sizes, log, options = random_stream(seed)
    whole = StreamOrder(seed, log, shard_sizes, order.global_batch_size, **options)
    assert order.log().tolist() == [list(entry) for entry in log] == whole.log().tolist()
    assert order.segments == whole.segments
    assert order.ends.tolist() == np.cumsum([0, *(sum(sizes) for sizes in shard_sizes)]).tolist()
    for step in range(whole.next_step + 2):
        assert order.slots(step, 1, 2) == whole.slots(step, 1, 2)
    with pytest.raises(ValueError, match=r"after \d+ others"):
        order.admit([Admission(0, order.next_step)], [[1]])


def test_fingerprints_are_sums_of_splitmix64_and_depend_on_each_sample() -> None:
    def following(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    # The first number of the published generator with seed 1234567.
    assert following(1234567) == 6457827717110365317

    def term(step: int, epoch: int, sample: int) -> int:
        return following((following((following(sample) + epoch) % 2**64) + step) % 2**64) >> 32

    epochs, samples = [0, 0, REPLAY + 7, 3], [5, 2, 9, 2**40]
    expected = sum(term(7, epoch, sample) for epoch, sample in zip(epochs, samples, strict=True))
    assert fingerprint(7, epochs, samples) == expected
    assert fingerprint(7, epochs[2:], samples[2:]) + fingerprint(7, epochs[:2], samples[:2]) == expected
    assert fingerprint(7, [], []) == 0
    others = {fingerprint(7, epochs, [*samples[:3], other]) for other in range(1000)} | {
        fingerprint(step, epochs, samples) for step in range(1000)
    }
    # Step 7 has the samples themselves.
    assert len(others) == 2000


def test_the_first_segment_is_the_first_epoch_of_a_closed_set() -> None:
    sizes = [5, 3, 7, 2, 6]
    order = StreamOrder(11, [Admission(0, 0), Admission(1, 0)], [sizes[:2], sizes[2:]], 4, window=2, lanes=3)
    epoch = EpochOrder(11, 0, sizes, 2, 3)
    assert order.next_step == 6
    for step in range(6):
        for rank in range(2):
            assert order.slots(step, rank, 2) == rank_slots(epoch, step, 4, rank, 2)


def test_segments_by_hand() -> None:
    log = [Admission(0, 0), Admission(1, 5), Admission(2, 5), Admission(3, 9)]
    first, second, third = segments(log, [20, 6, 3, 4], 4, replay=0.25, replay_generations=2)
    assert first == (range(0, 1), range(0, 20), range(0, 5), range(0, 0), 0)
    # Three new samples and a replayed one a step.
    assert second == (range(1, 3), range(20, 29), range(5, 8), range(0, 20), 1)
    assert third == (range(3, 4), range(29, 33), range(9, 11), range(20, 29), 1)


def test_logs_that_are_wrong() -> None:
    for log, words in (
        ([Admission(0, 1)], "generation 0 is admitted from step 1, but a stream begins at step 0"),
        (
            [Admission(0, 0), Admission(1, 4)],
            "generation 1 is admitted from step 4, but the segment before it ends at step 5",
        ),
        ([Admission(1, 0)], r"names generations \[1\] of 2"),
        ([Admission(0, 0), Admission(1, 5), Admission(2, 9)], r"names generations \[0, 1, 2\] of 2"),
    ):
        with pytest.raises(ValueError, match=words):
            segments(log, [20, 6], 4)
    with pytest.raises(ValueError, match="replay is 1"):
        segments([Admission(0, 0)], [20], 4, replay=1.0)
    with pytest.raises(ValueError, match="no generation is admitted at step 0"):
        StreamOrder(0, [], [], 4).slots(0, 0, 1)
