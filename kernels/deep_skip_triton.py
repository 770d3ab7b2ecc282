"""The deep-skip stage in Triton (eq. 1): deeper maps are multiplied at their own resolution, and nothing upsampled is stored.

conv3(up(x)) is linear twice over: out = A(x W). W mixes channels: (C, 9 K), all nine taps of the convolution side by side. It
is a matrix product at the low resolution, with 1 / s^2 of the plain implementation's multiply-adds. A has no weights: each
output is a mean of low-resolution taps, by upsampling, the shift of the tap, and zeros beyond the border:
    out[Y, X, k] = sum_{d, e, y, x} a(Y + d, y) a(X + e, x) (x W)[y, x, d, e, k],   d and e in -1, 0, 1
with a(U, y) the weight of row y of a map in row U of the upsampled one, 0 where U is outside. Backward computes G = A^T g at
the low resolution, and the gradients are the matrix products G W^T and x^T G.

The kernels are A and A^T for all branches of a level in one launch, ordered so that programs that write, or read, the same
pixels' channels run at the same time. Rows are summed with scalar weights, columns by the matrix units: a(X + e, x) is computed
where it is needed, and its values for factors up to 64 are exact in bf16. Each program sums in fp32, in a fixed order, outputs
that no other program writes. The level's own map is convolved by cuDNN and concatenated with the others.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from deepskip.kernels import backend, reference
from deepskip.kernels.bce_dice_triton import INTERPRETED, must_run, no_second_backward

# Columns of the level's own map that a program copies to the output.
OWN_COLUMNS = 128
# Networks have at most 6 levels, which need no larger factor.
FACTORS = (2, 4, 8, 16)


class Shape(NamedTuple):
    """The tile of a program.

    Attributes:
        window: columns of a map that the program reads, two more than it owns.
        channels: channels of the program.
        warps: warps of the program.
    """

    window: int
    channels: int
    warps: int


# Shapes by the deepest map's factor, forward and backward: the fastest on an H100 of those that do not spill registers
# (kernels.bench.builds). Those for factor 16 are not timed.
HALF = {
    2: (Shape(8, 32, 2), Shape(8, 32, 1)),
    4: (Shape(8, 16, 2), Shape(8, 16, 1)),
    8: (Shape(8, 8, 2), Shape(8, 8, 1)),
    16: (Shape(8, 8, 4), Shape(8, 8, 1)),
}
SINGLE = {
    2: (Shape(8, 32, 2), Shape(8, 32, 2)),
    4: (Shape(8, 16, 2), Shape(8, 16, 2)),
    8: (Shape(4, 8, 2), Shape(8, 8, 2)),
    16: (Shape(4, 8, 8), Shape(8, 8, 4)),
}


class Plan(NamedTuple):
    """How a launch is divided into stripes: as many rows of output as one row of the deepest map covers.

    Attributes:
        stripe: rows of output of a stripe.
        blocks: programs of a stripe by branch, the level's own map first.
        window: as in `Shape`.
        channels: as in `Shape`.
        warps: as in `Shape`.
    """

    stripe: int
    blocks: tuple[int, ...]
    window: int
    channels: int
    warps: int


def plan(W: int, factors: Sequence[int], K: int, dtype: torch.dtype, backward: bool) -> Plan:
    """Divide rows of outputs among programs.

    Args:
        W: columns of the output.
        factors: factor of each deeper map.
        K: channels of a branch.
        dtype: dtype of the output.
        backward: whether the launch is the gradient.
    """
    stripe = max(factors)
    window, channels, warps = (SINGLE if dtype == torch.float32 else HALF)[stripe][backward]
    # A forward program computes all rows of a stripe, a backward one a row of the map.
    rows = [stripe // s if backward else 1 for s in factors]
    blocks = [r * triton.cdiv(W // s, window - 2) for s, r in zip(factors, rows, strict=True)]
    # A matrix product needs 8 columns or more.
    channels = min(max(triton.next_power_of_2(K), 8), channels)
    return Plan(stripe, (triton.cdiv(W, OWN_COLUMNS), *blocks), window, channels, warps)


@triton.jit
def _weight(u, cell, size, FACTOR: tl.constexpr, BILINEAR: tl.constexpr):
    # The weight of a map's row `cell` in row u of the upsampled map; align_corners=False.
    if BILINEAR:
        source = tl.minimum(tl.maximum((u + 0.5) / FACTOR - 0.5, 0.0), size - 1.0)
        weight = tl.maximum(1.0 - tl.abs(source - cell), 0.0)
    else:
        weight = tl.where(u // FACTOR == cell, 1.0, 0.0)
    return tl.where((u >= 0) & (u < size * FACTOR), weight, 0.0)


@triton.jit
def _row_of_taps(tiles, y, h, U: tl.constexpr, d: tl.constexpr, FACTOR: tl.constexpr, BILINEAR: tl.constexpr):
    # Tap d of the upsampled map's row U - 1, counted from row y of the map; zero beyond the border.
    on = 1.0
    if U == 0:
        on = tl.where(y > 0, 1.0, 0.0)
    if U == FACTOR + 1:
        on = tl.where(y < h - 1, 1.0, 0.0)
    if BILINEAR:
        # The row lies PLACE / (2 FACTOR) rows below the row above y.
        PLACE: tl.constexpr = 2 * U - 1 + FACTOR
        LOW: tl.constexpr = PLACE // (2 * FACTOR)
        PART: tl.constexpr = PLACE / (2 * FACTOR) - PLACE // (2 * FACTOR)
        above, below = tiles[3 * LOW + d].to(tl.float32), tiles[3 * LOW + 3 + d].to(tl.float32)
        row = (on * (1.0 - PART)) * above + (on * PART) * below
    else:
        SAME: tl.constexpr = (U - 1 + FACTOR) // FACTOR
        row = on * tiles[3 * SAME + d].to(tl.float32)
    return row


@triton.jit
def spread_map(
    t_ptr, out_ptr, Y0, block, k, H, W, x_step, c_step, K: tl.constexpr,
    turns, FACTOR: tl.constexpr, WINDOW: tl.constexpr, BILINEAR: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a branch's outputs in a stripe from a map's taps: A of the module's head."""
    h, w = H // FACTOR, W // FACTOR
    cell = block * (WINDOW - 2)
    # Taps of the columns side by side, three and a spare. A window has one column more on either side.
    r = tl.arange(0, 4 * WINDOW)
    column, e = cell - 1 + r % WINDOW, r // WINDOW
    inside = (e < 3) & (column >= 0) & (column < w)
    X = cell * FACTOR + tl.arange(0, FACTOR * WINDOW)
    columns = _weight(X[:, None] + e[None, :] - 1, column[None, :], w, FACTOR, BILINEAR)
    columns = tl.where(inside[None, :], columns, 0.0).to(OPERAND)
    taps = column[:, None] * (9 * K) + e[:, None] * K + k[None, :]
    is_tap = inside[:, None] & (k < K)[None, :]
    outputs = X[:, None] * x_step + k[None, :] * c_step
    end = tl.minimum((cell + WINDOW - 2) * FACTOR, W)
    is_output = (end > X)[:, None] & (k < K)[None, :]
    out_ptr += Y0.to(tl.int64) * W * x_step
    for i in range(turns):
        y = Y0 // FACTOR + i
        # FACTOR rows of output use the same nine taps: those of a row and its two neighbors, repeated beyond the border.
        here = t_ptr + y.to(tl.int64) * w * (9 * K) + taps
        above = here - tl.where(y > 0, w * (9 * K), 0)
        below = here + tl.where(y < h - 1, w * (9 * K), 0)
        tiles = (
            tl.load(above, mask=is_tap, other=0.0),
            tl.load(above + 3 * K, mask=is_tap, other=0.0),
            tl.load(above + 6 * K, mask=is_tap, other=0.0),
            tl.load(here, mask=is_tap, other=0.0),
            tl.load(here + 3 * K, mask=is_tap, other=0.0),
            tl.load(here + 6 * K, mask=is_tap, other=0.0),
            tl.load(below, mask=is_tap, other=0.0),
            tl.load(below + 3 * K, mask=is_tap, other=0.0),
            tl.load(below + 6 * K, mask=is_tap, other=0.0),
        )
        for q in tl.static_range(FACTOR):
            rows = tl.zeros((4 * WINDOW, k.shape[0]), tl.float32)
            for d in tl.static_range(3):
                rows += _row_of_taps(tiles, y, h, q + d, d, FACTOR, BILINEAR)
            out = tl.dot(columns, rows.to(OPERAND), input_precision=PRECISION)
            tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=is_output)
            out_ptr += W * x_step


