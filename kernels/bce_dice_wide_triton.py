"""Sigmoid BCE + Dice in Triton for 8-bit labels: the sums and the gradient of `bce_dice_triton`, four pixels a word.

With z a logit, t its label, o its probability, e = exp(-|z|) and w the sample's weight:
    -log o = max(-z, 0) + log(1 + e), -log(1 - o) = max(z, 0) + log(1 + e), o = (1 if z >= 0 else e) / (1 + e)
For alpha = 1/2 every pixel's logarithm has the same weight, so one logarithm of a product serves many pixels:
    2 bce = sum (max(z, 0) - t z) + log(1 + q), 1 + q = prod (1 + e), by q <- q (1 + e) + e, which keeps small e exact
For another alpha each pixel's log(1 + e) is e times a polynomial of e. The gradient needs neither. With E = exp(-z):
    o = 1 / (1 + E), 1 - o = E o, dz = o (b0 (1 - t) + (c1 t + c2 o) (1 - o)) - b1 t (1 - o)
    b0 = w g_bce (1 - alpha), b1 = w g_bce alpha, c1 = w g_to, c2 = 2 w g_oo

A lane loads labels as 32-bit words, and 16-bit logits as pairs. Which of a word's four labels count is computed for the whole
word: bit 7 of byte k of `counted` is set if label k counts. A label that does not count becomes 0, and its logit a number for
which e = o = max(z, 0) = 0, so that it adds nothing to any sum. A sample's weight multiplies its sums; a sample of weight 0 is
not read. Sums of labels are integers. Rows of partial sums are as in `bce_dice_triton`, and the order of additions is fixed
too: the same input gives the same sums.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepskip.kernels import backend

if TYPE_CHECKING:
    from deepskip.kernels.bce_dice_triton import Layout

# With one warp for each program, sums need no barrier, and 32 programs fill an SM.
WARPS = 1
# Bytes of logits that a lane loads at a time.
LOAD = 16
# Programs take more blocks each until there are about PROGRAMS of them, and at most MOST_TRIPS blocks: each block can double
# 1 + q four times, and 2^128 overflows fp32.
PROGRAMS, MOST_TRIPS = 4096, 30
LABELS = (torch.uint8, torch.bool)
LOG2E = tl.constexpr(1.4426950408889634)
# A logit that adds nothing, representable in every dtype of logits.
NEVER = tl.constexpr(-60000.0)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _reciprocal(x):
    # Accurate to one unit in the last place; a division takes ten instructions.
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


@triton.jit
def _add_products(a, b, total):
    # The dot product of the four bytes of a and of b, plus the total.
    if INTERPRETED:
        for k in tl.static_range(4):
            total += ((a >> (8 * k)) & 0xFF) * ((b >> (8 * k)) & 0xFF)
        return total
    return tl.inline_asm_elementwise("dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], tl.uint32, True, 1)


@triton.jit
def _log1p(x):
    # log(1 + x) loses what 1 + x rounds away; the second term restores it.
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) * _reciprocal(u)


@triton.jit
def _log1p_of_fraction(e):
    # For e in 0 to 1, relative error 2e-7: log(1 + e) / e interpolated at Chebyshev points.
    p = 0.00512610214 * e - 0.0290740647
    p = p * e + 0.0775160867
    p = p * e - 0.136022476
    p = p * e + 0.190768807
    p = p * e - 0.24835399
    p = p * e + 0.333181217
    p = p * e - 0.49999445
    p = p * e + 0.999999966
    return e * p


@triton.jit
def _counted(labels, ignored):
    # Bit 7 of a byte is set if the byte differs from the ignored label. No sum carries into the next byte.
    difference = labels ^ ignored.to(tl.uint32)
    return (((difference & 0x7F7F7F7F) + 0x7F7F7F7F) | difference) & 0x80808080


@triton.jit
def _words(t_ptr, inside, EVEN: tl.constexpr, WORDS: tl.constexpr):
    t4_ptr = t_ptr.to(tl.pointer_type(tl.uint32)) + tl.arange(0, WORDS)
    if EVEN:
        return tl.load(t4_ptr)
    return tl.load(t4_ptr, mask=tl.arange(0, WORDS) < inside, other=0)


@triton.jit
def _logits(z_ptr, inside, EVEN: tl.constexpr, WORDS: tl.constexpr):
    # Returns the first, second, third and fourth logit of each word of labels.
    if z_ptr.dtype.element_ty == tl.float32:
        four_ptr = z_ptr + tl.arange(0, 4 * WORDS)
        there = tl.arange(0, 4 * WORDS) < 4 * inside
        four = tl.load(four_ptr) if EVEN else tl.load(four_ptr, mask=there, other=0.0)
        even, odd = tl.split(tl.reshape(four, (WORDS, 2, 2)))
        z0, z2 = tl.split(even)
        z1, z3 = tl.split(odd)
    else:
        pair_ptr = z_ptr.to(tl.pointer_type(tl.uint32)) + tl.arange(0, 2 * WORDS)
        there = tl.arange(0, 2 * WORDS) < 2 * inside
        pairs = tl.load(pair_ptr) if EVEN else tl.load(pair_ptr, mask=there, other=0)
        first, second = tl.split(tl.reshape(pairs, (WORDS, 2)))
        z0, z1 = _halves(first, z_ptr.dtype.element_ty)
        z2, z3 = _halves(second, z_ptr.dtype.element_ty)
    return z0, z1, z2, z3


@triton.jit
def _halves(pair, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        # A bf16 is the upper half of an fp32.
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = (pair & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _add_pixel(z, t, alpha, logs, linear, intersection, prediction_sq, BALANCED: tl.constexpr):
    e = tl.exp2(tl.abs(z) * -LOG2E)
    u = 1.0 + e
    positive = z >= 0
    o = tl.where(positive, 1.0, e) * _reciprocal(u)
    if BALANCED:
        logs = logs * u + e
        linear += tl.maximum(z, 0.0) - t * z
    else:
        foreground, background = alpha * t, (1.0 - alpha) * (1.0 - t)
        logs += (foreground + background) * _log1p_of_fraction(e)
        linear += tl.where(positive, background, -foreground) * z
    return logs, linear, intersection + t * o, prediction_sq + o * o


@triton.jit
def _sigmoid_sums_wide(
    z_ptr, t_ptr, w_ptr, out_ptr, programs, blocks, pixels, V, alpha, ignored, z_n, z_v, t_n, t_v, out_row,
    HAS_WEIGHT: tl.constexpr, HAS_IGNORE: tl.constexpr, BALANCED: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    # Each sample has `programs` programs; each takes `blocks` consecutive blocks of its pixels, for class v.
    BLOCK: tl.constexpr = 4 * WORDS
    n = (tl.program_id(0) // programs).to(tl.int64)
    v = tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * blocks * BLOCK
    trips = tl.minimum(tl.cdiv(pixels - first, BLOCK), blocks).to(tl.int32)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(w_ptr + n).to(tl.float32)
        # A sample of weight 0 may hold anything, infinities too, and 0 * inf would be nan.
        trips = tl.where(weight != 0.0, trips, 0)
    z_ptr += n * z_n + v * z_v + first
    t_ptr += n * t_n + v * t_v + first
    inside = ((pixels - first) // 4).to(tl.int32)
    logs = tl.zeros((WORDS,), tl.float32)
    linear = tl.zeros((WORDS,), tl.float32)
    intersection = tl.zeros((WORDS,), tl.float32)
    prediction_sq = tl.zeros((WORDS,), tl.float32)
    target_sq = tl.zeros((WORDS,), tl.uint32)
    # One byte counts each label of the word; MOST_TRIPS fit.
    count = tl.zeros((WORDS,), tl.uint32)
    for _ in tl.range(0, trips, loop_unroll_factor=2):
        labels = _words(t_ptr, inside, EVEN, WORDS)
        z = _logits(z_ptr, inside, EVEN, WORDS)
        counted = tl.full((WORDS,), 0x80808080, tl.uint32)
        if HAS_IGNORE:
            counted = _counted(labels, ignored)
        if not EVEN:
            counted = tl.where(tl.arange(0, WORDS) < inside, counted, 0)
        ones = counted >> 7
        count += ones
        if HAS_IGNORE:
            # Copy bit 7 of a byte to all eight bits.
            labels = labels & ((counted - ones) | counted)
        target_sq = _add_products(labels, labels, target_sq)
        for k in tl.static_range(4):
            one = z[k]
            if HAS_IGNORE or not EVEN:
                one = tl.where((counted & (0x80 << (8 * k))) != 0, one, NEVER)
            t = ((labels >> (8 * k)) & 0xFF).to(tl.float32)
            logs, linear, intersection, prediction_sq = _add_pixel(
                one, t, alpha, logs, linear, intersection, prediction_sq, BALANCED
            )
        z_ptr += BLOCK
        t_ptr += BLOCK
        inside -= WORDS
    if BALANCED:
        logs = _log1p(logs)
        weighed = alpha * tl.sum(logs + linear)
    else:
        weighed = tl.sum(logs + linear)
    counts = _add_products(count, tl.full((WORDS,), 0x01010101, tl.uint32), tl.zeros((WORDS,), tl.uint32))
    row = out_ptr + tl.program_id(0).to(tl.int64) * out_row
    # bce and count are separate for each class here; they are added up with the rows.
    tl.store(row + v, weight * weighed)
    tl.store(row + V + v, weight * tl.sum(counts).to(tl.float32))
    tl.store(row + 2 * V + v, weight * tl.sum(intersection))
    tl.store(row + 3 * V + v, weight * tl.sum(prediction_sq))
    tl.store(row + 4 * V + v, weight * tl.sum(target_sq).to(tl.float32))


@triton.jit
def _pixel_gradient(z, t, b0, b1, c1, c2):
    # Beyond 2^126 the product would be inf * 0. A logit of nan stays nan.
    power = tl.minimum(z * -LOG2E, 126.0, propagate_nan=tl.PropagateNan.ALL)
    E = tl.exp2(power)
    o = _reciprocal(1.0 + E)
    rest = E * o
    return o * ((c1 * t + c2 * o) * rest + (b0 - b0 * t)) - (b1 * t) * rest


@triton.jit
def _sigmoid_gradient_wide(
    z_ptr, t_ptr, w_ptr, g_ptr, dz_ptr, programs, blocks, pixels, V, alpha, ignored, z_n, z_v, t_n, t_v,
    HAS_WEIGHT: tl.constexpr, HAS_IGNORE: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 4 * WORDS
    n = (tl.program_id(0) // programs).to(tl.int64)
    v = tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * blocks * BLOCK
    trips = tl.minimum(tl.cdiv(pixels - first, BLOCK), blocks).to(tl.int32)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(w_ptr + n).to(tl.float32)
    g_bce = weight * tl.load(g_ptr)
    b0, b1 = g_bce * (1.0 - alpha), g_bce * alpha
    c1 = weight * tl.load(g_ptr + 2 + v)
    c2 = 2.0 * weight * tl.load(g_ptr + 2 + V + v)
    z_ptr += n * z_n + v * z_v + first
    dz_ptr += n * z_n + v * z_v + first
    t_ptr += n * t_n + v * t_v + first
    inside = ((pixels - first) // 4).to(tl.int32)
    pixel = tl.arange(0, BLOCK)
    for _ in tl.range(0, trips, loop_unroll_factor=2):
        labels = _words(t_ptr, inside, EVEN, WORDS)
        z = _logits(z_ptr, inside, EVEN, WORDS)
        counted = tl.full((WORDS,), 0x80808080, tl.uint32)
        if HAS_IGNORE:
            counted = _counted(labels, ignored)
        if HAS_WEIGHT:
            counted = tl.where(weight != 0.0, counted, 0)
        d0 = _masked_gradient(z[0], labels, counted, 0, b0, b1, c1, c2, HAS_IGNORE or HAS_WEIGHT)
        d1 = _masked_gradient(z[1], labels, counted, 1, b0, b1, c1, c2, HAS_IGNORE or HAS_WEIGHT)
        d2 = _masked_gradient(z[2], labels, counted, 2, b0, b1, c1, c2, HAS_IGNORE or HAS_WEIGHT)
        d3 = _masked_gradient(z[3], labels, counted, 3, b0, b1, c1, c2, HAS_IGNORE or HAS_WEIGHT)
        d = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (BLOCK,)).to(dz_ptr.dtype.element_ty)
        if EVEN:
            tl.store(dz_ptr + pixel, d)
        else:
            tl.store(dz_ptr + pixel, d, mask=pixel < 4 * inside)
        z_ptr += BLOCK
        dz_ptr += BLOCK
        t_ptr += BLOCK
        inside -= WORDS


@triton.jit
def _masked_gradient(z, labels, counted, K: tl.constexpr, b0, b1, c1, c2, MASKED: tl.constexpr):
    d = _pixel_gradient(z, ((labels >> (8 * K)) & 0xFF).to(tl.float32), b0, b1, c1, c2)
    if MASKED:
        d = tl.where((counted & (0x80 << (8 * K))) != 0, d, 0.0)
    return d


def _words_of_a_block(z: Tensor) -> int:
    return WARPS * 32 * LOAD // (4 * z.element_size())


def _shares(at: "Layout", words: int) -> tuple[int, int]:
    # Returns the programs of a sample, and the blocks of a program.
    blocks = triton.cdiv(at.pixels, 4 * words)
    trips = min(MOST_TRIPS, max(1, blocks * at.N * at.V // PROGRAMS))
    return triton.cdiv(blocks, trips), trips


def _even(at: "Layout", words: int) -> bool:
    return at.pixels % (4 * words) == 0


def _ignored_word(ignore: int | None) -> int:
    # The label repeated in each byte of a word.
    return (ignore or 0) * 0x01010101


def fits(at: "Layout", z: Tensor, t: Tensor) -> bool:
    """Return whether the kernels here can take dense logits and labels.

    They need consecutive pixels, 8-bit labels, and whole aligned words.

    Args:
        at: layout of z and t.
        z: dense logits (N, V, H, W).
        t: dense labels, (N, H, W) or (N, V, H, W).
    """
    in_rows = at.z_p == 1 and (at.t_p == 1 or at.pixels == 1)
    return in_rows and t.dtype in LABELS and at.pixels % 8 == 0 and z.data_ptr() % 16 == 0 and t.data_ptr() % 16 == 0


def sum_rows(at: "Layout", z: Tensor, t: Tensor, weight: Tensor | None, alpha: float, ignore: int | None) -> Tensor:
    """Launch the partial sums of sigmoid BCE + Dice.

    Args:
        at: layout of z and t, for which `fits` holds.
        z: dense logits (N, V, H, W), fp32, fp16 or bf16.
        t: dense labels (N, H, W) or (N, V, H, W), uint8.
        weight: weights of the samples, (N,), or None for all one.
        alpha: weight of foreground pixels in BCE.
        ignore: label that does not count, or None.

    Returns:
        Rows (rows, 5 V) fp32: bce, count, intersection, prediction_sq and target_sq, each of V classes, as in
        `bce_dice_triton._sigmoid_sums`.
    """
    words = _words_of_a_block(z)
    programs, trips = _shares(at, words)
    rows = torch.empty(at.N * programs, 5 * at.V, dtype=torch.float32, device=z.device)
    with backend.device_of(z):
        _sigmoid_sums_wide[(len(rows), at.V)](
            z, t, z if weight is None else weight, rows, programs, trips, at.pixels, at.V, alpha, _ignored_word(ignore),
            at.z_n, at.z_v, at.t_n, at.t_v, rows.stride(0),
            HAS_WEIGHT=weight is not None, HAS_IGNORE=ignore is not None, BALANCED=alpha == 0.5, EVEN=_even(at, words),
            WORDS=words, num_warps=WARPS,
        )  # fmt: skip
    return rows


def gradient(
    at: "Layout", g: Tensor, z: Tensor, t: Tensor, weight: Tensor | None, dz: Tensor, alpha: float, ignore: int | None
) -> None:
    """Launch the gradient of the logits.

    Args:
        at: layout of z and t, for which `fits` holds.
        g: gradient of the sums (2 + 3 V,), fp32.
        z: dense logits (N, V, H, W), fp32, fp16 or bf16.
        t: dense labels (N, H, W) or (N, V, H, W), uint8.
        weight: weights of the samples, (N,), or None for all one.
        dz: gradient of the logits, of their shape, dtype and strides; written.
        alpha: weight of foreground pixels in BCE.
        ignore: label that does not count, or None.
    """
    words = _words_of_a_block(z)
    programs, trips = _shares(at, words)
    with backend.device_of(z):
        _sigmoid_gradient_wide[(at.N * programs, at.V)](
            z, t, z if weight is None else weight, g, dz, programs, trips, at.pixels, at.V, alpha,
            _ignored_word(ignore), at.z_n, at.z_v, at.t_n, at.t_v,
            HAS_WEIGHT=weight is not None, HAS_IGNORE=ignore is not None, EVEN=_even(at, words), WORDS=words,
            num_warps=WARPS,
        )  # fmt: skip
