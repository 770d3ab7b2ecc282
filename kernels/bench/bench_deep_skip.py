"""The deep-skip stage of every decoder level, compared with the plain one; `make bench` runs it and writes the page."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from deepskip.kernels import deep_skip_cpu, reference
from deepskip.kernels.bench import cases, measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SIZES = ((16, 512, 512), (8, 1024, 1024)) if DEVICE.type == "cuda" else ((8, 128, 128),)
ROUNDS = 50 if DEVICE.type == "cuda" else 15
# The implementations that keep upsampled maps for backward.
PLAIN = ("plain, channels last", "plain, contiguous", "torch.compile, channels last")


def ours_is_low(tensors: tuple[list[Tensor], list[Tensor]]) -> bool:
    """Return whether the dispatcher chooses an implementation that upsamples nothing.

    Args:
        tensors: maps (N, C_i, H_i, W_i) and weights (K, C_i, 3, 3) of a level.
    """
    if DEVICE.type == "cuda":
        return True
    height, channels = tensors[0][0].shape[2], len(tensors[1][0])
    return any(deep_skip_cpu.low_pays(height // x.shape[2], channels) for x in tensors[0])


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("u", range(1, cases.LEVELS))
def test_deep_skip(benchmark: Any, u: int, size: tuple[int, int, int]) -> None:
    """Measure all implementations of a level's stage at a size."""
    N, H, W = size[0], size[1] // 2 ** (u - 1), size[2] // 2 ** (u - 1)
    torch.backends.cudnn.benchmark = True
    made = {
        layout: cases.level_inputs(u, N, H, W, DTYPE, layout, DEVICE)
        for layout in (torch.channels_last, torch.contiguous_format)
    }
    last = made[torch.channels_last]
    forms = {name: cases.stage(name) for name in cases.STAGES}
    stages = {name: (stage, made[layout]) for name, (stage, layout) in forms.items()}
    # Only correct implementations are timed.
    exact = reference.deep_skip([x.detach().double() for x in last[0]], [w.detach().double() for w in last[1]])
    grad = torch.randn_like(exact).to(DTYPE)

    def forward(name: str) -> Tensor:
        stage, tensors = stages[name]
        with torch.no_grad():
            return stage(*tensors)

    def step(name: str) -> None:
        stage, (inputs, weights) = stages[name]
        for x in (*inputs, *weights):
            x.grad = None
        stage(inputs, weights).backward(grad)

    for name in stages:
        error = (forward(name).double() - exact).norm() / exact.norm()
        assert error <= (1e-6 if torch.float32 == DTYPE else 1e-2), f"{name} is off by {error:.2e}"
    forwards = measure.in_turns({name: partial(forward, name) for name in stages}, ROUNDS, DEVICE)
    steps = measure.in_turns({name: partial(step, name) for name in stages}, ROUNDS, DEVICE)
    # Eq. 1: every deeper map at the level's size.
    upsampled = sum(x.shape[1] * N * H * W * x.element_size() for x in last[0][1:])
    rows = []
    for name, (stage, tensors) in stages.items():
        rows.append(
            {
                "size": f"level {u}, {N}x{H}x{W}", "implementation": name, "dtype": str(DTYPE).removeprefix("torch."),
                "forward": forwards[name], "forward_ratio": forwards[name] / forwards["deepskip"],
                "seconds": steps[name], "ratio": steps[name] / steps["deepskip"],
                "peak_bytes": measure.peak_bytes(partial(step, name), DEVICE),
                "saved_bytes": measure.saved_bytes(
                    partial(stage, *tensors), (*tensors[0], *tensors[1])
                ),
                "predicted_bytes": upsampled if name in PLAIN or not ours_is_low(last) else 0,
            }
        )  # fmt: skip
    benchmark.extra_info |= {"suite": "deep_skip", "rows": rows}
    benchmark.pedantic(lambda: step("deepskip"), rounds=3)
