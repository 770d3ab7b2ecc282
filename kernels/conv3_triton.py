"""3x3 convolutions with few channels in Triton, with the sums that batch norm needs.

    y[Y, X, k] = sum_{d, e, c} x[Y + d, X + e, c] W[k, c, d, e] + bias[k],   zeros beyond the border
A convolution with 8 channels is memory-bound, and a library's tiles of 64 and more channels are mostly empty. Here a window of
neighboring pixels, whose channels are contiguous, is the depth of a matrix product, and each row of x is loaded once for three
rows of y. It is the case s = 1 of the sub-pixel stage and runs in its kernels (`subpixel_triton`).

If sums are requested, each program writes the sum and the sum of squares of its outputs, in fp32, to its own row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepskip.kernels import reference, subpixel_gradients_triton, subpixel_tables, subpixel_triton
from deepskip.kernels.bce_dice_triton import must_run, no_second_backward
from deepskip.kernels.subpixel import MOST_INPUTS, MOST_OUTPUTS, _as, _last, _like, low_precision
from deepskip.kernels.subpixel_tables import is_last


def _shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return x.shape[0], weight.shape[0], x.shape[2], x.shape[3]


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, sums: Tensor | None) -> Tensor:
    y = _like(x, _shape(x, weight), True)
    if not y.numel():
        return _as(y, is_last(x))
    matrices = subpixel_tables.expanded([weight], [1], "nearest", x.dtype)
    subpixel_triton.launch_stage(y, [_last(x)], matrices, [], [0], "nearest", bias, sums)
    return _as(y, is_last(x))


@torch.library.custom_op("deepskip::conv3", mutates_args=())
def _conv3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _launch(x, weight, None if bias is None else bias.contiguous(), None)


@_conv3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _like(x, _shape(x, weight), is_last(x))


def _rows_of(x: Tensor, weight: Tensor) -> Tensor:
    N, K, H, W = _shape(x, weight)
    count = subpixel_triton.programs_of(N, x.shape[1], K, H, W, x.dtype) if x.numel() else 0
    return x.new_empty(count, 2, K, dtype=torch.float32)


@torch.library.custom_op("deepskip::conv3_with_sums", mutates_args=())
def _conv3_with_sums(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows_of(x, weight)
    return _launch(x, weight, None, rows), rows


@_conv3_with_sums.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x, _shape(x, weight), is_last(x)), _rows_of(x, weight)


def _gradient_tensors(x: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    made = [_like(x, x.shape, is_last(x))] if needs[0] else []
    return made + ([_like(weight, weight.shape, is_last(weight) and not weight.is_contiguous())] if needs[1] else [])


@torch.library.custom_op("deepskip::conv3_gradients", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    made = _gradient_tensors(x, weight, needs)
    grad = _last(grad)
    if needs[0]:
        dx = made[0] if is_last(made[0]) else _like(x, x.shape, True)
        if dx.numel():
            matrices = subpixel_tables.expanded([weight], [1], "nearest", grad.dtype)
            subpixel_gradients_triton.launch_map_gradients(grad, [dx], matrices, [], [0], "nearest")
        made[0] = _as(dx, is_last(made[0]))
    if needs[1]:
        subpixel_gradients_triton.launch_weight_gradients(grad, [_last(x)], made[-1:], [0], "nearest")
    return made


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    return _gradient_tensors(x, weight, needs)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, *bias = inputs
    ctx.needs = [x.requires_grad, weight.requires_grad]
    ctx.bias = bias[0] is not None and bias[0].requires_grad if bias else None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor | None, rows_grad: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if rows_grad is not None:
        raise RuntimeError("the sums of conv3_with_sums have no gradient; differentiate through its first output")
    x, weight = ctx.saved_tensors
    found: list[Tensor | None] = [None, None]
    if grad is not None and any(ctx.needs):
        made = _gradients(grad, x, weight, ctx.needs)
        found = [made.pop(0) if asked else None for asked in ctx.needs]
    if ctx.bias is None:
        return tuple(found)
    return *found, grad.sum((0, 2, 3)) if ctx.bias and grad is not None else None


_conv3.register_autograd(_backward, setup_context=_keep)
_conv3_with_sums.register_autograd(_backward, setup_context=_keep)
_gradients.register_autograd(no_second_backward, setup_context=lambda ctx, inputs, output: None)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether a convolution has few enough channels for these launches, and is not in fp64.

    Args:
        x: map (N, C, H, W).
        weight: weights (K, C, 3, 3).
    """
    return weight.shape[0] <= MOST_OUTPUTS and weight.shape[1] <= MOST_INPUTS and x.dtype != torch.float64


def conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve a map with 3x3 weights and zero padding 1.

    Args:
        x: map (N, C, H, W), fp32, fp16 or bf16; channels last is fast, contiguous is copied.
        weight: weights (K, C, 3, 3), any float dtype; K over 16, C over 80 or fp64 maps use the plain implementation.
        bias: bias (K,), or None.

    Returns:
        Map (N, K, H, W) in the layout of x, and in its dtype or autocast's.

    Raises:
        ValueError: if the tensors are on a CPU.
        RuntimeError: if a second derivative is computed.
    """
    must_run(x)
    if not takes(x, weight):
        return reference.conv3(x, weight, bias)
    y: Tensor = _conv3(x.to(low_precision(x)), weight, bias)
    return y


def conv3_with_sums(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve as `conv3`, and return the sums that batch norm needs.

    Args:
        x: map (N, C, H, W), as in `conv3`.
        weight: weights (K, C, 3, 3), K up to 16 and C up to 80.

    Returns:
        Map (N, K, H, W), and rows (programs, 2, K) fp32: the sum and the sum of squares of each program's outputs, before they
        are rounded. Add the rows up over programs in fp64. They have no gradient.

    Raises:
        ValueError: if the tensors are on a CPU, or there are too many channels.
        RuntimeError: if a second derivative is computed.
    """
    must_run(x)
    if not takes(x, weight):
        K, C = weight.shape[:2]
        raise ValueError(
            f"the weight has {K} output and {C} input channels; the limits are {MOST_OUTPUTS} and {MOST_INPUTS}"
        )
    y_and_rows: tuple[Tensor, Tensor] = _conv3_with_sums(x.to(low_precision(x)), weight)
    return y_and_rows
