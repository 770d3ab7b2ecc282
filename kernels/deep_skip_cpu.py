"""The deep-skip stage for CPUs (eq. 1): deeper maps are convolved at their own width, and nothing upsampled is kept.

conv3(up(x)) = V(conv(x)). The convolution is 1 x 3 at the low resolution. For every row tap it has s times the outputs, one set
for each column phase. V adds up rows and taps as a small matrix product. Multiply-adds fall by the factor s. The convolution
has 3 s K outputs instead of K, which at K = 8 would not fill vector units of 16 lanes. The borders are exact: there the plain
convolution meets zeros and its upsampling repeats.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip.kernels import conv3_cpu, cpu_types, interpolation, reference

# The low-resolution weight, and what the first and the last column add to it.
Made = tuple[Tensor, list[tuple[int, Tensor]]]
# Elements of output that are computed at a time; measured.
BLOCK = 2**20


def low_pays(factor: int, channels: int) -> bool:
    """Return whether forward is faster at the low resolution; backward is at every factor. Measured (docs/kernels.md).

    Args:
        factor: upsampling factor of the map.
        channels: outputs K of the branch.
    """
    return factor > 2 or (factor == 2 and channels < conv3_cpu.LANES)


def _wide_weight(weight: Tensor, s: int, mode: str) -> Tensor:
    """Return the low-resolution weight (3 s K, C, 1, 3) of a weight (K, C, 3, 3).

    Its outputs are ordered by row tap, column phase and channel.
    """
    K, C = weight.shape[:2]
    columns = interpolation.column_taps(s, mode)
    wide = columns.reshape(s * 3, 3) @ weight.permute(3, 2, 0, 1).reshape(3, 3 * K * C)
    # Channels last is the layout that oneDNN uses.
    return wide.view(s, 3, 3, K, C).permute(2, 0, 3, 1, 4).reshape(3 * s * K, 1, 3, C).permute(0, 3, 1, 2)


def _narrow_gradient(wide: Tensor, shape: torch.Size, s: int, mode: str) -> Tensor:
    """Return the gradient (K, C, 3, 3) of a weight from that of its wide weight: the transpose of `_wide_weight`."""
    K, C = shape[:2]
    columns = interpolation.column_taps(s, mode)
    by_column = wide.view(3, s, K, C, 3).permute(1, 4, 0, 2, 3).reshape(s * 3, 3 * K * C)
    return (columns.reshape(s * 3, 3).T @ by_column).view(3, 3, K, C).permute(2, 3, 1, 0)


def _side_taps(s: int, w: int, column: int, mode: str) -> Tensor:
    return interpolation.row_taps(w, s, mode)[column, :, 1] - interpolation.column_taps(s, mode)[:, 1]


def _side_weights(weight: Tensor, s: int, w: int, mode: str) -> list[tuple[int, Tensor]]:
    """Return (column, (C, 3 s K)) for the first and the last column of x: what they add to the wide weight's outputs.

    There the plain upsampling repeats the column, and the plain convolution meets a zero beyond it.
    """
    K, C = weight.shape[:2]
    sides = []
    for column in (0, -1) if w > 1 else (0,):
        wide = _side_taps(s, w, column, mode) @ weight.permute(3, 1, 2, 0).reshape(3, C * 3 * K)
        sides.append((column, wide.view(s, C, 3, K).permute(1, 2, 0, 3).reshape(C, 3 * s * K)))
    return sides


def _made(weight: Tensor, s: int, w: int, mode: str, dtype: torch.dtype) -> Made:
    """Return the low-resolution weight and its sides, computed in the weight's own type."""
    sides = _side_weights(weight, s, w, mode)
    return _wide_weight(weight, s, mode).to(dtype), [(column, side.to(dtype)) for column, side in sides]


