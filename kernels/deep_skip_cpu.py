"""The deep-skip stage for CPUs (eq. 1): deeper maps are convolved at their own width, and nothing upsampled is kept.

conv3(up(x)) = V(conv(x)): the convolution is 1 x 3 at the low resolution, with s times as many outputs (a phase of the columns
each) for every tap of the rows; V adds up rows and taps as a small matrix product. Multiply-adds fall by the factor s, and the
convolution has 3 s K outputs where the plain one has K, which vector units of 16 lanes do not fill at K = 8. The borders,
where the plain form's convolution meets zeros and its upsampling repeats, are exact.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import conv3_cpu, interpolation, reference


def _wide_weight(weight: Tensor, s: int, mode: str) -> Tensor:
    """Makes (3 s K, C, 1, 3), outputs by row tap, column phase and channel, of (K, C, 3, 3)."""
    K, C = weight.shape[:2]
    columns = interpolation.column_taps(s, mode)
    wide = columns.reshape(s * 3, 3) @ weight.permute(3, 2, 0, 1).reshape(3, 3 * K * C)
    # channels last, as oneDNN takes it
    return wide.view(s, 3, 3, K, C).permute(2, 0, 3, 1, 4).reshape(3 * s * K, 1, 3, C).permute(0, 3, 1, 2)


def _narrow_gradient(wide: Tensor, shape: torch.Size, s: int, mode: str) -> Tensor:
    """The transpose of `_wide_weight`."""
    K, C = shape[:2]
    columns = interpolation.column_taps(s, mode)
    by_column = wide.view(3, s, K, C, 3).permute(1, 4, 0, 2, 3).reshape(s * 3, 3 * K * C)
    return (columns.reshape(s * 3, 3).T @ by_column).view(3, 3, K, C).permute(2, 3, 1, 0)


def _side_weights(weight: Tensor, s: int, w: int, mode: str) -> list[tuple[int, Tensor]]:
    """Gives (column, (C, 3 s K)) for the first and the last column of x: what they add to those of the wide weight.

    There the plain form's upsampling repeats the column, and its convolution meets a zero beyond it.
    """
    K, C = weight.shape[:2]
    exact, inside = interpolation.row_taps(w, s, mode), interpolation.column_taps(s, mode)
    sides = []
    for column in (0, -1) if w > 1 else (0,):
        more = exact[column, :, 1] - inside[:, 1]
        wide = more @ weight.permute(3, 1, 2, 0).reshape(3, C * 3 * K)
        sides.append((column, wide.view(s, C, 3, K).permute(1, 2, 0, 3).reshape(C, 3 * s * K)))
    return sides


def _low_forward(x: Tensor, weight: Tensor, s: int, mode: str) -> Tensor:
    """Gives conv3(up(x)) as (H, N, W, K), contiguous."""
    N, C, h, w = x.shape
    K = len(weight)
    y = F.conv2d(x, _wide_weight(weight, s, mode), padding=(0, 1))
    # a row more above and below: the matrices have zeros there
    rows = y.new_empty(h + 2, 3, N, w, s * K)
    rows[0].zero_()
    rows[-1].zero_()
    inner = rows[1:-1]
    inner.copy_(y.permute(0, 2, 3, 1).view(N, h, w, 3, s * K).permute(1, 3, 0, 2, 4))
    for column, wide in _side_weights(weight, s, w, mode):
        more = x[..., column].permute(2, 0, 1).reshape(h * N, C) @ wide
        inner[..., column, :] += more.view(h, N, 3, s * K).transpose(1, 2)
    row = N * w * s * K
    windows = rows.as_strided((h, 9, row), (3 * row, row, 1))
    return torch.bmm(interpolation.row_taps(h, s, mode).view(h, s, 9), windows).view(h * s, N, w * s, K)


def _low_backward(grad: Tensor, x: Tensor, weight: Tensor, s: int, mode: str, needs: tuple[bool, bool]) -> tuple:
    """Gives the gradients of x and weight for that of the output, (N, K, H, W)."""
    N, C, h, w = x.shape
    K = len(weight)
    row = N * w * s * K
    # s rows more above and below, which the matrices weigh with 0
    rows = grad.new_empty((h + 2) * s, N, w * s, K)
    rows[:s].zero_()
    rows[-s:].zero_()
    rows[s:-s].copy_(grad.permute(2, 0, 3, 1))
    windows = rows.as_strided((h, 3 * s, row), (s * row, row, 1))
    d_rows = torch.bmm(interpolation.gathered_taps(h, s, mode), windows).view(h, 3, N, w, s * K)
    d_y = d_rows.permute(2, 0, 3, 1, 4).reshape(N, h, w, 3 * s * K).permute(0, 3, 1, 2)
    d_x, d_wide, _ = torch.ops.aten.convolution_backward(
        d_y, x, _wide_weight(weight, s, mode), None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1, [*needs, False]
    )
    d_weight = _narrow_gradient(d_wide, weight.shape, s, mode) if needs[1] else None
    exact, inside = interpolation.row_taps(w, s, mode), interpolation.column_taps(s, mode)
    for column, wide in _side_weights(weight, s, w, mode):
        d_more = d_y[..., column].permute(0, 2, 1).reshape(N * h, 3 * s * K)
        if d_x is not None:
            d_x[..., column] += (d_more @ wide.T).view(N, h, C).transpose(1, 2)
        if d_weight is not None:
            x_side = x[..., column].permute(0, 2, 1).reshape(N * h, C)
            d_side = (x_side.T @ d_more).view(C, 3, s, K)
            d_weight += torch.einsum("cdpk,pe->kcde", d_side, exact[column, :, 1] - inside[:, 1])
    return d_x, d_weight


class _DeepSkip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mode: str, *tensors: Tensor) -> Tensor:
        inputs, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        N, _, H, W = inputs[0].shape
        K = len(weights[0])
        ctx.mode = mode
        ctx.save_for_backward(*tensors)
        out = torch.empty((N, K * len(inputs), H, W), memory_format=torch.channels_last)
        for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
            s = H // x.shape[2]
            branch = conv3_cpu.convolve(x, weight) if s == 1 else _low_forward(x, weight, s, mode).permute(1, 3, 0, 2)
            out[:, i * K : (i + 1) * K].copy_(branch)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 2
        inputs, weights = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        K = len(weights[0])
        d_inputs, d_weights = [], []
        for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
            s = grad.shape[2] // x.shape[2]
            needs = (ctx.needs_input_grad[1 + i], ctx.needs_input_grad[1 + count + i])
            part = grad[:, i * K : (i + 1) * K]
            if s == 1:
                d_x, d_weight = conv3_cpu.gradients(part, x, weight, needs)
            else:
                d_x, d_weight = _low_backward(part, x, weight, s, ctx.mode, needs)
            d_inputs.append(d_x)
            d_weights.append(d_weight)
        return None, *d_inputs, *d_weights


def deep_skip(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Concatenates the linear 3x3 convolutions of a decoder level's upsampled inputs (eq. 1): as `reference.deep_skip`.

    Shapes as there; fp32. Other types, factors that are not whole and autocast get the plain form. Once differentiable.
    """
    H, W = inputs[0].shape[-2:]
    whole = all(x.shape[-1] * (H // x.shape[-2]) == W and H % x.shape[-2] == 0 for x in inputs)
    if not whole or inputs[0].dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return reference.deep_skip(inputs, weights, mode)
    return _DeepSkip.apply(mode, *inputs, *weights)
