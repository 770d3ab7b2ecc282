"""BCE + Dice, forward and backward, compared with other implementations; `make bench` runs it and writes the page."""

import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from deepskip.kernels import reference
from deepskip.kernels.bench import cases, measure, opponents

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SIZES = (
    [(16, 1, 1024, 1024), (8, 19, 512, 512), (4, 1, 128, 128), (32, 1, 512, 512)]
    if DEVICE.type == "cuda"
    else [(8, 1, 512, 512), (2, 19, 256, 256), (4, 1, 128, 128)]
)
ROUNDS = 50 if DEVICE.type == "cuda" else 30
NAMES = ("deepskip", "eager", "torch.compile", "MONAI DiceCELoss", "smp Dice + BCE")


@pytest.fixture(scope="module")
def bandwidth() -> float:
    """Return the copy bandwidth of the device, in bytes/s."""
    return measure.copy_bandwidth(DEVICE)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", NAMES)
def test_bce_dice(benchmark: Any, bandwidth: float, name: str, size: tuple[int, ...]) -> None:
    """Measure an implementation of the loss at a size, alternately with DeepSkip's."""
    losses = opponents.all_of(size[1])
    if name not in losses:
        pytest.skip(f"{name} is not installed (kernels/bench/requirements.txt)")
    loss = losses[name]
    inputs = cases.loss_inputs(size, DTYPE, DEVICE)
    if name in ("deepskip", "eager", "torch.compile"):
        # Only correct implementations are timed.
        logits, target = inputs
        exact = reference.loss_of_sums(reference.bce_dice_sums(logits.detach().double(), target))[0]
        torch.testing.assert_close(loss(logits, target).detach().double(), exact, rtol=1e-5, atol=1e-6)

    def step(which: opponents.Loss, logits: Tensor, target: Tensor) -> None:
        logits.grad = None
        which(logits, target).backward()

    forms = {"": loss, "ours": opponents.fused}
    calls = {name: measure.rotated(partial(step, form), *inputs, device=DEVICE) for name, form in forms.items()}
    # Rounds alternate, so that a slow spell of the machine affects both.
    times = measure.turns(calls, ROUNDS, DEVICE)
    theirs, ours = (statistics.median(values) for values in times.values())
    quantiles = statistics.quantiles(times[""], n=10)
    moved = cases.loss_bytes(size, DTYPE)
    row = {
        "size": "x".join(map(str, size)), "implementation": name, "dtype": str(DTYPE).removeprefix("torch."),
        "seconds": theirs, "seconds_10": quantiles[0], "seconds_90": quantiles[-1], "deepskip_is": theirs / ours,
        "bytes_per_second": moved / theirs, "of_a_copy": moved / theirs / bandwidth,
        "copy_bandwidth": bandwidth, "peak_bytes": measure.peak_bytes(lambda: step(loss, *inputs), DEVICE),
        "launches": measure.launches(lambda: step(loss, *inputs), DEVICE),
        "saved_bytes": measure.saved_bytes(lambda: loss(*inputs), inputs),
    }  # fmt: skip
    benchmark.extra_info |= {"suite": "bce_dice", "rows": [row]}
    benchmark.pedantic(calls[""], rounds=10, warmup_rounds=1)
