"""The page on scaling states what the model computes."""

from dataclasses import replace

import pytest

from deepskip.cluster.scale import GRADIENT_BYTES, best_interval, goodput, step
from deepskip.data_shards.order import EpochOrder, rank_slots, steps_per_epoch
from deepskip.jobs.bench.fetching import simulate
from deepskip.jobs.bench.scale_page import CLOUD, FLOPS_128, GPU, PAGE, PLOT, SPOT, WEAK_BATCH, filled


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert filled(page) == page
    assert "No scaling over GPUs was measured" in page
    assert PLOT.is_file()


def test_the_counts_are_the_networks() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from deepskip import DeepSkipUNet, kernels

    network = DeepSkipUNet(in_channels=3, num_classes=1)
    assert 4 * sum(parameter.numel() for parameter in network.parameters()) == GRADIENT_BYTES
    kernels.backend.choose("reference")
    try:
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 128, 128)).sum().backward()
    finally:
        kernels.backend.choose("auto")
    assert abs(counter.get_total_flops() / FLOPS_128 - 1) < 1e-3


def test_what_the_page_says_in_words() -> None:
    # Decoding keeps up with the assumed GPU, but not with one that is two and a half times as fast.
    assert step(64, 64 * WEAK_BATCH, GPU).loader == 0
    assert step(64, 64 * WEAK_BATCH, replace(GPU, image_seconds=GPU.image_seconds / 2.5)).loader > 0
    # Recoveries are four fifths of the cost of faults on a thousand spot GPUs.
    mtbf = SPOT.mtbf(128)
    kept = goodput(best_interval(mtbf, SPOT.checkpoint), mtbf, SPOT.recovery, SPOT.checkpoint)
    assert 0.7 < SPOT.recovery / mtbf / (1 - kept) < 0.85
    # At 256 GPUs and 1,024 images, the fixed cost is half of a step's computation or more.
    found = step(256, 1024, GPU)
    assert 0.4 < GPU.step_seconds / found.compute < 0.7
    assert found.loader == step(256, 1024, CLOUD).loader == 0


@pytest.mark.parametrize(("machines", "G", "lanes"), [(4, 32, 8), (3, 32, 8), (2, 36, 8), (4, 32, 1)])
def test_simulated_machines_read_what_the_order_gives_them(machines: int, G: int, lanes: int) -> None:
    order = EpochOrder(0, 0, [10] * 40, 2, lanes)
    opened = []
    for rank in range(machines):
        slots = (s for t in range(steps_per_epoch(400, G)) for s in rank_slots(order, t, G, rank, machines))
        opened.append(len({slot.sample // 10 for slot in slots}))
    found = simulate(machines, 40, 10, G, 2, lanes)
    if lanes == 1:
        # Without lanes every machine fetches all; windows are sampled.
        assert (found.fetched, found.cached, found.all_machines) == (40, 4, 160)
        assert abs(found.opened - opened[2]) <= 4
    elif G % lanes == 0:
        assert (found.fetched, found.opened, found.all_machines) == (max(opened), max(opened), sum(opened))
        assert found.cached == 4 * -(-lanes // machines) + (0 if lanes % machines == 0 else 4)
    else:
        # Lanes that a machine reads in some steps only are fetched whole.
        assert max(opened) <= found.fetched < 40
