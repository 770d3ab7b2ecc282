"""Rows of a 3x3 convolution at low resolution, as Triton functions that the sub-pixel stage and conv3 share.

A program goes down a strip of cells. It loads each row of the input once and multiplies it by three matrices, one for each row
of the output that it contributes to. It holds the sums of two rows of output, and shifts them at each row:
    out[y] = in[y - 1] M_above + in[y] M_same + in[y + 1] M_below
A cell is one pixel, or the S x S pixels of the output that lie where one pixel of a deeper map does. The same rows serve the
stage (cells are written), its input gradient (cells are read) and the plain convolution (S = 1).

Matrices lie in memory as (5 kinds of rows, S, 6 kinds of columns, S, C, K), see `subpixel_tables`. The first and the last row
and column have their own matrices, so that the border is exact. A strip uses another matrix for the row above the first row and
below the last one. The first and the last column of cells are not in strips: separate programs go down them (`edge`).

A row of input is multiplied in tiles: (phase row or nothing) x (column above, same, after; or all three side by side, SLOTS 1).
"""

import triton
import triton.language as tl

# Kinds of rows: 0 to 2 are the input's row above, same and below.
FIRST = tl.constexpr(3)
LAST = tl.constexpr(4)
# Kinds of columns: 0 to 2 are the input's column before, same and after; then a first, last or only column's own weight.
ONLY_FIRST = tl.constexpr(3)
ONLY_LAST = tl.constexpr(4)
ONLY = tl.constexpr(5)


@triton.jit
def _write(out_ptr, to, out, is_out, bias, first_sums, second_sums, SUMS: tl.constexpr):
    if bias is not None:
        out += bias
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=is_out)
    if SUMS:
        # Values beyond the strip belong to a neighboring strip.
        out = tl.where(is_out, out, 0.0)
        first_sums += out
        second_sums += out * out
    return first_sums, second_sums


