"""3x3 convolutions with few channels on CPUs: two pixels of a row at a time, so that 8 outputs fill a vector of 16 lanes.

A pair of neighboring outputs is one output pixel of a 3x4 convolution with a stride of two columns and twice the channels.
With channels last, its memory is that of the wide map. It takes a third more multiply-adds, in half the instructions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip.kernels import cpu_types

# Vector lanes of fp32.
LANES = 16


def _paired(x: Tensor, outputs: int) -> bool:
    # Measured: pairs pay if at most half of the lanes are in use (docs/kernels.md).
    return 2 * outputs <= LANES and x.shape[-1] % 2 == 0 and x.is_contiguous(memory_format=torch.channels_last)


def _pair_weight(weight: Tensor) -> Tensor:
    """Return the pair weights (2 K, C, 3, 4) of weights (K, C, 3, 3).

    The left pixel of a pair uses columns 0 to 2 of the four, the right pixel columns 1 to 3.
    """
    pair = torch.stack([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))]).flatten(0, 1)
    return pair.contiguous(memory_format=torch.channels_last)


def _as_pairs(x: Tensor) -> Tensor:
    """View a channels-last map (N, K, H, W) as (N, 2 K, H, W / 2)."""
    N, K, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(N, H, W // 2, 2 * K).permute(0, 3, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the forward convolution alone, in pairs of pixels where that is faster.

    Args:
        x: map (N, C, H, W).
        weight: weights (K, C, 3, 3).
        bias: bias (K,), or None.

    Returns:
        Map (N, K, H, W).
    """
    if not _paired(x, len(weight)):
        return F.conv2d(x, weight, bias, padding=1)
    N, _, H, W = x.shape
    y = F.conv2d(x, _pair_weight(weight), None if bias is None else bias.repeat(2), stride=(1, 2), padding=1)
    return y.permute(0, 2, 3, 1).reshape(N, H, W, len(weight)).permute(0, 3, 1, 2)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of a convolution's map and weights.

    Args:
        grad: gradient (N, K, H, W) of the convolution's output.
        x: map (N, C, H, W).
        weight: weights (K, C, 3, 3).
        needs: whether the gradients of x and of weight are needed.

    Returns:
        Gradients of x and weight, in their shapes; None for one that is not needed.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    K, C = weight.shape[:2]
    d_x = d_weight = None
    turned = needs[0] and _paired(grad, C)
    if turned:
        # The transposed convolution is a convolution with the flipped kernel.
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
    """Convolve a map with 3x3 weights and zero padding 1, as `torch.nn.functional.conv2d`; once differentiable.

    Under autocast to bf16 it computes in bf16. Other dtypes than fp32, a learned bias, and shapes that it is faster for use
    `conv2d` itself.

    Args:
        x: map (N, C, H, W).
        weight: weights (K, C, 3, 3).
        bias: bias (K,), or None.

    Returns:
        Map (N, K, H, W).
    """
    dtype = cpu_types.working_type(x)
    if dtype is None:
        return F.conv2d(x, weight, bias, padding=1)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        return convolve(x, weight, bias)
    if bias is None and (_paired(x, len(weight)) or (x.requires_grad and _paired(x, weight.shape[1]))):
        convolved: Tensor = _Conv3.apply(x, weight)  # type: ignore[no-untyped-call]
        return convolved
    return F.conv2d(x, weight, bias, padding=1)
