"""The deep-skip stage in sub-pixel form (eq. 1): each deeper map is convolved at its own resolution, straight into its slice.

conv3(up_s(x)) = shuffle_s(conv3'(x; W')) with W': C -> s^2 K a fixed linear function of W (`subpixel_tables`). It is exact at
the border, where the first and last rows and columns have their own matrices. Nothing is interpolated, and nothing of full size
is read: an output costs the multiply-adds of the plain implementation, and each matrix stays in registers while a strip's rows
go by (`subpixel_rows_triton`). The level's own map is the case s = 1. All branches are one launch, in which programs that write
the same pixels' channels run at the same time. Maps of s = 8 and more, for which the plain implementation has too many
multiply-adds, are products of taps at low resolution, interpolated in the same launch (`deep_skip_triton`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepskip.kernels import backend, deep_skip_triton
from deepskip.kernels.bce_dice_triton import INTERPRETED
from deepskip.kernels.deep_skip_triton import spread_map
from deepskip.kernels.subpixel_rows_triton import edge, strip

# Factors of the maps that are convolved in sub-pixel form; the others are products of taps.
NEAR = (1, 2, 4)
# Rows of output that a program computes, most first, and the programs that fill a GPU.
STRIPES, MANY = (64, 32, 16), 1024
WARPS = 2
# 32-bit registers of a thread that the matrices may fill, and the most columns of a product.
MATRIX_REGISTERS, MOST_COLUMNS = 150, 32
BLOCK, WINDOW_BLOCK = 64, 128


class Branch(NamedTuple):
    """How a map is divided into strips of cells, and the tiles of a product.

    Attributes:
        strips: strips of the map's columns.
        span: cells of each strip.
        groups: groups of a cell's outputs, for separate programs.
        columns: outputs of a cell that a program computes.
        block: cells of a product.
        slots: products for each row and kind; 1 if a cell and its neighbors are one product.
        hoist: whether the matrices stay in registers.
    """

    strips: int
    span: int
    groups: int
    columns: int
    block: int
    slots: int
    hoist: bool


def registers(depth: int, columns: int, slots: int, dtype: torch.dtype) -> int:
    """Return how many registers of a thread the matrices of three kinds fill.

    Args:
        depth: rows of a matrix.
        columns: columns of a matrix.
        slots: matrices of each kind.
        dtype: dtype of the matrices.
    """
    # Three products of tf32 need both halves of each number.
    return 3 * slots * depth * columns * (4 if dtype == torch.float32 else 1) // 64


def branch(w: int, depth: int, outputs: int, dtype: torch.dtype, chunks: int = 1) -> Branch:
    """Divide a map into strips and choose the tiles of its products.

    Args:
        w: columns of the map.
        depth: values of an input cell's tile.
        outputs: values of an output cell.
        dtype: dtype of the products.
        chunks: tiles of each input cell.
    """
    whole = depth >= 16 and triton.next_power_of_2(depth) == depth
    slots, tile = (3, depth) if whole else (1, max(triton.next_power_of_2(3 * depth), 16))
    columns = min(max(triton.next_power_of_2(outputs), 8), MOST_COLUMNS)
    while columns > 16 and registers(tile, columns, slots * chunks, dtype) > MATRIX_REGISTERS and chunks <= 2:
        columns //= 2
    hoist = registers(tile, columns, slots * chunks, dtype) <= MATRIX_REGISTERS
    block = WINDOW_BLOCK if slots == 1 and columns <= 16 and tile <= 32 else BLOCK
    block = block // 2 if dtype == torch.float32 else block
    # Separate programs compute the first and the last column of cells.
    strips = triton.cdiv(max(w - 2, 0), block)
    return Branch(
        strips, triton.cdiv(max(w - 2, 0), max(strips, 1)), triton.cdiv(outputs, columns), columns, block, slots, hoist
    )


@triton.jit
def spread(
    x_ptr, w_ptr, out_ptr, bias_ptr, n, Y0, part, strips, span, H, W, C: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
    S: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, HOIST: tl.constexpr,
    STRIPE: tl.constexpr, SUMS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Convolve STRIPE rows of a strip, or of the first or last column, from row Y0 on; out_ptr is at the branch's slice."""
    h, w = H // S, W // S
    y0 = Y0 // S
    y1 = tl.minimum(y0 + STRIPE // S, h)
    place = part % (strips + 2)
    COLUMN: tl.constexpr = S * C * K
    KIND: tl.constexpr = S * 6 * COLUMN
    x_ptr += n * h * w * C
    out_ptr += (n * H + y0 * S) * W * STEP
    # Outputs of a cell: phases of rows and columns, and channels.
    m = part // (strips + 2) * COLUMNS + tl.arange(0, COLUMNS)
    is_m = m < S * S * K
    p, q, k = m // (S * K), m // K % S, m % K
    to = p * W * STEP + q * STEP + k
    at = p * (6 * COLUMN) + q * (C * K) + k
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=is_m, other=0.0).to(tl.float32)[None, :]
    if place < 2:
        r = tl.arange(0, max(STRIPE // S, 16))
        c = tl.arange(0, max(triton.next_power_of_2(C), 16))
        X_edge = tl.where(place == 0, 0, w - 1)
        is_row = (y0 + r < y1) & ((place == 0) | (w > 1))
        edge_first, edge_second = edge(
            x_ptr + y0.to(tl.int64) * w * C, w_ptr, out_ptr, bias, place, y0, y1, h, w, w * C, 0, C,
            r[:, None] * (w * C) + c[None, :], is_row[:, None] & (c < C)[None, :],
            c[:, None] * K + at[None, :], (c < C)[:, None] & is_m[None, :],
            r[:, None] * (S * W * STEP) + X_edge * (S * STEP) + to[None, :], is_row[:, None] & is_m[None, :], y0 + r,
            KIND, 0, COLUMN, 1, 0, SUMS, OPERAND, PRECISION,
        )  # fmt: skip
        first, second = tl.sum(edge_first, 0), tl.sum(edge_second, 0)
    else:
        DEPTH: tl.constexpr = 3 * C if SLOTS == 1 else C
        j = tl.arange(0, max(triton.next_power_of_2(DEPTH), 16))
        start = 1 + (place - 2) * span
        end = tl.minimum(start + span, w - 1)
        X = start + tl.arange(0, BLOCK)
        # Cells beyond the strip are computed from whatever lies there, and not stored.
        reads = tl.minimum(X, w - 2)[:, None] * C - C + j[None, :]
        first_sums, second_sums = strip(
            x_ptr, w_ptr, out_ptr, bias, y0, y1, h, w * C, S * W * STEP, 0, C, reads, (j < DEPTH)[None, :],
            (j // C * COLUMN + j % C * K)[:, None] + at[None, :], (j < DEPTH)[:, None] & is_m[None, :],
            X[:, None] * (S * STEP) + to[None, :], (end > X)[:, None] & is_m[None, :],
            KIND, 0, COLUMN, SLOTS, SLOTS, 0, HOIST, SUMS, OPERAND, PRECISION,
        )  # fmt: skip
        first, second = tl.sum(first_sums, 0), tl.sum(second_sums, 0)
    return first, second


@triton.jit
def _maps_of_a_shape(
    out_ptr, bias_ptr, sums_ptr, maps, matrices, n, Y0, number, part, strips, spans, H, W, K: tl.constexpr,
    STEP: tl.constexpr, AT: tl.constexpr, COUNT: tl.constexpr, NEAR: tl.constexpr, NEAR_SLICES: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, HOIST: tl.constexpr,
    STRIPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Map AT and the maps after it have one shape, so they share this code.
    x_ptr, w_ptr = maps[AT], matrices[AT]
    slice_at = number * 0 + NEAR_SLICES[AT]
    for other in tl.static_range(1, COUNT):
        if number == other:
            x_ptr, w_ptr = maps[AT + other], matrices[AT + other]
            slice_at = number * 0 + NEAR_SLICES[AT + other]
    first, second = spread(
        x_ptr, w_ptr, out_ptr + slice_at * K, bias_ptr, n, Y0, part, strips[AT], spans[AT], H, W, CHANNELS[AT], K, STEP,
        NEAR[AT], COLUMNS[AT], BLOCKS[AT], SLOTS[AT], HOIST[AT], STRIPE, sums_ptr is not None, OPERAND, PRECISION,
    )  # fmt: skip
    if sums_ptr is not None:
        k = tl.arange(0, COLUMNS[AT])
        row_ptr = sums_ptr + tl.program_id(0) * (2 * K) + k
        tl.store(row_ptr, first, mask=k < K)
        tl.store(row_ptr + K, second, mask=k < K)


# Triton would make a size of 1 a constant, which cannot be converted to 64 bits.
@triton.jit(do_not_specialize=["H", "W"])
def _stage(
    out_ptr, bias_ptr, sums_ptr, maps, matrices, taps, near_blocks, strips, spans, far_blocks, per_stripe, stripes, H, W,
    K: tl.constexpr, STEP: tl.constexpr, FIRSTS: tl.constexpr, COUNTS: tl.constexpr,
    NEAR: tl.constexpr, NEAR_SLICES: tl.constexpr, CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, HOIST: tl.constexpr, FAR: tl.constexpr,
    FAR_SLICES: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr, STRIPE: tl.constexpr, BILINEAR: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % per_stripe
    stripe = tl.program_id(0) // per_stripe
    n = (stripe // stripes).to(tl.int64)
    Y0 = stripe % stripes * STRIPE
    start = 0
    for j in tl.static_range(len(FIRSTS)):
        blocks = near_blocks[FIRSTS[j]]
        if (part >= start) & (part < start + COUNTS[j] * blocks):
            _maps_of_a_shape(
                out_ptr, bias_ptr, sums_ptr, maps, matrices, n, Y0, (part - start) // blocks, (part - start) % blocks, strips,
                spans, H, W, K, STEP, FIRSTS[j], COUNTS[j], NEAR, NEAR_SLICES, CHANNELS, COLUMNS, BLOCKS, SLOTS, HOIST,
                STRIPE, OPERAND, PRECISION,
            )  # fmt: skip
        start += COUNTS[j] * blocks
    for i in tl.static_range(len(FAR)):
        if (part >= start) & (part < start + far_blocks[i]):
            pixels = H.to(tl.int64) * W
            turns = tl.minimum(STRIPE, H - Y0) // FAR[i]
            spread_map(
                taps[i] + n * (pixels // (FAR[i] * FAR[i])) * (9 * K), out_ptr + n * pixels * STEP + FAR_SLICES[i] * K, Y0,
                part - start, tl.arange(0, WIDE), H, W, STEP, 1, K, turns, FAR[i], WINDOW, BILINEAR, OPERAND, PRECISION,
            )  # fmt: skip
        start += far_blocks[i]


def operand(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of the products' operands; fp32 in the interpreter, which computes bf16 wrongly.

    Args:
        dtype: dtype of the maps.
    """
    return getattr(tl, "float32" if INTERPRETED else str(dtype).removeprefix("torch."))


def stripe_of(N: int, H: int, per_stripe: int) -> int:
    """Choose the rows of output that a program computes: the most that leave enough programs.

    Args:
        N: images.
        H: rows of the output.
        per_stripe: programs of a stripe.
    """
    return next((s for s in STRIPES if N * triton.cdiv(H, s) * per_stripe >= MANY), STRIPES[-1])


def grouped(keys: Sequence[tuple[int, int]]) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """Order maps by shape.

    Args:
        keys: a map's rows and channels, for each map.

    Returns:
        The order, and for each run of maps of one shape its first place and its length.
    """
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    firsts = tuple(j for j, i in enumerate(order) if j == 0 or keys[i] != keys[order[j - 1]])
    ends = (*firsts[1:], len(order))
    return order, firsts, tuple(end - first for first, end in zip(firsts, ends, strict=True))


def programs_of(N: int, C: int, K: int, H: int, W: int, dtype: torch.dtype) -> int:
    """Return how many programs a plain convolution has, which is the number of rows of its sums.

    Args:
        N: images.
        C: channels of the map.
        K: channels of the output.
        H: rows of the map.
        W: columns of the map.
        dtype: dtype of the map.
    """
    cut = branch(W, C, K, dtype)
    per_stripe = cut.groups * (cut.strips + 2)
    stripes: int = triton.cdiv(H, stripe_of(N, H, per_stripe))
    return N * stripes * per_stripe


def launch_stage(
    out: Tensor, maps: Sequence[Tensor], matrices: Sequence[Tensor], taps: Sequence[Tensor], slices: Sequence[int], mode: str,
    bias: Tensor | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the stage.

    Args:
        out: output (N, K maps, H, W), channels last; written.
        maps: map (N, C, H / s, W / s) for each s in NEAR, channels last.
        matrices: W' (5, s, 6, s, C, K) of each map, from `subpixel_tables.expanded`.
        taps: taps (N, H / s, W / s, 9 K) of each of the other maps.
        slices: slice of out for each of maps, then taps.
        mode: "bilinear" or "nearest".
        bias: bias (K,) for every output, with a single map only, or None.
        sums: sum and sum of squares of each program's outputs before rounding, (`programs_of`, 2, K) fp32; written. With a
            single map and K up to MOST_COLUMNS only, or None.
    """
    N, wide, H, W = out.shape
    if not out.numel():
        return
    K = wide // len(slices)
    order, firsts, counts = grouped([(x.shape[2], x.shape[1]) for x in maps])
    maps, matrices = [maps[i] for i in order], [matrices[i] for i in order]
    near_slices, far_slices = tuple(slices[i] for i in order), tuple(slices[len(order) :])
    near = tuple(H // x.shape[2] for x in maps)
    far = tuple(H // x.shape[1] for x in taps)
    cuts = [branch(W // s, x.shape[1], s * s * K, out.dtype) for s, x in zip(near, maps, strict=True)]
    window = deep_skip_triton.plan(W, far, K, out.dtype, False).window if far else 8
    near_blocks = tuple(cut.groups * (cut.strips + 2) for cut in cuts)
    far_blocks = tuple(triton.cdiv(W // s, window - 2) for s in far)
    per_stripe = sum(near_blocks) + sum(far_blocks)
    stripe = stripe_of(N, H, per_stripe)
    with backend.device_of(out):
        _stage[(N * triton.cdiv(H, stripe) * per_stripe,)](
            out, bias, sums, tuple(maps), tuple(matrices), tuple(taps), near_blocks, tuple(cut.strips for cut in cuts),
            tuple(cut.span for cut in cuts), far_blocks, per_stripe, triton.cdiv(H, stripe), H, W,
            K=K, STEP=wide, FIRSTS=firsts, COUNTS=counts, NEAR=near, NEAR_SLICES=near_slices,
            CHANNELS=tuple(x.shape[1] for x in maps),
            COLUMNS=tuple(cut.columns for cut in cuts), BLOCKS=tuple(cut.block for cut in cuts),
            SLOTS=tuple(cut.slots for cut in cuts), HOIST=tuple(cut.hoist for cut in cuts),
            FAR=far, FAR_SLICES=far_slices, WINDOW=window, WIDE=max(triton.next_power_of_2(K), 8),
            STRIPE=stripe, BILINEAR=mode == "bilinear", OPERAND=operand(out.dtype), PRECISION="tf32x3", num_warps=WARPS,
        )  # fmt: skip
