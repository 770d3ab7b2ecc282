"""3x3 convolutions of few channels on CPUs: two pixels of a row at a time, so that 8 outputs fill a vector of 16 lanes.

A pair of neighbouring outputs is one output pixel of a 3x4 convolution with a stride of two columns and twice as many channels;
channels last, its memory is that of the wide map. A third more multiply-adds, in half as many instructions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# vector lanes of fp32
LANES = 16


def _paired(x: Tensor, outputs: int) -> bool:
    # measured: with half of the lanes or less in use it pays (docs/kernels.md)
    return 2 * outputs <= LANES and x.shape[-1] % 2 == 0 and x.is_contiguous(memory_format=torch.channels_last)


def _pair_weight(weight: Tensor) -> Tensor:
    """Makes (2 K, C, 3, 4) of (K, C, 3, 3): the same columns for the left pixel of a pair, and one further for the right."""
    pair = torch.stack([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))]).flatten(0, 1)
    return pair.contiguous(memory_format=torch.channels_last)


def _as_pairs(x: Tensor) -> Tensor:
    """Views channels-last (N, K, H, W) as (N, 2 K, H, W / 2)."""
    N, K, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(N, H, W // 2, 2 * K).permute(0, 3, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gives the convolution without a gradient, by pairs where that is faster; shapes as in `conv3`."""
    if not _paired(x, len(weight)):
        return F.conv2d(x, weight, bias, padding=1)
    N, _, H, W = x.shape
    y = F.conv2d(x, _pair_weight(weight), None if bias is None else bias.repeat(2), stride=(1, 2), padding=1)
    return y.permute(0, 2, 3, 1).reshape(N, H, W, len(weight)).permute(0, 3, 1, 2)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gives the gradients of x and weight, those that are needed, for the gradient (N, K, H, W) of the convolution."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    K, C = weight.shape[:2]
    d_x = d_weight = None
    turned = needs[0] and _paired(grad, C)
    if turned:
        # the convolution's own transpose is a convolution with the kernel turned around
        d_x = convolve(grad, weight.flip(2, 3).transpose(0, 1))
    if needs[1] and _paired(x, K):
        pairs, wide = _as_pairs(grad), _pair_weight(weight)
        _, d_wide, _ = torch.ops.aten.convolution_backward(
            pairs, x, wide, None, [1, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
        )
        left, right = d_wide.view(2, K, C, 3, 4)
        d_weight = left[..., :3] + right[..., 1:]
    rest = (needs[0] and d_x is None, needs[1] and d_weight is None)
    if any(rest):
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*rest, False]
        )
        d_x, d_weight = found[0] if rest[0] else d_x, found[1] if rest[1] else d_weight
    return d_x, d_weight


class _Conv3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return gradients(grad, x, weight, (ctx.needs_input_grad[0], ctx.needs_input_grad[1]))


def conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves (N, C, H, W) with (K, C, 3, 3), zero padding 1: as `torch.nn.functional.conv2d`, once differentiable.

    What is not fp32, autocast, a bias that is learned, and what is faster as it is, goes there.
    """
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, weight, bias, padding=1)
    if not torch.is_grad_enabled():
        return convolve(x, weight, bias)
    if bias is None and (_paired(x, len(weight)) or (x.requires_grad and _paired(x, weight.shape[1]))):
        return _Conv3.apply(x, weight)
    return F.conv2d(x, weight, bias, padding=1)
