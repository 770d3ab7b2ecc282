"""Batch norm and ReLU with few channels on CPUs: rows of 64 numbers hold several pixels, so that vector units are full.

torch's own batch norm takes a scalar path below 16 channels: measured, 8 channels take eight times as long as 16. Here its
passes run over 64 channels, several of which are the same channel. The sums of each pass are combined afterwards.
"""

from typing import Any

import torch
from torch import Tensor

from deepskip.kernels import reference

ROW = 64


def _wide(x: Tensor) -> Tensor:
    """View a channels-last map (N, C, H, W) as (1, 64, rows, 1), channels last."""
    return x.permute(0, 2, 3, 1).reshape(1, -1, 1, ROW).permute(0, 3, 1, 2)


def _repeated(values: Tensor) -> Tensor:
    return values.repeat(ROW // len(values))


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        C = len(weight)
        wide = _wide(x)
        # The statistics of a bf16 map are in bf16, unless running ones in fp32 are updated; those are not kept.
        running = [torch.zeros(ROW) for _ in range(2)] if x.dtype == torch.bfloat16 else [None, None]
        means, variances = torch.ops.aten.batch_norm_update_stats(wide, *running, 0.0)
        mean = means.view(-1, C).mean(0)
        variance = (variances.view(-1, C) + (means.view(-1, C) - mean).square()).mean(0)
        settings = [_repeated(values) for values in (weight, bias, mean, variance)]
        out, _, _ = torch.ops.aten.native_batch_norm(wide, *settings, False, 0.0, eps)
        out.clamp_min_(0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), out)
        ctx.mark_non_differentiable(mean, variance)
        N, _, H, W = x.shape
        return out.permute(0, 2, 3, 1).view(N, H, W, C).permute(0, 3, 1, 2), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, out = ctx.saved_tensors
        C, count = len(weight), x.numel() // len(weight)
        wide = _wide(x)
        g = torch.ops.aten.threshold_backward(_wide(grad), out, 0)
        _, d_weights, d_biases = torch.ops.aten.native_batch_norm_backward(
            g, wide, None, None, None, _repeated(mean), _repeated(inverse), True, 0.0, [False, True, True]
        )
        d_weight, d_bias = d_weights.view(-1, C).sum(0), d_biases.view(-1, C).sum(0)
        # dx = scale (g - mean of g - x_hat * mean of g x_hat)
        scale = weight * inverse
        slope = -scale * inverse * d_weight / count
        shift = -scale * d_bias / count - slope * mean
        channels = (1, ROW, 1, 1)
        # With numbers of bf16 the sum is in fp32, and rounded once.
        in_place = {"out": g} if g.dtype == torch.float32 else {}
        d_x = torch.addcmul(_repeated(shift).view(channels), g, _repeated(scale).view(channels), **in_place)
        d_x.addcmul_(wide, _repeated(slope).view(channels))
        N, _, H, W = x.shape
        return d_x.to(x.dtype).permute(0, 2, 3, 1).view(N, H, W, C).permute(0, 3, 1, 2), d_weight, d_bias, None


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalize a map over all axes but its channels, then apply ReLU; arguments as in `torch.nn.functional.batch_norm`.

    Channels-last maps in fp32 or bf16 with few channels in training take the fast path; others use `reference.batch_norm_relu`.

    Args:
        x: map (N, C, H, W).
        weight: scale (C,).
        bias: shift (C,).
        running_mean: running mean (C,); updated in place in training.
        running_var: running variance (C,); updated in place in training.
        training: whether to use the batch's statistics; else the running ones.
        momentum: weight of the batch's statistics in the running ones.
        eps: added to the variance.

    Returns:
        Map (N, C, H, W).
    """
    narrow = len(weight) < 16 and ROW % len(weight) == 0 and x.numel() % ROW == 0
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if not (training and narrow and channels_last and x.dtype in (torch.float32, torch.bfloat16)):
        return reference.batch_norm_relu(x, weight, bias, running_mean, running_var, training, momentum, eps)
    out: Tensor
    out, mean, variance = _BatchNormReLU.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        count = x.numel() // len(weight)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (count / (count - 1)), momentum)
    return out
