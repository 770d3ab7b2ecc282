"""Inputs of the decoder levels and of the loss, and the implementations that the benchmarks compare."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepskip import kernels
from deepskip.kernels import backend, reference

BASE, LEVELS = 8, 5
Stage = Callable[[list[Tensor], list[Tensor]], Tensor]


def level_inputs(
    u: int, N: int, H: int, W: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Make the maps and weights of a decoder level: E_u .. E_{B-1} and D_{u+1}.

    Args:
        u: level, 1 first.
        N: images.
        H: height of the level.
        W: width of the level.
        dtype: dtype of maps and weights.
        layout: memory format of maps and weights.
        device: device of maps and weights.

    Returns:
        Maps (N, C_i, H / s_i, W / s_i) and weights (K, C_i, 3, 3), which need gradients.
    """
    generator = torch.Generator(device).manual_seed(u)
    channels = BASE * 2 ** (u - 1)
    inputs, weights = [], []
    for s in (*(2**j for j in range(LEVELS - u)), 2):
        x = torch.randn(N, channels * s, H // s, W // s, generator=generator, device=device)
        weight = (
            torch.randn(channels, channels * s, 3, 3, generator=generator, device=device) / (9 * channels * s) ** 0.5
        )
        inputs.append(x.to(dtype).contiguous(memory_format=layout).requires_grad_())
        weights.append(weight.to(dtype).contiguous(memory_format=layout).requires_grad_())
    return inputs, weights


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function for the shapes of its next calls, and discard what was compiled before.

    torch.compile gives up after eight recompilations of a function. Levels, sizes and gradient modes are more than that.
    """
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def next_stage(inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Compute the stage with the launches that no GPU has timed yet.

    Args:
        inputs: maps (N, C_i, H / s_i, W / s_i).
        weights: weights (K, C_i, 3, 3).
    """
    with backend.chosen("next"):
        return kernels.deep_skip(inputs, weights)


def next_conv3(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with the launches that no GPU has timed yet.

    Args:
        x: map (N, C, H, W).
        weight: weights (K, C, 3, 3).
    """
    with backend.chosen("next"):
        return kernels.conv3(x, weight)


def convolution_inputs(
    size: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Make a map and weights, channels last; a map of at most 3 channels is an image and needs no gradient.

    Args:
        size: (N, C, K, H, W).
        dtype: dtype of both.
        device: device of both.

    Returns:
        Map (N, C, H, W) and weights (K, C, 3, 3).
    """
    N, C, K, H, W = size
    x = torch.randn(N, C, H, W, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(K, C, 3, 3, device=device) / (9 * C) ** 0.5).to(dtype)
    return x.requires_grad_(C > 3), weight.contiguous(memory_format=torch.channels_last).requires_grad_()


STAGES = ("deepskip", "plain, channels last", "plain, contiguous", "torch.compile, channels last")


def stage(name: str, **options: Any) -> tuple[Stage, torch.memory_format]:
    """Return an implementation of the deep-skip stage, and the memory format of its inputs.

    Args:
        name: one of STAGES.
        options: options of torch.compile.
    """
    if name == "deepskip":
        return kernels.deep_skip, torch.channels_last
    form = compiled(reference.deep_skip, **options) if name.startswith("torch.compile") else reference.deep_skip
    return form, torch.contiguous_format if name.endswith("contiguous") else torch.channels_last


def loss_inputs(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make logits (N, V, H, W) that need a gradient, and a uint8 target (N, H, W).

    For V = 1 a tenth of the pixels is foreground, else all classes are equally frequent.
    """
    N, V, H, W = size
    logits = torch.randn(size, device=device).to(dtype).requires_grad_()
    drawn = torch.rand(N, H, W, device=device)
    return logits, (drawn < 0.1 if V == 1 else (drawn * V).floor()).to(torch.uint8)


def loss_bytes(size: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the fewest bytes that a loss moves: logits read twice, gradient written, target read twice."""
    N, V, H, W = size
    return N * H * W * (3 * V * dtype.itemsize + 2)