@triton.jit
def strip(
    in_ptr, w_ptr, out_ptr, bias, y0, y1, h, in_row, out_row, in_chunk, in_cell, off, is_in, at, is_weight, to, is_out,
    KIND, CHUNK, SLOT, TILES: tl.constexpr, SLOTS: tl.constexpr, ABOVE: tl.constexpr, HOIST: tl.constexpr,
    SUMS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute rows y0 to y1 of a strip; in_ptr is at the image's row 0, out_ptr at row y0.

    ABOVE is the kind of matrix that multiplies an input row for the output row below it: 0, or 2 if rows are gathered instead
    of spread. HOIST keeps all matrices in registers.
    """
    BELOW: tl.constexpr = 2 - ABOVE
    first_sums = tl.zeros(to.shape, tl.float32)
    second_sums = tl.zeros(to.shape, tl.float32)
    above = tl.zeros(to.shape, tl.float32)
    row_ptr = in_ptr + tl.maximum(y0 - 1, 0).to(tl.int64) * in_row
    edge_ptr = w_ptr + tl.where(y0 == 0, FIRST, ABOVE) * KIND
    for i in range(TILES):
        x = tl.load(row_ptr + (i // SLOTS * in_chunk + i % SLOTS * in_cell) + off, mask=is_in, other=0.0).to(OPERAND)
        m = tl.load(edge_ptr + (i // SLOTS * CHUNK + i % SLOTS * SLOT) + at, mask=is_weight, other=0.0).to(OPERAND)
        above = tl.dot(x, m, above, input_precision=PRECISION)
    held = ()
    if HOIST:
        for a in tl.static_range(TILES):
            tile = w_ptr + (a // SLOTS * CHUNK + a % SLOTS * SLOT)
            held += (  # type: ignore[assignment]
                tl.load(tile + BELOW * KIND + at, mask=is_weight, other=0.0).to(OPERAND),
                tl.load(tile + KIND + at, mask=is_weight, other=0.0).to(OPERAND),
                tl.load(tile + ABOVE * KIND + at, mask=is_weight, other=0.0).to(OPERAND),
            )
    row_ptr = in_ptr + y0.to(tl.int64) * in_row
    same = tl.zeros(to.shape, tl.float32)
    for i in range(TILES):
        x = tl.load(row_ptr + (i // SLOTS * in_chunk + i % SLOTS * in_cell) + off, mask=is_in, other=0.0).to(OPERAND)
        tile = w_ptr + (i // SLOTS * CHUNK + i % SLOTS * SLOT)
        m_same = tl.load(tile + KIND + at, mask=is_weight, other=0.0).to(OPERAND)
        m_above = tl.load(tile + ABOVE * KIND + at, mask=is_weight, other=0.0).to(OPERAND)
        above = tl.dot(x, m_same, above, input_precision=PRECISION)
        same = tl.dot(x, m_above, same, input_precision=PRECISION)
    for _ in range(y0 + 1, y1):
        row_ptr += in_row
        out = above
        above = same
        same = tl.zeros(to.shape, tl.float32)
        if HOIST:
            for t in tl.static_range(TILES):
                x = tl.load(row_ptr + (t // SLOTS * in_chunk + t % SLOTS * in_cell) + off, mask=is_in, other=0.0).to(
                    OPERAND
                )
                out = tl.dot(x, held[3 * t], out, input_precision=PRECISION)
                above = tl.dot(x, held[3 * t + 1], above, input_precision=PRECISION)
                same = tl.dot(x, held[3 * t + 2], same, input_precision=PRECISION)
        else:
            # A loop, not unrolled: with this many tiles the compiler would take minutes.
            for u in range(TILES):
                x = tl.load(row_ptr + (u // SLOTS * in_chunk + u % SLOTS * in_cell) + off, mask=is_in, other=0.0).to(
                    OPERAND
                )
                tile = w_ptr + (u // SLOTS * CHUNK + u % SLOTS * SLOT)
                m_below = tl.load(tile + BELOW * KIND + at, mask=is_weight, other=0.0).to(OPERAND)
                m_same = tl.load(tile + KIND + at, mask=is_weight, other=0.0).to(OPERAND)
                m_above = tl.load(tile + ABOVE * KIND + at, mask=is_weight, other=0.0).to(OPERAND)
                out = tl.dot(x, m_below, out, input_precision=PRECISION)
                above = tl.dot(x, m_same, above, input_precision=PRECISION)
                same = tl.dot(x, m_above, same, input_precision=PRECISION)
        first_sums, second_sums = _write(out_ptr, to, out, is_out, bias, first_sums, second_sums, SUMS)
        out_ptr += out_row
    row_ptr += tl.where(y1 == h, 0, in_row)
    edge_ptr = w_ptr + tl.where(y1 == h, LAST, BELOW) * KIND
    for i in range(TILES):
        x = tl.load(row_ptr + (i // SLOTS * in_chunk + i % SLOTS * in_cell) + off, mask=is_in, other=0.0).to(OPERAND)
        m = tl.load(edge_ptr + (i // SLOTS * CHUNK + i % SLOTS * SLOT) + at, mask=is_weight, other=0.0).to(OPERAND)
        above = tl.dot(x, m, above, input_precision=PRECISION)
    return _write(out_ptr, to, above, is_out, bias, first_sums, second_sums, SUMS)


@triton.jit
def edge(
    in_ptr, w_ptr, out_ptr, bias, side, y0, y1, h, w, in_row, in_chunk, in_cell, off, is_in, at, is_weight, to, is_out, rows,
    KIND, CHUNK, COLUMN, CHUNKS: tl.constexpr, ABOVE: tl.constexpr, SUMS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute rows y0 to y1 of the first (side 0) or last column of cells; pointers are at row y0, off and to hold rows."""
    # Its own column, and its neighbor: the column after the first one, or before the last one.
    inner = 1 - 2 * side
    own_kind = tl.where(w == 1, ONLY, ONLY_FIRST + side)
    acc = tl.zeros(to.shape, tl.float32)
    for i in range(2 * CHUNKS):
        neighbour = i // CHUNKS
        kind = tl.where(neighbour == 0, own_kind, 1 + inner * (1 - ABOVE))
        X = side * (w - 1) + neighbour * inner
        x_ptr = in_ptr + i % CHUNKS * in_chunk + X * in_cell + off
        m_ptr = w_ptr + i % CHUNKS * CHUNK + kind * COLUMN + at
        is_there = is_in & ((neighbour == 0) | (w > 1))
        for d in tl.static_range(3):
            y = rows + (d - 1)
            x = tl.load(x_ptr + (d - 1) * in_row, mask=is_there & ((y >= 0) & (y < h))[:, None], other=0.0)
            # The row above is row 0 of three.
            m = tl.load(m_ptr + (ABOVE + (1 - ABOVE) * d) * KIND, mask=is_weight, other=0.0)
            acc = tl.dot(x.to(OPERAND), m.to(OPERAND), acc, input_precision=PRECISION)
        if y0 == 0:
            x = tl.load(x_ptr, mask=is_there & (rows == 0)[:, None], other=0.0)
            m = tl.load(m_ptr + FIRST * KIND, mask=is_weight, other=0.0)
            acc = tl.dot(x.to(OPERAND), m.to(OPERAND), acc, input_precision=PRECISION)
        if y1 == h:
            x = tl.load(x_ptr, mask=is_there & (rows == h - 1)[:, None], other=0.0)
            m = tl.load(m_ptr + LAST * KIND, mask=is_weight, other=0.0)
            acc = tl.dot(x.to(OPERAND), m.to(OPERAND), acc, input_precision=PRECISION)
    first_sums = tl.zeros(to.shape, tl.float32)
    second_sums = tl.zeros(to.shape, tl.float32)
    return _write(out_ptr, to, acc, is_out, bias, first_sums, second_sums, SUMS)
