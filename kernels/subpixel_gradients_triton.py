"""Gradients of the stage in sub-pixel form (`subpixel_triton`): the transposes, in fp32 sums of a fixed order.

Of the maps: dx[y, X] = sum over neighbors of g'[y', X'] W'^T, where g' is the gradient of the branch's slice, its S x S pixels
side by side as the channels of a cell. Rows are processed as in forward; a tile of input is one row of a cell's pixels.
Of the weights: dW'[a, b] = sum over cells of x[y + a, X + b]^T g'[y, X]. Programs keep these sums while the rows of a strip go
by, and write them to their own rows; `subpixel_tables.weight_gradients` adds the rows up and applies the table's transpose.
Beyond the border x is 0. The own weights of the first and last rows and columns of cells have separate kinds of sums.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepskip.kernels import backend, deep_skip_triton, subpixel_tables, subpixel_triton
from deepskip.kernels.deep_skip_triton import gather_map
from deepskip.kernels.subpixel_rows_triton import edge, strip
from deepskip.kernels.subpixel_triton import branch, grouped, operand, stripe_of

# Rows of output that a program of the weights' sums takes, its warps, and elements of x in a product.
SUM_STRIPES, SUM_WARPS, SUM_ELEMENTS = (128, 64, 32, 16), 4, 8192
# Accumulators of a program: the most elements of (3 C, columns).
SUM_TILE = 4096
# Programs that fill a GPU.
SUM_PROGRAMS = 512


@triton.jit
def gather(
    g_ptr, w_ptr, dx_ptr, n, Y0, part, strips, span, H, W, C: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
    S: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, HOIST: tl.constexpr,
    STRIPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the input's gradient where STRIPE rows of output lie, from row Y0 on; g_ptr is at the branch's slice."""
    h, w = H // S, W // S
    y0 = Y0 // S
    y1 = tl.minimum(y0 + STRIPE // S, h)
    place = part % (strips + 2)
    COLUMN: tl.constexpr = S * C * K
    KIND: tl.constexpr = S * 6 * COLUMN
    g_ptr += n * H * W * STEP
    dx_ptr += (n * h + y0) * w * C
    c = part // (strips + 2) * COLUMNS + tl.arange(0, COLUMNS)
    is_c = c < C
    # A row of a cell's pixels: its columns and channels.
    DEPTH: tl.constexpr = S * K
    if place < 2:
        r = tl.arange(0, max(STRIPE // S, 16))
        i = tl.arange(0, max(triton.next_power_of_2(DEPTH), 16))
        X_edge = tl.where(place == 0, 0, w - 1)
        is_row = (y0 + r < y1) & ((place == 0) | (w > 1))
        edge(
            g_ptr + y0.to(tl.int64) * S * W * STEP, w_ptr, dx_ptr, None, place, y0, y1, h, w, S * W * STEP, W * STEP, S * STEP,
            r[:, None] * (S * W * STEP) + (i // K * STEP + i % K)[None, :], is_row[:, None] & (i < DEPTH)[None, :],
            (i // K * (C * K) + i % K)[:, None] + (c * K)[None, :], (i < DEPTH)[:, None] & is_c[None, :],
            r[:, None] * (w * C) + X_edge * C + c[None, :], is_row[:, None] & is_c[None, :], y0 + r,
            KIND, 6 * COLUMN, COLUMN, S, 2, False, OPERAND, PRECISION,
        )  # fmt: skip
    else:
        WIDTH: tl.constexpr = 3 * DEPTH if SLOTS == 1 else DEPTH
        j = tl.arange(0, max(triton.next_power_of_2(WIDTH), 16))
        # Transposed: this cell is the preceding cell's neighbor after.
        at = (2 - j // DEPTH) * COLUMN + j % DEPTH // K * (C * K) + j % K
        start = 1 + (place - 2) * span
        end = tl.minimum(start + span, w - 1)
        X = start + tl.arange(0, BLOCK)
        reads = (tl.minimum(X, w - 2)[:, None] - 1) * (S * STEP) + (j // K * STEP + j % K)[None, :]
        strip(
            g_ptr, w_ptr, dx_ptr, None, y0, y1, h, S * W * STEP, w * C, W * STEP, S * STEP, reads, (j < WIDTH)[None, :],
            at[:, None] + (c * K)[None, :], (j < WIDTH)[:, None] & is_c[None, :],
            X[:, None] * C + c[None, :], (end > X)[:, None] & is_c[None, :],
            KIND, 6 * COLUMN, -COLUMN, S * SLOTS, SLOTS, 2, HOIST, False, OPERAND, PRECISION,
        )  # fmt: skip


@triton.jit
def _gradients_of_a_shape(
    g_ptr, maps, matrices, n, Y0, number, part, strips, spans, H, W, K: tl.constexpr, STEP: tl.constexpr, AT: tl.constexpr,
    COUNT: tl.constexpr, NEAR: tl.constexpr, NEAR_SLICES: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, HOIST: tl.constexpr, STRIPE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Map AT and the maps after it have one shape, so they share this code.
    w_ptr, dx_ptr = matrices[AT], maps[AT]
    slice_at = number * 0 + NEAR_SLICES[AT]
    for other in tl.static_range(1, COUNT):
        if number == other:
            w_ptr, dx_ptr = matrices[AT + other], maps[AT + other]
            slice_at = number * 0 + NEAR_SLICES[AT + other]
    gather(
        g_ptr + slice_at * K, w_ptr, dx_ptr, n, Y0, part, strips[AT], spans[AT], H, W, CHANNELS[AT], K, STEP, NEAR[AT],
        COLUMNS[AT], BLOCKS[AT], SLOTS[AT], HOIST[AT], STRIPE, OPERAND, PRECISION,
    )  # fmt: skip


# Triton would make a size of 1 a constant, which cannot be converted to 64 bits.
@triton.jit(do_not_specialize=["H", "W"])
def _gather_stage(
    g_ptr, maps, matrices, taps, near_blocks, strips, spans, far_blocks, per_stripe, stripes, H, W,
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
            _gradients_of_a_shape(
                g_ptr, maps, matrices, n, Y0, (part - start) // blocks, (part - start) % blocks, strips, spans, H, W, K, STEP,
                FIRSTS[j], COUNTS[j], NEAR, NEAR_SLICES, CHANNELS, COLUMNS, BLOCKS, SLOTS, HOIST, STRIPE, OPERAND, PRECISION,
            )  # fmt: skip
        start += COUNTS[j] * blocks
    for i in tl.static_range(len(FAR)):
        if (part >= start) & (part < start + far_blocks[i]):
            pixels = H.to(tl.int64) * W
            # The programs of a stripe cover its rows.
            turns: tl.constexpr = STRIPE // FAR[i]
            if Y0 + (part - start) % turns * FAR[i] < H:
                gather_map(
                    g_ptr + n * pixels * STEP + FAR_SLICES[i] * K, taps[i] + n * (pixels // (FAR[i] * FAR[i])) * (9 * K), Y0,
                    part - start, tl.arange(0, WIDE), H, W, STEP, 1, K, turns, FAR[i], WINDOW, BILINEAR, OPERAND, PRECISION,
                )  # fmt: skip
        start += far_blocks[i]


def launch_map_gradients(
    grad: Tensor,
    maps: Sequence[Tensor],
    matrices: Sequence[Tensor],
    taps: Sequence[Tensor],
    slices: Sequence[int],
    mode: str,
) -> None:
    """Launch the gradients of maps and taps.

    Args:
        grad: gradient (N, K maps, H, W) of the stage's output, channels last.
        maps: gradient (N, C, H / s, W / s) of each map with s in NEAR, channels last; written.
        matrices: W' (5, s, 6, s, C, K) of each map, from `subpixel_tables.expanded`.
        taps: gradient (N, H / s, W / s, 9 K) of each of the other maps' taps; written.
        slices: slice of grad for each of maps, then taps.
        mode: "bilinear" or "nearest".
    """
    N, wide, H, W = grad.shape
    if not grad.numel() or not slices:
        return
    K = matrices[0].shape[5] if matrices else taps[0].shape[3] // 9
    order, firsts, counts = grouped([(x.shape[2], x.shape[1]) for x in maps])
    maps, matrices = [maps[i] for i in order], [matrices[i] for i in order]
    near_slices, far_slices = tuple(slices[i] for i in order), tuple(slices[len(order) :])
    near = tuple(H // x.shape[2] for x in maps)
    far = tuple(H // x.shape[1] for x in taps)
    cuts = [branch(W // s, s * K, x.shape[1], grad.dtype, s) for s, x in zip(near, maps, strict=True)]
    window = deep_skip_triton.plan(W, far, K, grad.dtype, True).window if far else 8
    near_blocks = tuple(cut.groups * (cut.strips + 2) for cut in cuts)
    per_stripe = sum(near_blocks) + sum(triton.cdiv(W // s, window - 2) for s in far)
    stripe = stripe_of(N, H, per_stripe)
    far_blocks = tuple(stripe // s * triton.cdiv(W // s, window - 2) for s in far)
    per_stripe = sum(near_blocks) + sum(far_blocks)
    with backend.device_of(grad):
        _gather_stage[(N * triton.cdiv(H, stripe) * per_stripe,)](
            grad, tuple(maps), tuple(matrices), tuple(taps), near_blocks, tuple(cut.strips for cut in cuts),
            tuple(cut.span for cut in cuts), far_blocks, per_stripe, triton.cdiv(H, stripe), H, W,
            K=K, STEP=wide, FIRSTS=firsts, COUNTS=counts, NEAR=near, NEAR_SLICES=near_slices,
            CHANNELS=tuple(x.shape[1] for x in maps),
            COLUMNS=tuple(cut.columns for cut in cuts), BLOCKS=tuple(cut.block for cut in cuts),
            SLOTS=tuple(cut.slots for cut in cuts), HOIST=tuple(cut.hoist for cut in cuts),
            FAR=far, FAR_SLICES=far_slices, WINDOW=window, WIDE=max(triton.next_power_of_2(K), 8),
            STRIPE=stripe, BILINEAR=mode == "bilinear", OPERAND=operand(grad.dtype), PRECISION="tf32x3",
            num_warps=subpixel_triton.WARPS,
        )  # fmt: skip


@triton.jit
def _column_sums(
    x_ptr, g_ptr, to_ptr, y0, y1, h, x_row, g_row, is_g, c, m_off, M, C: tl.constexpr, ROWS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Sums of a border column of cells with itself, by kinds of rows; pointers are at row y0.
    r = tl.arange(0, ROWS)
    y = y0 + r
    g = tl.load(g_ptr + r[:, None] * g_row + m_off[None, :], mask=(y < y1)[:, None] & is_g[None, :], other=0.0).to(
        OPERAND
    )
    to = c[:, None] * M
    is_out = (c < C)[:, None] & is_g[None, :]
    m = tl.arange(0, m_off.shape[0])
    for kind in range(5):
        # Kinds: the row above, the same row, the row below; the first and the last row with themselves.
        d = tl.where(kind < 3, kind - 1, 0)
        is_x = (y < y1) & (y + d >= 0) & (y + d < h) & ((kind < 3) | (y == tl.where(kind == 3, 0, h - 1)))
        x = tl.load(x_ptr + (r + d)[:, None] * x_row + c[None, :], mask=is_x[:, None] & (c < C)[None, :], other=0.0)
        sums = tl.dot(tl.trans(x.to(OPERAND)), g, input_precision=PRECISION)
        tl.store(to_ptr + kind * (C * M) + to + m[None, :], sums, mask=is_out)


@triton.jit
def sums_of(
    x_ptr, g_ptr, rows_ptr, n, stripe, N, Y0, part, strips, span, stripes, H, W, C: tl.constexpr, K: tl.constexpr,
    STEP: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STRIPE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum x^T g over STRIPE rows of a strip by kinds of rows and columns, into this program's own rows."""
    h, w = H // S, W // S
    y0 = Y0 // S
    y1 = tl.minimum(y0 + STRIPE // S, h)
    number = part % strips
    M: tl.constexpr = S * S * K
    m0 = part // strips * COLUMNS
    m = m0 + tl.arange(0, COLUMNS)
    is_m = m < M
    m_off = m // (S * K) * (W * STEP) + m // K % S * STEP + m % K
    x_ptr += n * h * w * C
    g_ptr += n * H * W * STEP
    start = number * span
    X = start + tl.arange(0, BLOCK)
    is_mine = tl.minimum(start + span, w) > X
    DEPTH: tl.constexpr = max(triton.next_power_of_2(3 * C), 16)
    j = tl.arange(0, DEPTH)
    column = X[:, None] - 1 + (j // C)[None, :]
    is_x = (column >= 0) & (column < w) & (j < 3 * C)[None, :]
    x_off = X[:, None] * C - C + j[None, :]
    g_off = X[:, None] * (S * STEP) + m_off[None, :]
    is_g = is_mine[:, None] & is_m[None, :]
    x_row, g_row = w * C, S * W * STEP
    above = tl.zeros((DEPTH, COLUMNS), tl.float32)
    same = tl.zeros((DEPTH, COLUMNS), tl.float32)
    below = tl.zeros((DEPTH, COLUMNS), tl.float32)
    g_before = tl.zeros((BLOCK, COLUMNS), OPERAND)
    g_here = tl.zeros((BLOCK, COLUMNS), OPERAND)
    # Rows of x from the one above to the one below, each with the three rows of cells that it contributes to.
    here = x_ptr + (y0.to(tl.int64) - 1) * x_row
    after = g_ptr + y0.to(tl.int64) * g_row
    for y in range(y0 - 1, y1 + 1):
        x = tl.load(here + x_off, mask=is_x & ((y >= 0) & (y < h)), other=0.0).to(OPERAND)
        g_after = tl.load(after + g_off, mask=is_g & (y + 1 < y1), other=0.0).to(OPERAND)
        x_t = tl.trans(x)
        above = tl.dot(x_t, g_after, above, input_precision=PRECISION)
        same = tl.dot(x_t, g_here, same, input_precision=PRECISION)
        below = tl.dot(x_t, g_before, below, input_precision=PRECISION)
        g_before = g_here
        g_here = g_after
        here += x_row
        after += g_row
    out_m = m0 + tl.arange(0, COLUMNS)
    to = j[:, None] * M + out_m[None, :]
    is_out = (j < 3 * C)[:, None] & is_m[None, :]
    SIZE: tl.constexpr = 3 * C * M
    inner = rows_ptr + (stripe * strips + number).to(tl.int64) * (3 * SIZE)
    tl.store(inner + to, above, mask=is_out)
    tl.store(inner + SIZE + to, same, mask=is_out)
    tl.store(inner + 2 * SIZE + to, below, mask=is_out)
    # After all inner sums come those of the first and last row of cells, then of the first and last column.
    ends = rows_ptr + (N * stripes * strips).to(tl.int64) * (3 * SIZE)
    for side in range(2):
        y_end = side * (h - 1)
        if (y_end >= y0) & (y_end < y1):
            x = tl.load(x_ptr + (y0 * 0 + y_end).to(tl.int64) * x_row + x_off, mask=is_x, other=0.0)
            g = tl.load(g_ptr + (y0 * 0 + y_end).to(tl.int64) * g_row + g_off, mask=is_g, other=0.0).to(OPERAND)
            sums = tl.dot(tl.trans(x.to(OPERAND)), g, input_precision=PRECISION)
            tl.store(ends + ((side * N + n) * strips + number) * SIZE + to, sums, mask=is_out)
    sides = ends + (2 * N * strips).to(tl.int64) * SIZE
    c = tl.arange(0, max(triton.next_power_of_2(C), 16))
    for side in range(2):
        if number == side * (strips - 1):
            X_end = side * (w - 1)
            _column_sums(
                x_ptr + y0.to(tl.int64) * x_row + X_end * C, g_ptr + y0.to(tl.int64) * g_row + X_end * (S * STEP),
                sides + ((n * 0 + side) * N * stripes + stripe) * (5 * C * M) + m0, y0, y1, h, x_row, g_row, is_m, c,
                m_off, M, C, max(STRIPE // S, 16), OPERAND, PRECISION,
            )  # fmt: skip


@triton.jit
def _sums_of_a_shape(
    g_ptr, maps, rows, n, stripe, N, Y0, number, part, strips, spans, stripes, H, W, K: tl.constexpr, STEP: tl.constexpr,
    AT: tl.constexpr, COUNT: tl.constexpr, FACTORS: tl.constexpr, SLICES: tl.constexpr, CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STRIPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x_ptr, rows_ptr = maps[AT], rows[AT]
    slice_at = number * 0 + SLICES[AT]
    for other in tl.static_range(1, COUNT):
        if number == other:
            x_ptr, rows_ptr = maps[AT + other], rows[AT + other]
            slice_at = number * 0 + SLICES[AT + other]
    sums_of(
        x_ptr, g_ptr + slice_at * K, rows_ptr, n, stripe, N, Y0, part, strips[AT], spans[AT], stripes, H, W, CHANNELS[AT], K,
        STEP, FACTORS[AT], COLUMNS[AT], BLOCKS[AT], STRIPE, OPERAND, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "H", "W"])
def _weight_sums(
    g_ptr, maps, rows, blocks, strips, spans, per_stripe, stripes, N, H, W, K: tl.constexpr, STEP: tl.constexpr,
    FIRSTS: tl.constexpr, COUNTS: tl.constexpr, FACTORS: tl.constexpr, SLICES: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    STRIPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % per_stripe
    stripe = tl.program_id(0) // per_stripe
    n = (stripe // stripes).to(tl.int64)
    Y0 = stripe % stripes * STRIPE
    start = 0
    for j in tl.static_range(len(FIRSTS)):
        count = blocks[FIRSTS[j]]
        if (part >= start) & (part < start + COUNTS[j] * count):
            _sums_of_a_shape(
                g_ptr, maps, rows, n, stripe, N, Y0, (part - start) // count, (part - start) % count, strips, spans, stripes,
                H, W, K, STEP, FIRSTS[j], COUNTS[j], FACTORS, SLICES, CHANNELS, COLUMNS, BLOCKS, STRIPE, OPERAND, PRECISION,
            )  # fmt: skip
        start += COUNTS[j] * count


def launch_weight_gradients(
    grad: Tensor, maps: Sequence[Tensor], grads: Sequence[Tensor], slices: Sequence[int], mode: str
) -> None:
    """Launch the gradients of the weights of maps in sub-pixel form.

    Args:
        grad: gradient (N, K maps, H, W) of the stage's output, channels last.
        maps: map (N, C, H / s, W / s) for each weight, channels last.
        grads: gradient (K, C, 3, 3) of each weight, contiguous or channels last; written.
        slices: slice of grad for each map.
        mode: "bilinear" or "nearest".
    """
    N, wide, H, W = grad.shape
    if not grads:
        return
    if not grad.numel():
        for dw in grads:
            dw.zero_()
        return
    K = grads[0].shape[0]
    order, firsts, counts = grouped([(x.shape[2], x.shape[1]) for x in maps])
    maps, grads, slices = [maps[i] for i in order], [grads[i] for i in order], [slices[i] for i in order]
    factors = tuple(H // x.shape[2] for x in maps)
    outputs = [s * s * K for s in factors]
    depths = [max(triton.next_power_of_2(3 * x.shape[1]), 16) for x in maps]
    most = SUM_TILE // 2 if grad.dtype == torch.float32 else SUM_TILE
    columns = tuple(
        max(8, min(triton.next_power_of_2(M), 32, most // depth)) for M, depth in zip(outputs, depths, strict=True)
    )
    # Enough cells that the product outweighs the program's work once for each row.
    cells = tuple(
        min(max(SUM_ELEMENTS // depth, 32), 256, triton.next_power_of_2(max(W // s, 32)))
        for s, depth in zip(factors, depths, strict=True)
    )
    strips = tuple(triton.cdiv(W // s, n) for s, n in zip(factors, cells, strict=True))
    spans = tuple(triton.cdiv(W // s, n) for s, n in zip(factors, strips, strict=True))
    blocks = tuple(n * triton.cdiv(M, c) for n, M, c in zip(strips, outputs, columns, strict=True))
    stripe = next((s for s in SUM_STRIPES if N * triton.cdiv(H, s) * sum(blocks) >= SUM_PROGRAMS), SUM_STRIPES[-1])
    stripes = triton.cdiv(H, stripe)
    rows = [
        grad.new_empty(subpixel_tables.row_floats(N, x.shape[1], M, n, stripes), dtype=torch.float32)
        for x, M, n in zip(maps, outputs, strips, strict=True)
    ]
    with backend.device_of(grad):
        _weight_sums[(N * stripes * sum(blocks),)](
            grad, tuple(maps), tuple(rows), blocks, strips, spans, sum(blocks), stripes, N, H, W,
            K=K, STEP=wide, FIRSTS=firsts, COUNTS=counts, FACTORS=factors, SLICES=tuple(slices),
            CHANNELS=tuple(x.shape[1] for x in maps), COLUMNS=columns,
            BLOCKS=cells, STRIPE=stripe, OPERAND=operand(grad.dtype), PRECISION="tf32x3", num_warps=SUM_WARPS,
        )  # fmt: skip
    subpixel_tables.weight_gradients(rows, grads, factors, N, strips, stripes, mode)