class _Low:
    """A deeper map convolved at its own resolution, then upsampled a block of samples at a time."""

    def __init__(self, x: Tensor, weight: Tensor, s: int, mode: str, block: int) -> None:
        N, C, h, w = x.shape
        K = len(weight)
        self.size = h * s, block, w * s, K
        self.made = _made(weight, s, w, mode, x.dtype)
        y = F.conv2d(x, self.made[0], padding=(0, 1))
        self.y = y.permute(0, 2, 3, 1).view(N, h, w, 3, s * K)
        for column, wide in self.made[1]:
            more = x[..., column].permute(0, 2, 1).reshape(N * h, C) @ wide
            self.y[:, :, column] += more.view(N, h, 3, s * K)
        # Rows of all samples of the block are contiguous, with one more above and below, where the matrices have zeros.
        rows = y.new_zeros(h + 2, 3, block, w, s * K)
        row = block * w * s * K
        self.inner, self.windows = rows[1:-1], rows.as_strided((h, 9, row), (3 * row, row, 1))
        # Weights of interpolation are the same numbers in bf16.
        self.taps = interpolation.row_taps(h, s, mode).view(h, s, 9).to(x.dtype)
        self.out = y.new_empty(h, s, row)

    def branch(self, samples: slice) -> Tensor:
        """Return conv3(up(x)) of a block as (samples, H, W, K); the next call overwrites it.

        Args:
            samples: samples of the block.
        """
        cpu_types.copy(self.inner, self.y[samples].permute(1, 3, 0, 2, 4))
        torch.bmm(self.taps, self.windows, out=self.out)
        return self.out.view(self.size).transpose(0, 1)


class _Plain:
    """A map of the output's own size, or one that the plain implementation is faster for."""

    def __init__(self, x: Tensor, weight: Tensor, size: torch.Size, mode: str) -> None:
        x = x if x.shape[-2:] == size else reference.upsample(x, size, mode)
        self.out = conv3_cpu.convolve(x, weight.to(x.dtype)).permute(0, 2, 3, 1)

    def branch(self, samples: slice) -> Tensor:
        """Return the branch of a block as (samples, H, W, K).

        Args:
            samples: samples of the block.
        """
        return self.out[samples]


