"""The page on scaling states what the model computes."""

from dataclasses import replace

from deepskip.cluster.scale import GRADIENT_BYTES, best_interval, goodput, step
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