@triton.jit
def gather_map(
    g_ptr, t_ptr, Y0, block, k, H, W, x_step, c_step, K: tl.constexpr,
    turns, FACTOR: tl.constexpr, WINDOW: tl.constexpr, BILINEAR: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a row of a map's taps from that of the outputs: A^T of the module's head."""
    h, w = H // FACTOR, W // FACTOR
    # A program takes one row of the map; the programs of a stripe cover all of its rows.
    y = Y0 // FACTOR + block % turns
    cell = block // turns * (WINDOW - 2)
    r = tl.arange(0, 4 * WINDOW)
    column, e = cell + r % WINDOW, r // WINDOW
    mine = (e < 3) & (r % WINDOW < WINDOW - 2) & (column < w)
    # All outputs that the program's columns contribute to: one cell more on either side.
    X = (cell - 1) * FACTOR + tl.arange(0, FACTOR * WINDOW)
    inside = (X >= 0) & (X < W)
    columns = _weight(X[None, :] + e[:, None] - 1, column[:, None], w, FACTOR, BILINEAR)
    columns = tl.where(inside[None, :] & mine[:, None], columns, 0.0).to(OPERAND)
    outputs = X[:, None] * x_step + k[None, :] * c_step
    is_output = inside[:, None] & (k < K)[None, :]
    above = tl.zeros((4 * WINDOW, k.shape[0]), tl.float32)
    same = tl.zeros((4 * WINDOW, k.shape[0]), tl.float32)
    below = tl.zeros((4 * WINDOW, k.shape[0]), tl.float32)
    # The rows of output that a row of the map contributes to.
    start = tl.maximum(y * FACTOR - FACTOR // 2 - 1, 0)
    end = tl.minimum(y * FACTOR + FACTOR + FACTOR // 2 + 1, H)
    for i in range(end - start):
        Y = start + i
        g = tl.load(g_ptr + Y.to(tl.int64) * W * x_step + outputs, mask=is_output, other=0.0)
        taps = tl.dot(columns, g.to(OPERAND), input_precision=PRECISION)
        above += _weight(Y - 1, y, h, FACTOR, BILINEAR) * taps
        same += _weight(Y, y, h, FACTOR, BILINEAR) * taps
        below += _weight(Y + 1, y, h, FACTOR, BILINEAR) * taps
    to = t_ptr + y.to(tl.int64) * w * (9 * K) + column[:, None] * (9 * K) + e[:, None] * K + k[None, :]
    mask = mine[:, None] & (k < K)[None, :]
    tl.store(to, above.to(t_ptr.dtype.element_ty), mask=mask)
    tl.store(to + 3 * K, same.to(t_ptr.dtype.element_ty), mask=mask)
    tl.store(to + 6 * K, below.to(t_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy(
    from_ptr, to_ptr, Y0, block, k, W, from_step, to_step, c_step, K: tl.constexpr,
    STRIPE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    X = block * COLUMNS + tl.arange(0, COLUMNS)
    mask = (X < W)[:, None] & (k < K)[None, :]
    from_ptr += Y0.to(tl.int64) * W * from_step + X[:, None] * from_step + k[None, :] * c_step
    to_ptr += Y0.to(tl.int64) * W * to_step + X[:, None] * to_step + k[None, :] * c_step
    for _ in range(STRIPE):
        tl.store(to_ptr, tl.load(from_ptr, mask=mask), mask=mask)
        from_ptr += W * from_step
        to_ptr += W * to_step


@triton.jit
def _branches(
    wide_ptr, own_ptr, maps, blocks, per_stripe, H, W, K: tl.constexpr,
    FACTORS: tl.constexpr, WINDOW: tl.constexpr, STRIPE: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    LAST: tl.constexpr, BILINEAR: tl.constexpr, BACKWARD: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % per_stripe
    # Rows of all images are numbered through. The deepest map's factor divides H, so a stripe holds rows of one image.
    row = (tl.program_id(0) // per_stripe).to(tl.int64) * STRIPE
    n, Y0 = row // H, (row % H).to(tl.int32)
    k = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pixels = H.to(tl.int64) * W
    # Strides of columns and of channels: channels last, or contiguous.
    x_step = (len(FACTORS) + 1) * K if LAST else 1
    own_step = K if LAST else 1
    c_step = 1 if LAST else pixels
    wide_ptr += n * pixels * ((len(FACTORS) + 1) * K)
    if block < blocks[0]:
        own = own_ptr + n * pixels * K
        if BACKWARD:
            _copy(wide_ptr, own, Y0, block, k, W, x_step, own_step, c_step, K, STRIPE, COLUMNS)
        else:
            _copy(own, wide_ptr, Y0, block, k, W, own_step, x_step, c_step, K, STRIPE, COLUMNS)
    start = blocks[0]
    for j in tl.static_range(len(FACTORS)):
        if (block >= start) & (block < start + blocks[j + 1]):
            wide = wide_ptr + (j + 1) * K * c_step
            taps = maps[j] + n * (pixels // (FACTORS[j] * FACTORS[j])) * (9 * K)
            if BACKWARD:
                gather_map(
                    wide, taps, Y0, block - start, k, H, W, x_step, c_step, K,
                    STRIPE // FACTORS[j], FACTORS[j], WINDOW, BILINEAR, OPERAND, PRECISION,
                )  # fmt: skip
            else:
                spread_map(
                    taps, wide, Y0, block - start, k, H, W, x_step, c_step, K,
                    STRIPE // FACTORS[j], FACTORS[j], WINDOW, BILINEAR, OPERAND, PRECISION,
                )  # fmt: skip
        start += blocks[j + 1]


def _launch(wide: Tensor, own: Tensor, maps: Sequence[Tensor], last: bool, mode: str, backward: bool) -> None:
    """Launch A (own, maps -> wide), or its transpose if backward.

    wide and own are channels last or contiguous; maps are (N, h, w, 9 K).
    """
    N, K, H, W = own.shape
    if not own.numel():
        return
    factors = tuple(H // x.shape[1] for x in maps)
    cut = plan(W, factors, K, own.dtype, backward)
    # The interpreter computes bf16 wrongly. Three products of tf32 are as exact as one of fp32.
    operand = getattr(tl, "float32" if INTERPRETED else str(own.dtype).removeprefix("torch."))
    with backend.device_of(own):
        _branches[(N * H // cut.stripe * sum(cut.blocks), triton.cdiv(K, cut.channels))](
            wide, own, tuple(maps), cut.blocks, sum(cut.blocks), H, W, K,
            FACTORS=factors, WINDOW=cut.window, STRIPE=cut.stripe, COLUMNS=OWN_COLUMNS, CHANNELS=cut.channels,
            LAST=last, BILINEAR=mode == "bilinear", BACKWARD=backward, OPERAND=operand, PRECISION="tf32x3",
            num_warps=cut.warps,
        )  # fmt: skip


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _like(x: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


@torch.library.custom_op("deepskip::spread_taps", mutates_args=())
def _spread(own: Tensor, taps: Sequence[Tensor], mode: str) -> Tensor:
    N, K, H, W = own.shape
    last = _is_last(own)
    wide = _like(own, (N, K * (len(taps) + 1), H, W), last)
    _launch(wide, own if last else own.contiguous(), [x.contiguous() for x in taps], last, mode, backward=False)
    return wide


@_spread.register_fake
def _(own: Tensor, taps: Sequence[Tensor], mode: str) -> Tensor:
    N, K, H, W = own.shape
    return _like(own, (N, K * (len(taps) + 1), H, W), _is_last(own))


def _taps_type(dtype: torch.dtype) -> torch.dtype:
    # A tap's gradient is the sum of s^2 gradients: 256 of them exceed fp16's 65,504 if each is 256.
    return torch.float32 if dtype == torch.float16 else dtype


def _gradients(grad: Tensor, factors: Sequence[int]) -> list[Tensor]:
    N, channels, H, W = grad.shape
    K = channels // (len(factors) + 1)
    maps = [grad.new_empty(N, H // s, W // s, 9 * K, dtype=_taps_type(grad.dtype)) for s in factors]
    return [_like(grad, (N, K, H, W), _is_last(grad)), *maps]


@torch.library.custom_op("deepskip::gather_taps", mutates_args=())
def _gather(grad: Tensor, factors: Sequence[int], mode: str) -> list[Tensor]:
    last = _is_last(grad)
    own, *taps = _gradients(grad, factors)
    _launch(grad if last else grad.contiguous(), own, taps, last, mode, backward=True)
    return [own, *taps]


@_gather.register_fake
def _(grad: Tensor, factors: Sequence[int], mode: str) -> list[Tensor]:
    return _gradients(grad, factors)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    own, taps, ctx.mode = inputs
    ctx.factors = [own.shape[2] // x.shape[1] for x in taps]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    own, *taps = _gather(grad, ctx.factors, ctx.mode)
    return own, taps, None


_spread.register_autograd(_backward, setup_context=_keep)
_gather.register_autograd(no_second_backward, setup_context=lambda ctx, inputs, output: None)


def factors_of(inputs: Sequence[Tensor]) -> list[int] | None:
    """Return by how much each map is smaller than the first, or None if a factor is not supported.

    Args:
        inputs: maps (N, C_i, H_i, W_i), the level's own first.

    Returns:
        Factors, 1 first; None if a deeper map is not smaller by 2, 4, 8 or 16 in both directions.
    """
    H, W = inputs[0].shape[-2:]
    found = [1]
    for x in inputs[1:]:
        s = H // x.shape[2]
        if s not in FACTORS or (x.shape[2] * s, x.shape[3] * s) != (H, W):
            return None
        found.append(s)
    return found


def taps_of(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute all nine taps of a map's convolution.

    Args:
        x: map (N, C, h, w).
        weight: weights (K, C, 3, 3).
        dtype: dtype of the stage's output.

    Returns:
        Taps (N, h, w, 9 K); fp32 for a dtype of fp16, whose gradients could overflow.
    """
    half = dtype == torch.float16
    # Autocast would convert the taps to fp16 again. The meta device has no autocast.
    with torch.autocast(x.device.type, enabled=False) if half and not x.is_meta else nullcontext():
        x_NHWC, mixed = x.permute(0, 2, 3, 1), weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])
        return F.linear(x_NHWC.float(), mixed.float()) if half else F.linear(x_NHWC, mixed)


def deep_skip(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Concatenate the linear 3x3 convolutions of a decoder level's upsampled inputs (eq. 1), as `reference.deep_skip`.

    Args:
        inputs: the level's own map (N, C_0, H, W) first, then deeper maps (N, C_i, H / s_i, W / s_i); fp32, fp16 or bf16,
            channels last or contiguous. If one is not smaller by 2, 4, 8 or 16 in both directions, the plain implementation
            is used.
        weights: a weight (K, C_i, 3, 3) for each map.
        mode: upsampling, "bilinear" (align_corners=False) or "nearest".

    Returns:
        Map (N, K * len(inputs), H, W).

    Raises:
        ValueError: if the tensors are on a CPU.
        RuntimeError: if a second derivative is computed.
    """
    must_run(inputs[0])
    if factors_of(inputs) is None:
        return reference.deep_skip(inputs, weights, mode)
    own = reference.conv3(inputs[0], weights[0])
    if len(inputs) == 1:
        return own
    taps = [taps_of(x, weight, own.dtype) for x, weight in zip(inputs[1:], weights[1:], strict=True)]
    joined: Tensor = _spread(own, taps, mode)
    return joined
