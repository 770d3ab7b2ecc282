"""The model of scaling equals values computed by hand and by a simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest

from deepskip.cluster.scale import (
    Link,
    Machine,
    all_reduce,
    all_reduce_link,
    best_interval,
    fitted_link,
    fitted_machine,
    goodput,
    slowest_of,
    step,
    strong,
    weak,
)

INNER, OUTER = Link(1e-6, 100e9), Link(10e-6, 10e9)
MACHINE = Machine(0.001, 0.002, 0.0, INNER, OUTER)


def simulated_goodput(
    interval: float, mtbf: float, recovery: float, checkpoint: float, intervals: int, seed: int
) -> float:
    """Simulate `intervals` of work with single random faults; return the share of time that was useful work."""
    random = np.random.default_rng(seed)
    now, done = 0.0, 0
    fault = random.exponential(mtbf)
    while done < intervals:
        if now + interval + checkpoint <= fault:
            now += interval + checkpoint
            done += 1
            continue
        now = fault
        fault += random.exponential(mtbf)
        while now + recovery > fault:
            now = fault
            fault += random.exponential(mtbf)
        now += recovery
    return intervals * interval / now


def test_all_reduce_by_hand() -> None:
    # A ring of 4 sends 6 messages of 10 us, then 1.5 MB at 10 GB/s.
    assert all_reduce_link(4, 1e6, OUTER, "ring") == pytest.approx(60e-6 + 150e-6)
    # A tree of 5 has 3 levels up and down, then sends 2 MB.
    assert all_reduce_link(5, 1e6, OUTER, "tree") == pytest.approx(60e-6 + 200e-6)
    assert all_reduce_link(1, 1e6, OUTER, "ring") == 0
    # 8 devices of a node take 14 us + 1.75 MB at 100 GB/s. 4 nodes as a tree take 40 us + 2 MB at 10 GB/s.
    assert all_reduce(8, 1e6, MACHINE) == pytest.approx(14e-6 + 17.5e-6)
    assert all_reduce(32, 1e6, MACHINE) == pytest.approx(31.5e-6 + 40e-6 + 200e-6)
    # One ring over all 32 sends 62 messages over the slow link.
    assert all_reduce(32, 1e6, MACHINE, "ring", hierarchical=False) == pytest.approx(620e-6 + 2 * 31 / 32 * 100e-6)


def test_the_slowest_of_n() -> None:
    # The closed forms are 1 / sqrt(pi) and 3 / (2 sqrt(pi)).
    assert slowest_of(1) == pytest.approx(0, abs=1e-9)
    assert slowest_of(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-6)
    assert slowest_of(3) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-6)
    drawn = np.random.default_rng(0).standard_normal((20_000, 64)).max(1).mean()
    assert slowest_of(64) == pytest.approx(drawn, rel=0.01)


def test_a_step_by_hand() -> None:
    # 64 images on 16 devices of 2 nodes take 2 ms + 4 ms. The sums take 14 us + 20 us and hardly a byte. The first
    # bucket is hidden behind computation.
    found = step(16, 64, MACHINE, buckets=(1_000_000, 500_000))
    assert found.compute == pytest.approx(0.006)
    assert found.waiting == 0
    assert found.sums == pytest.approx(34e-6, rel=0.001)
    assert found.gradients == pytest.approx(14e-6 + 1.75 * 0.5e6 / 100e9 + 20e-6 + 2 * 0.5e6 / 10e9)
    # Nothing is hidden if the device cannot communicate while it computes.
    busy = step(16, 64, replace(MACHINE, overlap=False), buckets=(1_000_000, 500_000))
    assert busy.gradients == pytest.approx(found.gradients + all_reduce(16, 1_000_000, MACHINE))
    # 4 images at 500 images/s take 8 ms.
    slow = step(16, 64, replace(MACHINE, loader_images=500))
    assert slow.seconds == pytest.approx(0.008)
    late = step(16, 64, replace(MACHINE, deviation=0.1))
    assert late.waiting == pytest.approx(0.0006 * slowest_of(16))
    # With 65 images on 16 devices, one has 5, and all wait for it.
    assert step(16, 65, MACHINE).compute == pytest.approx(0.007)


def test_efficiency() -> None:
    free = Machine(0.001, 0.0, 0.0, Link(0.0, 1e30), Link(0.0, 1e30))
    assert strong([1, 4, 64], 64, free) == pytest.approx([1, 1, 1])
    assert weak([1, 4, 1024], 8, free) == pytest.approx([1, 1, 1])
    # With a fixed cost of two images, 4 devices take 2 + 16 each, or 4 x 18 in all. One takes 2 + 64.
    fixed = replace(free, step_seconds=0.002)
    assert strong([4], 64, fixed) == pytest.approx([66 / (4 * 18)])
    # More devices than images bring no gain.
    assert step(128, 64, fixed).seconds == pytest.approx(step(64, 64, fixed).seconds)


def test_goodput_by_hand() -> None:
    # There is one fault an hour, 60 s of work, 1 s of checkpoint and 30 s of recovery.
    expected = 60 / (3600 * math.exp(30 / 3600) * (math.exp(61 / 3600) - 1))
    assert goodput(60, 3600, 30, 1) == pytest.approx(expected, rel=1e-12)
    # A rare fault costs half an interval and a recovery. The checkpoints cost 1 s in 61.
    mtbf = 1e7
    assert 1 - goodput(60, mtbf, 30, 1) == pytest.approx(1 / 61 + (61 / 2 + 30) / mtbf, rel=1e-3)


@pytest.mark.parametrize(
    ("interval", "mtbf", "recovery", "checkpoint"),
    [(300.0, 7200.0, 60.0, 2.0), (60.0, 600.0, 120.0, 5.0), (600.0, 500.0, 30.0, 1.0)],
)
def test_the_simulation_agrees_with_the_closed_form(
    interval: float, mtbf: float, recovery: float, checkpoint: float
) -> None:
    parts = [simulated_goodput(interval, mtbf, recovery, checkpoint, 4000, seed) for seed in range(8)]
    error = np.std(parts, ddof=1) / math.sqrt(len(parts))
    assert abs(np.mean(parts) - goodput(interval, mtbf, recovery, checkpoint)) < 4 * error
    assert error < 0.01
    # The same seed draws the same faults.
    assert simulated_goodput(interval, mtbf, recovery, checkpoint, 4000, 0) == parts[0]


@pytest.mark.parametrize(("mtbf", "checkpoint"), [(3600.0, 1.0), (86400.0, 30.0), (600.0, 20.0)])
def test_no_interval_is_better_than_the_best(mtbf: float, checkpoint: float) -> None:
    best = best_interval(mtbf, checkpoint)
    tried = np.geomspace(best / 10, best * 10, 2001)
    found = [goodput(interval, mtbf, 45.0, checkpoint) for interval in tried]
    # The formula is an expansion. It is within 1 % of the best interval, and this error costs nothing.
    assert tried[int(np.argmax(found))] == pytest.approx(best, rel=0.01)
    assert goodput(best, mtbf, 45.0, checkpoint) > (1 - 1e-6) * max(found)


def test_fits_find_what_made_the_numbers() -> None:
    sizes = [1e3, 1e5, 1e6, 1e7]
    link = fitted_link([(size, all_reduce_link(3, size, OUTER, "ring")) for size in sizes], 3)
    assert link.latency == pytest.approx(OUTER.latency)
    assert link.bandwidth == pytest.approx(OUTER.bandwidth)
    machine = fitted_machine({2: (0.05, 0.005), 4: (0.07, 0.007), 8: (0.11, 0.011)}, link)
    assert (machine.image_seconds, machine.step_seconds) == pytest.approx((0.01, 0.03))
    assert machine.deviation == pytest.approx(0.1)
