"""The matrices of the sub-pixel form: a fixed linear map of a 3x3 convolution's weights, and its transpose.

Upsampling by S followed by three taps is, along one axis, a mean of low-resolution neighbours: phase p of a cell takes tap d of
row u = p + d - 1 of the upsampled cell, and neighbour o in -1, 0, 1 of the cell has weight
    t(o; u) = max(0, 1 - |(u + 1/2) / S - 1/2 - o|)   (bilinear, align_corners=False),   [floor(u / S) = o]   (nearest).
In a first cell, neighbour -1 is the cell itself repeated, and where u < 0 the convolution meets zeros; in a last cell likewise:
    first(u) = -t(0; u) where u < 0, else t(-1; u)        last(u) = -t(0; u) where u >= S, else t(1; u)
are the cell's own additional weights beyond t(0; u). With S = 1 they are 0: a plain convolution.

W'[a, p, b, q, c, k] = sum_{d, e} R[a, p, d] Q[b, q, e] W[k, c, d, e], a product of a (5 S 6 S, 9) table and W as (9, C K).
Rows R: a = -1, 0, 1, first, last. Columns Q: b = -1, 0, 1, and whole cells 0 + first, 0 + last, 0 + first + last.
dW is the transposed table times the sums of x^T g by kind; there columns have five kinds, like rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepskip.kernels import backend

ROW_KINDS, COLUMN_KINDS = 5, 6
# Rows of a table, and entries of a weight, that a program multiplies.
BLOCK_T, BLOCK_M = 64, 64
# Rows, and sums of each, that a program adds up at a time.
ADD_ROWS, ADD_BLOCK = 16, 128


@triton.jit
def neighbour(o, u, S: tl.constexpr, BILINEAR: tl.constexpr):
    """Return t(o; u), the weight of neighbor o in row u of an upsampled cell."""
    if BILINEAR:
        weight = tl.maximum(1.0 - tl.abs((u + 0.5) / S - 0.5 - o), 0.0)
    else:
        weight = tl.where(tl.where(u < 0, -1, tl.where(u >= S, 1, 0)) == o, 1.0, 0.0)
    return weight


@triton.jit
def row_weight(kind, u, S: tl.constexpr, BILINEAR: tl.constexpr):
    """Return R: the weight in row u of neighbor `kind` - 1, or the additional own weight of a first (3) or last (4) cell."""
    same = neighbour(0, u, S, BILINEAR)
    first = tl.where(u < 0, -same, neighbour(-1, u, S, BILINEAR))
    last = tl.where(u >= S, -same, neighbour(1, u, S, BILINEAR))
    inner = neighbour(kind - 1, u, S, BILINEAR)
    return tl.where(kind == 3, first, tl.where(kind == 4, last, inner))


@triton.jit
def column_weight(kind, u, S: tl.constexpr, BILINEAR: tl.constexpr):
    """Return Q: the weight in column u of the neighbor `kind` - 1, or of a whole border cell (3 to 5)."""
    # Kinds 3 to 5 are a first cell, a last one, and one that is both: the full weight of the cell's own value.
    inner = neighbour(kind - 1, u, S, BILINEAR)
    own = row_weight(1, u, S, BILINEAR)
    own += tl.where(kind != 4, row_weight(3, u, S, BILINEAR), 0.0) + tl.where(
        kind != 3, row_weight(4, u, S, BILINEAR), 0.0
    )
    return tl.where(kind < 3, inner, own)


@triton.jit
def _expand_one(
    w_ptr, out_ptr, block, C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, LAST: tl.constexpr, BILINEAR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    tap = tl.arange(0, 16)
    a, p, b, q = t // (S * 6 * S), t // (6 * S) % S, t // S % 6, t % S
    d, e = (tap // 3)[None, :], (tap % 3)[None, :]
    table = row_weight(a, p + d - 1, S, BILINEAR) * column_weight(b, q + e - 1, S, BILINEAR)
    table = tl.where((tap < 9)[None, :], table, 0.0)
    for m0 in range(0, C * K, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        c, k = m // K, m % K
        # The weight is (K, C, 3, 3), contiguous or channels last.
        at = k * (9 * C) + (c if LAST else 9 * c)
        w = tl.load(
            w_ptr + tap[:, None] * (C if LAST else 1) + at[None, :],
            mask=(tap < 9)[:, None] & (m < C * K)[None, :],
            other=0.0,
        ).to(tl.float32)
        out = tl.dot(table, w, input_precision="tf32x3")
        mask = (t < 5 * S * 6 * S) & (m < C * K)[None, :]
        tl.store(out_ptr + t * (C * K) + m[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expand(
    weights, outs, blocks, K: tl.constexpr, CHANNELS: tl.constexpr, FACTORS: tl.constexpr, LAST: tl.constexpr,
    BILINEAR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    start = 0
    for i in tl.static_range(len(FACTORS)):
        if (block >= start) & (block < start + blocks[i]):
            _expand_one(
                weights[i], outs[i], block - start, CHANNELS[i], K, FACTORS[i], LAST[i], BILINEAR, BLOCK_T, BLOCK_M
            )
        start += blocks[i]


def is_last(x: Tensor) -> bool:
    """Return whether a map is channels last, (N, H, W, C) in memory.

    Args:
        x: map (N, C, H, W).
    """
    return x.is_contiguous(memory_format=torch.channels_last)


def expanded(weights: Sequence[Tensor], factors: Sequence[int], mode: str, dtype: torch.dtype) -> list[Tensor]:
    """Compute the sub-pixel form's matrices of several convolutions, in one launch.

    Args:
        weights: a weight (K, C, 3, 3) for each convolution, with one K for all, any float dtype.
        factors: upsampling factor for each weight; 1 for a plain convolution.
        mode: "bilinear" (align_corners=False) or "nearest".
        dtype: dtype of the result.

    Returns:
        W' of this module's head, (5, s, 6, s, C, K), for each weight.
    """
    weights = [w if is_last(w) else w.contiguous() for w in weights]
    K = weights[0].shape[0]
    outs = [
        w.new_empty(ROW_KINDS, s, COLUMN_KINDS, s, w.shape[1], K, dtype=dtype)
        for w, s in zip(weights, factors, strict=True)
    ]
    blocks = tuple(triton.cdiv(ROW_KINDS * s * COLUMN_KINDS * s, BLOCK_T) for s in factors)
    with backend.device_of(weights[0]):
        _expand[(sum(blocks),)](
            tuple(weights), tuple(outs), blocks, K=K, CHANNELS=tuple(w.shape[1] for w in weights), FACTORS=tuple(factors),
            LAST=tuple(is_last(w) for w in weights), BILINEAR=mode == "bilinear", BLOCK_T=BLOCK_T, BLOCK_M=BLOCK_M,
        )  # fmt: skip
    return outs


@triton.jit
def _add_rows_one(
    rows_ptr, sums_ptr, block, N, strips, stripes, SIZE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # The sums are of kind a of rows and kind b of columns; SIZE is C S S K.
    a, b = block // BLOCKS // 5, block // BLOCKS % 5
    inner, ends = (N * stripes * strips).to(tl.int64), (N * strips).to(tl.int64)
    if b >= 3:
        count = N * stripes
        step = 5 * SIZE
        rows_ptr += inner * (9 * SIZE) + ends * (6 * SIZE) + (b - 3).to(tl.int64) * count * step + a * SIZE
    elif a >= 3:
        count = N * strips
        step = 3 * SIZE
        rows_ptr += inner * (9 * SIZE) + (a - 3) * ends * step + b * SIZE
    else:
        count = N * stripes * strips
        step = 9 * SIZE
        rows_ptr += (a * 3 + b) * SIZE
    at = block % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (at < SIZE)[None, :]
        total += tl.load(rows_ptr + row.to(tl.int64)[:, None] * step + at[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + block // BLOCKS * SIZE + at, tl.sum(total, 0), mask=at < SIZE)


# Triton would make a batch of 1 a constant, which cannot be converted to 64 bits.
@triton.jit(do_not_specialize=["N"])
def _add_rows(
    rows, sums, blocks, strips, stripes, N, SIZES: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    start = 0
    for i in tl.static_range(len(SIZES)):
        if (block >= start) & (block < start + blocks[i]):
            _add_rows_one(rows[i], sums[i], block - start, N, strips[i], stripes, SIZES[i], BLOCKS[i], ROWS, BLOCK)
        start += blocks[i]


@triton.jit
def _contract_one(
    sums_ptr, dw_ptr, block, C: tl.constexpr, K: tl.constexpr, S: tl.constexpr, LAST: tl.constexpr, BILINEAR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tap = tl.arange(0, 16)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    c, k = m // K, m % K
    total = tl.zeros((16, BLOCK_M), tl.float32)
    for t0 in range(0, 25 * S * S, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        a, b, p, q = t // (5 * S * S), t // (S * S) % 5, t // S % S, t % S
        d, e = (tap // 3)[:, None] - 1, (tap % 3)[:, None] - 1
        table = row_weight(a[None, :], p[None, :] + d, S, BILINEAR) * row_weight(
            b[None, :], q[None, :] + e, S, BILINEAR
        )
        at = (t // (S * S) * (C * S * S * K) + (p * S + q) * K)[:, None] + (c * (S * S * K) + k)[None, :]
        sums = tl.load(sums_ptr + at, mask=(t < 25 * S * S)[:, None] & (m < C * K)[None, :], other=0.0)
        total = tl.dot(table, sums, total, input_precision="tf32x3")
    at = k * (9 * C) + (c if LAST else 9 * c)
    to = tap[:, None] * (C if LAST else 1) + at[None, :]
    tl.store(dw_ptr + to, total.to(dw_ptr.dtype.element_ty), mask=(tap < 9)[:, None] & (m < C * K)[None, :])


@triton.jit
def _contract(
    sums, dws, blocks, K: tl.constexpr, CHANNELS: tl.constexpr, FACTORS: tl.constexpr, LAST: tl.constexpr,
    BILINEAR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    start = 0
    for i in tl.static_range(len(FACTORS)):
        if (block >= start) & (block < start + blocks[i]):
            _contract_one(
                sums[i], dws[i], block - start, CHANNELS[i], K, FACTORS[i], LAST[i], BILINEAR, BLOCK_T, BLOCK_M
            )
        start += blocks[i]


def row_floats(N: int, C: int, M: int, strips: int, stripes: int) -> int:
    """Return how many fp32 numbers the programs of a branch write: inner kinds, first and last rows, first and last columns.

    Args:
        N: images.
        C: channels of the map.
        M: outputs of a cell, s * s * K.
        strips: strips of the map's columns.
        stripes: stripes of each image.
    """
    return C * M * N * (9 * strips * stripes + 6 * strips + 10 * stripes)


def weight_gradients(
    rows: Sequence[Tensor], grads: Sequence[Tensor], factors: Sequence[int], N: int, strips: Sequence[int], stripes: int,
    mode: str,
) -> None:  # fmt: skip
    """Compute the weights' gradients from the programs' rows, in two launches, each sum in a fixed order.

    Args:
        rows: the programs' sums, (`row_floats`,) fp32, for each weight.
        grads: gradient (K, C, 3, 3) of each weight, contiguous or channels last; written.
        factors: upsampling factor for each weight.
        N: images.
        strips: strips of the map's columns, for each weight.
        stripes: stripes of each image.
        mode: "bilinear" or "nearest".
    """
    K = grads[0].shape[0]
    sizes = tuple(w.shape[1] * s * s * K for w, s in zip(grads, factors, strict=True))
    sums = [x.new_empty(25 * size) for x, size in zip(rows, sizes, strict=True)]
    pieces = tuple(triton.cdiv(size, ADD_BLOCK) for size in sizes)
    blocks = tuple(25 * piece for piece in pieces)
    with backend.device_of(rows[0]):
        _add_rows[(sum(blocks),)](
            tuple(rows), tuple(sums), blocks, tuple(strips), stripes, N, SIZES=sizes, BLOCKS=pieces, ROWS=ADD_ROWS,
            BLOCK=ADD_BLOCK,
        )  # fmt: skip
        blocks = tuple(triton.cdiv(w.shape[1] * K, BLOCK_M) for w in grads)
        _contract[(sum(blocks),)](
            tuple(sums), tuple(grads), blocks, K=K, CHANNELS=tuple(w.shape[1] for w in grads), FACTORS=tuple(factors),
            LAST=tuple(is_last(w) for w in grads), BILINEAR=mode == "bilinear", BLOCK_T=BLOCK_T, BLOCK_M=BLOCK_M,
        )  # fmt: skip