class _LowGradient:
    """The gradients of a deeper map: a block of samples at a time to the low resolution, then through the convolution."""

    def __init__(self, x: Tensor, weight: Tensor, s: int, mode: str, block: int, made: Made | None) -> None:
        N, _, h, w = x.shape
        K = len(weight)
        self.x, self.weight, self.s, self.mode = x, weight, s, mode
        self.made = made or _made(weight, s, w, mode, x.dtype)
        # There are s more rows above and below, which the matrices multiply by 0.
        rows = x.new_zeros((h + 2) * s, block, w * s, K)
        row = block * w * s * K
        self.inner, self.windows = rows[s:-s], rows.as_strided((h, 3 * s, row), (s * row, row, 1))
        self.taps = interpolation.gathered_taps(h, s, mode).to(x.dtype)
        self.out = x.new_empty(h, 3, row)
        self.d_y = x.new_empty(N, h, w, 3, s * K)

    def take(self, samples: slice, grad: Tensor) -> None:
        """Convert a block's gradient to the gradient of the low-resolution convolution's output.

        Args:
            samples: samples of the block.
            grad: gradient (samples, H, W, K).
        """
        _, h, w, _, wide = self.d_y.shape
        cpu_types.copy(self.inner, grad.transpose(0, 1))
        torch.bmm(self.taps, self.windows, out=self.out)
        cpu_types.copy(self.d_y[samples], self.out.view(h, 3, -1, w, wide).permute(2, 0, 3, 1, 4))

    def gradients(self, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of x and weight.

        Args:
            needs: whether each of the two is needed.

        Returns:
            Gradients (N, C, h, w) and (K, C, 3, 3); None for one that is not needed.
        """
        x, weight, s, mode = self.x, self.weight, self.s, self.mode
        N, C, h, w = x.shape
        K = len(weight)
        d_y = self.d_y.view(N, h, w, 3 * s * K).permute(0, 3, 1, 2)
        d_x, d_wide, _ = torch.ops.aten.convolution_backward(
            d_y, x, self.made[0], None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1, [*needs, False]
        )
        d_weight = _narrow_gradient(d_wide.to(weight.dtype), weight.shape, s, mode) if needs[1] else None
        for column, wide in self.made[1]:
            d_more = d_y[..., column].permute(0, 2, 1).reshape(N * h, 3 * s * K)
            if d_x is not None:
                d_x[..., column] += (d_more @ wide.T).view(N, h, C).transpose(1, 2)
            if d_weight is not None:
                x_side = x[..., column].permute(0, 2, 1).reshape(N * h, C)
                d_side = (x_side.T @ d_more).to(weight.dtype).view(C, 3, s, K)
                d_weight += torch.einsum("cdpk,pe->kcde", d_side, _side_taps(s, w, column, mode))
        return d_x, d_weight


class _PlainGradient:
    """The gradients of a map of the output's own size."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        N, _, H, W = x.shape
        self.x, self.weight = x, weight
        self.grad = x.new_empty(N, H, W, len(weight))

    def take(self, samples: slice, grad: Tensor) -> None:
        """Keep a block's gradient.

        Args:
            samples: samples of the block.
            grad: gradient (samples, H, W, K).
        """
        cpu_types.copy(self.grad[samples], grad)

    def gradients(self, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of x and weight.

        Args:
            needs: whether each of the two is needed.

        Returns:
            Gradients (N, C, H, W) and (K, C, 3, 3); None for one that is not needed.
        """
        weight = self.weight.to(self.x.dtype)
        d_x, d_weight = conv3_cpu.gradients(self.grad.permute(0, 3, 1, 2), self.x, weight, needs)
        return d_x, None if d_weight is None else d_weight.to(self.weight.dtype)


def _block(N: int, elements: int) -> int:
    """Return how many samples of that many elements to compute at a time: a divisor of N."""
    return next(n for n in range(min(N, max(1, BLOCK // elements)), 0, -1) if N % n == 0)


class _DeepSkip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mode: str, *tensors: Tensor) -> Tensor:
        inputs, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        N, _, H, W = inputs[0].shape
        K = len(weights[0])
        ctx.mode = mode
        ctx.save_for_backward(*tensors)
        # Branches of a few samples stay in the cache until they are concatenated.
        block = _block(N, H * W * K * len(inputs))
        branches: list[_Low | _Plain] = []
        for x, weight in zip(inputs, weights, strict=True):
            s = H // x.shape[2]
            low = low_pays(s, K)
            branches.append(_Low(x, weight, s, mode, block) if low else _Plain(x, weight, inputs[0].shape[-2:], mode))
        # These are small and depend on the weights only, so backward reuses them.
        ctx.made = [one.made if isinstance(one, _Low) else None for one in branches]
        out = inputs[0].new_empty(N, H, W, len(inputs), K)
        for n in range(0, N, block):
            samples = slice(n, n + block)
            into, *parts = cpu_types.wide(out[samples], *(one.branch(samples) for one in branches))
            torch.stack(parts, 3, out=into)
        return out.view(N, H, W, -1).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 2
        inputs, weights = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        N, channels, H, W = grad.shape
        grad = grad.permute(0, 2, 3, 1).view(N, H, W, count, -1)
        block = _block(N, channels * H * W)
        ways: list[_LowGradient | _PlainGradient] = []
        for x, weight, made in zip(inputs, weights, ctx.made, strict=True):
            s = H // x.shape[2]
            ways.append(_PlainGradient(x, weight) if s == 1 else _LowGradient(x, weight, s, ctx.mode, block, made))
        for n in range(0, N, block):
            samples = slice(n, n + block)
            for i, way in enumerate(ways):
                way.take(samples, grad[samples, :, :, i])
        needs = ctx.needs_input_grad[1 : 1 + count], ctx.needs_input_grad[1 + count :]
        found = [way.gradients((x, weight)) for way, x, weight in zip(ways, *needs, strict=True)]
        return None, *(d_x for d_x, _ in found), *(d_weight for _, d_weight in found)


def deep_skip(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Concatenate the linear 3x3 convolutions of a decoder level's upsampled inputs (eq. 1), as `reference.deep_skip`.

    It is once differentiable. Under autocast to bf16 it computes in bf16, with the weights' sums in fp32. Other dtypes than
    fp32, factors that are not whole, and levels that the plain implementation is faster for use the latter.

    Args:
        inputs: the level's own map (N, C_0, H, W) first, then deeper maps (N, C_i, H / s_i, W / s_i).
        weights: a weight (K, C_i, 3, 3) for each map.
        mode: upsampling, "bilinear" (align_corners=False) or "nearest".

    Returns:
        Map (N, K * len(inputs), H, W).
    """
    H, W = inputs[0].shape[-2:]
    whole = all(x.shape[-1] * (H // x.shape[-2]) == W and H % x.shape[-2] == 0 for x in inputs)
    low = whole and any(low_pays(H // x.shape[-2], len(weights[0])) for x in inputs)
    dtype = cpu_types.working_type(inputs[0])
    if not low or dtype is None:
        return reference.deep_skip(inputs, weights, mode)
    # The sums of weights are computed in the weights' own type.
    with torch.autocast("cpu", enabled=False):
        joined: Tensor = _DeepSkip.apply(mode, *(x.to(dtype) for x in inputs), *weights)  # type: ignore[no-untyped-call]
    return joined
