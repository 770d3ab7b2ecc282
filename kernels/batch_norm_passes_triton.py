"""Triton kernels of batch norm and ReLU: one pass for the sums of a batch, one that normalizes; backward likewise.

With x of one channel, n pixels in the batch, weight w and bias b,
    m = sum x / n,   v = sum x^2 / n - m^2,   i = 1 / sqrt(v + eps),   s = w i
    y = max(0, s (x - m) + b)
and, with g = dy where s (x - m) + b > 0, else 0,
    db = sum g,   dw = i sum g (x - m),   dx = s (g - db / n - i (x - m) dw / n)
In evaluation m and v are the running statistics, constants, so dx = s g. The running variance takes v n / (n - 1).

Each program adds up its pixels in fp32 and writes its own row. The rows are added up in fp64, in a fixed order. There are
no atomics: the same input gives the same bits. A program subtracts the mean of its first tile from all of its pixels before it
squares them, so that a mean far from zero does not cost digits of the variance. For the same reason the batch's mean is kept as
two fp32 numbers, m = high + low: x - high rounds little, and low goes into the shift, b - s low.

Backward keeps x and five numbers for each channel; the mask of ReLU is recomputed. A pass over what another pass has just read
starts at its end, which the L2 cache may still hold. Addresses are 64 bits wide from tile to tile.
"""

import triton
import triton.language as tl

# Numbers of a channel that the launches share: mean (high and low), scale, shift, 1 / deviation.
HIGH, LOW, SCALE, SHIFT, INVERSE = (tl.constexpr(i) for i in range(5))
STATISTICS = 5


