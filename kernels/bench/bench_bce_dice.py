"""BCE + Dice, forward and backward, beside other implementations; `make bench` runs it and writes the page."""

import itertools
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.bench import measure, opponents

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SIZES = (
    [(16, 1, 1024, 1024), (8, 19, 512, 512), (4, 1, 128, 128), (32, 1, 512, 512)]
    if DEVICE.type == "cuda"
    else [(8, 1, 512, 512), (2, 19, 256, 256), (4, 1, 128, 128)]
)
ROUNDS = 50 if DEVICE.type == "cuda" else 30
NAMES = ("deepskip", "eager", "torch.compile", "MONAI DiceCELoss", "smp Dice + BCE")


def inputs(size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Makes logits that need a gradient, and a uint8 target of a tenth foreground."""
    N, V, H, W = size
    logits = torch.randn(size, device=DEVICE).to(DTYPE).requires_grad_()
    target = (
        torch.rand(N, H, W, device=DEVICE)
        .mul_(10 if V == 1 else V)
        .sub_(8.999 if V == 1 else 0)
        .clamp_(0, max(1, V - 1))
    )
    return logits, target.to(torch.uint8)


def counted_bytes(size: tuple[int, ...]) -> int:
    """Gives the bytes that no implementation can do without: logits read twice, gradient written, target read twice."""
    N, V, H, W = size
    return N * H * W * (3 * V * torch.empty(0, dtype=DTYPE).element_size() + 2)


@pytest.fixture(scope="module")
def bandwidth() -> float:
    return measure.copy_bandwidth(DEVICE)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", NAMES)
def test_bce_dice(benchmark: Any, bandwidth: float, name: str, size: tuple[int, ...]) -> None:
    losses = opponents.all_of(size[1])
    if name not in losses:
        pytest.skip(f"{name} is not installed (kernels/bench/requirements.txt)")
    loss = losses[name]
    sets = measure.copies(lambda: inputs(size), DEVICE)
    if name in ("deepskip", "eager", "torch.compile"):
        # nothing is timed that is not right
        logits, target = sets[0]
        exact = reference.loss_of_sums(reference.bce_dice_sums(logits.detach().double(), target))[0]
        torch.testing.assert_close(loss(logits, target).detach().double(), exact, rtol=1e-5, atol=1e-6)

    def step(which: opponents.Loss, logits: Tensor, target: Tensor) -> None:
        logits.grad = None
        which(logits, target).backward()

    turns = itertools.cycle(sets)

    def seconds(which: opponents.Loss) -> float:
        chosen = next(turns)
        return measure.seconds(lambda: step(which, *chosen), DEVICE)

    for _ in range(3):
        seconds(loss)
        seconds(opponents.fused)
    # in turns, so that a slow spell of the machine hits both
    pairs = [(seconds(loss), seconds(opponents.fused)) for _ in range(ROUNDS)]
    theirs, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    quantiles = statistics.quantiles([pair[0] for pair in pairs], n=10)
    row = {
        "size": "x".join(map(str, size)), "implementation": name, "dtype": str(DTYPE).removeprefix("torch."),
        "seconds": theirs, "seconds_10": quantiles[0], "seconds_90": quantiles[-1], "deepskip_is": theirs / ours,
        "bytes_per_second": counted_bytes(size) / theirs, "of_a_copy": counted_bytes(size) / theirs / bandwidth,
        "copy_bandwidth": bandwidth, "peak_bytes": measure.peak_bytes(lambda: step(loss, *sets[0]), DEVICE),
        "launches": measure.launches(lambda: step(loss, *sets[0]), DEVICE),
        "saved_bytes": measure.saved_bytes(lambda: loss(*sets[0]), sets[0]),
    }  # fmt: skip
    benchmark.extra_info |= {"suite": "bce_dice", "rows": [row]}
    benchmark.pedantic(lambda: step(loss, *next(turns)), rounds=10, warmup_rounds=1)