@triton.jit
def _places(pixels, C: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    # Offsets of a tile's elements from the pixel that it starts at.
    r, c = tl.arange(0, TILE), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    places = r[:, None] * C + c[None, :] if LAST else r[:, None] + (c.to(tl.int64) * pixels)[None, :]
    return r, c, places


@triton.jit
def _last_first(programs, pixels, C: tl.constexpr, TILE: tl.constexpr, LAST: tl.constexpr):
    # Returns a program's first element, and its pixels: the first program takes the last pixels.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    start = (program % programs).to(tl.int64) * TILE
    at = (program // programs).to(tl.int64) * pixels * C + start * (C if LAST else 1)
    return at, tl.minimum(pixels - start, TILE).to(tl.int32)


@triton.jit
def _channel(stats_ptr, c, C: tl.constexpr):
    high = tl.load(stats_ptr + HIGH * C + c, mask=c < C, other=0.0)
    scale = tl.load(stats_ptr + SCALE * C + c, mask=c < C, other=0.0)
    return high, scale, tl.load(stats_ptr + SHIFT * C + c, mask=c < C, other=0.0)


@triton.jit
def _masked_gradient(dy_ptr, x_ptr, mask, high, scale, shift):
    dy = tl.load(dy_ptr, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32) - high[None, :]
    # Computed as in forward, so that the sign is the same. A nan lets the gradient through, as in torch.
    return tl.where(d * scale[None, :] + shift[None, :] <= 0.0, 0.0, dy), d


@triton.jit
def _there(c, C: tl.constexpr, CHANNELS: tl.constexpr):
    # If all blocks of channels are whole, no comparison is needed.
    return ((c < C) | (C % CHANNELS == 0))[None, :]


@triton.jit
def batch_norm_sums(
    x_ptr, rows_ptr, programs, pixels,
    C: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, LOADS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Write each program's sum and sum of squares of its pixels as a row (2, C) fp64."""
    r, c, places = _places(pixels, C, TILE, CHANNELS, LAST)
    there = _there(c, C, CHANNELS)
    start = (tl.program_id(0) % programs).to(tl.int64) * TILE
    step: tl.constexpr = C if LAST else 1
    x_ptr += (tl.program_id(0) // programs).to(tl.int64) * pixels * C + start * step
    left = tl.minimum(pixels - start, TILE).to(tl.int32)
    first = tl.load(x_ptr + places, mask=(r < left)[:, None] & there, other=0.0)
    centre = tl.sum(first.to(tl.float32), axis=0) / left
    total = tl.zeros((TILE, CHANNELS), tl.float32)
    squares = tl.zeros((TILE, CHANNELS), tl.float32)
    # Tiles of all programs are interleaved. Whole tiles come first, several loads in flight.
    stride = programs * TILE
    count = 0
    while start + (LOADS - 1) * stride + TILE <= pixels:
        for _ in tl.static_range(LOADS):
            d = tl.load(x_ptr + places, mask=there, other=0.0).to(tl.float32) - centre[None, :]
            total += d
            squares += d * d
            x_ptr += stride * step
        count += LOADS * TILE
        start += LOADS * stride
    while start < pixels:
        left = tl.minimum(pixels - start, TILE).to(tl.int32)
        mask = (r < left)[:, None] & there
        d = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32) - centre[None, :]
        d = tl.where(mask, d, 0.0)
        total += d
        squares += d * d
        x_ptr += stride * step
        count += left
        start += stride
    # The center is added back in fp64, where n centre^2 leaves enough digits.
    d, centre = tl.sum(total, axis=0).to(tl.float64), centre.to(tl.float64)
    shifted = count * centre
    rows_ptr += tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(rows_ptr + c, shifted + d, mask=c < C)
    tl.store(rows_ptr + C + c, tl.sum(squares, axis=0) + centre * (2.0 * d + shifted), mask=c < C)


@triton.jit
def _add_rows(rows_ptr, rows, c, C, ROWS: tl.constexpr):
    first = tl.zeros((ROWS,), tl.float64)
    second = tl.zeros((ROWS,), tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = rows_ptr + row.to(tl.int64) * 2 * C + c
        first += tl.load(at, mask=row < rows, other=0.0).to(tl.float64)
        second += tl.load(at + C, mask=row < rows, other=0.0).to(tl.float64)
    return tl.sum(first), tl.sum(second)


@triton.jit
def _reciprocal(n):
    # The reciprocal of a whole number in fp64: Newton steps double the digits of fp32's, without a division's branches.
    r = (1.0 / n.to(tl.float32)).to(tl.float64)
    r = r * (2.0 - n * r)
    return r * (2.0 - n * r)


@triton.jit
def _rsqrt(v):
    r = tl.rsqrt(v.to(tl.float32)).to(tl.float64)
    return r * (1.5 - 0.5 * v * r * r)


@triton.jit
def batch_norm_statistics(
    rows_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, out_ptr, rows, C, count, momentum, eps,
    TRAINING: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write a channel's shared numbers, from the batch's rows in training, else from the running statistics."""
    c = tl.program_id(0)
    running_mean, running_var = tl.load(mean_ptr + c), tl.load(var_ptr + c)
    if TRAINING:
        total, squares = _add_rows(rows_ptr, rows, c, C, ROWS)
        share = _reciprocal(count)
        mean = total * share
        var = squares * share - mean * mean
        # Rounding can make a variance of zero negative. A nan stays nan.
        var = tl.where(var < 0.0, 0.0, var)
        tl.store(mean_ptr + c, (1.0 - momentum) * running_mean + momentum * mean.to(tl.float32))
        unbiased = var.to(tl.float32) * (count / (count - 1))
        tl.store(var_ptr + c, (1.0 - momentum) * running_var + momentum * unbiased)
    else:
        mean, var = running_mean.to(tl.float64), running_var.to(tl.float64)
    inverse = _rsqrt(var + eps)
    scale = tl.load(weight_ptr + c).to(tl.float64) * inverse
    high = mean.to(tl.float32)
    low = mean - high.to(tl.float64)
    tl.store(out_ptr + HIGH * C + c, high)
    tl.store(out_ptr + LOW * C + c, low.to(tl.float32))
    tl.store(out_ptr + SCALE * C + c, scale.to(tl.float32))
    tl.store(out_ptr + SHIFT * C + c, (tl.load(bias_ptr + c) - scale * low).to(tl.float32))
    tl.store(out_ptr + INVERSE * C + c, inverse.to(tl.float32))


@triton.jit
def batch_norm_relu(
    x_ptr, stats_ptr, y_ptr, programs, pixels,
    C: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Write max(0, scale (x - high) + shift)."""
    r, c, places = _places(pixels, C, TILE, CHANNELS, LAST)
    at, left = _last_first(programs, pixels, C, TILE, LAST)
    mask = (r < left)[:, None] & _there(c, C, CHANNELS)
    high, scale, shift = _channel(stats_ptr, c, C)
    d = tl.load(x_ptr + at + places, mask=mask, other=0.0).to(tl.float32) - high[None, :]
    # A nan stays nan, as in torch.
    y = tl.maximum(d * scale[None, :] + shift[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + at + places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def batch_norm_gradient_sums(
    dy_ptr, x_ptr, stats_ptr, rows_ptr, programs, pixels,
    C: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, LOADS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Write each program's sums of g and of g (x - high) as a row (2, C) fp32."""
    r, c, places = _places(pixels, C, TILE, CHANNELS, LAST)
    there = _there(c, C, CHANNELS)
    high, scale, shift = _channel(stats_ptr, c, C)
    start = (tl.program_id(0) % programs).to(tl.int64) * TILE
    step: tl.constexpr = C if LAST else 1
    at = (tl.program_id(0) // programs).to(tl.int64) * pixels * C + start * step
    x_ptr += at
    dy_ptr += at
    total = tl.zeros((TILE, CHANNELS), tl.float32)
    products = tl.zeros((TILE, CHANNELS), tl.float32)
    stride = programs * TILE
    while start + (LOADS - 1) * stride + TILE <= pixels:
        for _ in tl.static_range(LOADS):
            g, d = _masked_gradient(dy_ptr + places, x_ptr + places, there, high, scale, shift)
            total += g
            products += g * d
            x_ptr += stride * step
            dy_ptr += stride * step
        start += LOADS * stride
    while start < pixels:
        left = tl.minimum(pixels - start, TILE).to(tl.int32)
        # dy is zero beyond the pixels.
        g, d = _masked_gradient(dy_ptr + places, x_ptr + places, (r < left)[:, None] & there, high, scale, shift)
        total += g
        products += g * d
        x_ptr += stride * step
        dy_ptr += stride * step
        start += stride
    rows_ptr += tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(rows_ptr + c, tl.sum(total, axis=0), mask=c < C)
    tl.store(rows_ptr + C + c, tl.sum(products, axis=0), mask=c < C)


@triton.jit
def batch_norm_coefficients(
    rows_ptr, stats_ptr, dw_ptr, db_ptr, out_ptr, rows, C, count, TRAINING: tl.constexpr, ROWS: tl.constexpr
):
    """Write a channel's weight and bias gradients, and the slope and offset of its input gradient."""
    c = tl.program_id(0)
    db, products = _add_rows(rows_ptr, rows, c, C, ROWS)
    low = tl.load(stats_ptr + LOW * C + c).to(tl.float64)
    inverse = tl.load(stats_ptr + INVERSE * C + c).to(tl.float64)
    # The sums were computed with x - high.
    dw = inverse * (products - low * db)
    tl.store(dw_ptr + c, dw.to(tl.float32))
    tl.store(db_ptr + c, db.to(tl.float32))
    # dx = scale g + slope (x - high) + offset
    if TRAINING:
        share = tl.load(stats_ptr + SCALE * C + c) * _reciprocal(count)
        slope = -share * inverse * dw
        tl.store(out_ptr + c, slope.to(tl.float32))
        tl.store(out_ptr + C + c, (-share * db - slope * low).to(tl.float32))
    else:
        tl.store(out_ptr + c, 0.0)
        tl.store(out_ptr + C + c, 0.0)


@triton.jit
def batch_norm_input_gradient(
    dy_ptr, x_ptr, stats_ptr, coefficients_ptr, dx_ptr, programs, pixels,
    C: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Write dx = scale g + slope (x - high) + offset."""
    r, c, places = _places(pixels, C, TILE, CHANNELS, LAST)
    at, left = _last_first(programs, pixels, C, TILE, LAST)
    mask = (r < left)[:, None] & _there(c, C, CHANNELS)
    high, scale, shift = _channel(stats_ptr, c, C)
    slope = tl.load(coefficients_ptr + c, mask=c < C, other=0.0)
    offset = tl.load(coefficients_ptr + C + c, mask=c < C, other=0.0)
    g, d = _masked_gradient(dy_ptr + at + places, x_ptr + at + places, mask, high, scale, shift)
    dx = scale[None, :] * g + (slope[None, :] * d + offset[None, :])
    tl.store(dx_ptr + at + places, dx.to(dx_ptr.dtype.element_ty), mask=mask)
