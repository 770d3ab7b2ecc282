"""Weighted BCE + Dice in Triton: one pass over logits and target for the sums, one for the gradient (eqs. 5 to 8).

Per pixel, with w the sample's weight where the pixel counts (else 0), t the target and o the probability:
    bce = sum w * a * -log-likelihood, count = sum w, to_v = sum w t_v o_v, oo_v = sum w o_v^2, tt_v = sum w t_v^2
and, with g the gradient of those sums and h_v = g_to_v t_v + 2 g_oo_v o_v,
    sigmoid:  dz_v = w (g_bce ((1 - alpha)(1 - t_v) o_v - alpha t_v (1 - o_v)) + h_v o_v (1 - o_v))
    softmax:  dz_v = w (g_bce a (o_v - t_v) + o_v (h_v - sum_u h_u o_u))

Every program adds up its share in fp32 and writes it to its own row; the rows are added up in fp64. There are no atomics:
the same input gives the same sums. Addresses are 64 bits wide. Nothing here waits for the device. A loss and its gradient take
five launches: the rows, their sums, the loss of the sums, the gradient of the sums, the gradient of the logits.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepskip.kernels import backend, bce_dice_wide_triton, timings
from deepskip.kernels.reference import check_target, ignored_label

# Pixels, or pixels times classes, that a program holds at a time. MAX_PROGRAMS keeps the rows of partial sums under 1 MB.
SIGMOID_BLOCK = 1024
SOFTMAX_TILE = 2048
MAX_PROGRAMS = 2048
WARPS = 4
# Rows that are added up at a time, and the warps that do it.
ROWS, ROW_WARPS = 256, 4
# In the interpreter the kernels below are Python, and run on any device.
INTERPRETED = triton.knobs.runtime.interpret


class Layout(NamedTuple):
    """Where a kernel finds the logit and label of (n, v, pixel): sizes, and strides in elements.

    Attributes:
        N: samples.
        V: classes.
        pixels: pixels of a sample, H * W.
        z_n: stride of the logits from a sample to the next.
        z_v: stride of the logits from a class to the next.
        z_p: stride of the logits from a pixel to the next.
        t_n: stride of the target from a sample to the next.
        t_v: stride of the target from a class to the next; 0 if it has no classes.
        t_p: stride of the target from a pixel to the next.
    """

    N: int
    V: int
    pixels: int
    z_n: int
    z_v: int
    z_p: int
    t_n: int
    t_v: int
    t_p: int


@triton.jit
def _log1p(x):
    # log(1 + x) loses what 1 + x rounds away; the second term restores it.
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def _weight(label, inside, weight, ignore, HAS_IGNORE: tl.constexpr):
    # Labels are compared in their own type: truncated to 32 bits, some 64-bit labels would equal the ignored one.
    counts = inside
    if HAS_IGNORE:
        counts = counts & (label != ignore)
    return tl.where(counts, weight, 0.0)


@triton.jit
def _sigmoid_sums(
    z_ptr, t_ptr, w_ptr, out_ptr, programs, pixels, V, alpha, ignore,
    z_n, z_v, z_p, t_n, t_v, t_p, out_row,
    HAS_WEIGHT: tl.constexpr, HAS_IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Each sample has `programs` programs; each takes every programs-th block of its pixels, for class v.
    n = (tl.program_id(0) // programs).to(tl.int64)
    v = tl.program_id(1).to(tl.int64)
    z_ptr += n * z_n + v * z_v
    t_ptr += n * t_n + v * t_v
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(w_ptr + n).to(tl.float32)
    bce = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    intersection = tl.zeros((BLOCK,), tl.float32)
    prediction_sq = tl.zeros((BLOCK,), tl.float32)
    target_sq = tl.zeros((BLOCK,), tl.float32)
    start = (tl.program_id(0) % programs).to(tl.int64) * BLOCK
    while start < pixels:
        p = start + tl.arange(0, BLOCK)
        inside = p < pixels
        label = tl.load(t_ptr + p * t_p, mask=inside, other=0)
        w = _weight(label, inside, weight, ignore, HAS_IGNORE)
        z = tl.load(z_ptr + p * z_p, mask=inside, other=0.0).to(tl.float32)
        # Pixels that do not count may hold anything, and 0 * inf would be nan.
        z = tl.where(w != 0.0, z, 0.0)
        t = tl.where(w != 0.0, label, 0).to(tl.float32)
        small = tl.exp(-tl.abs(z))
        rest = _log1p(small)
        o = tl.where(z >= 0, 1.0, small) / (1.0 + small)
        # -log sigmoid(z) = max(-z, 0) + log(1 + exp(-|z|))
        bce += w * (alpha * t * (tl.maximum(-z, 0.0) + rest) + (1.0 - alpha) * (1.0 - t) * (tl.maximum(z, 0.0) + rest))
        count += w
        intersection += w * t * o
        prediction_sq += w * o * o
        target_sq += w * t * t
        start += programs * BLOCK
    row = out_ptr + tl.program_id(0).to(tl.int64) * out_row
    # bce and count are separate for each class here; they are added up with the rows.
    tl.store(row + v, tl.sum(bce))
    tl.store(row + V + v, tl.sum(count))
    tl.store(row + 2 * V + v, tl.sum(intersection))
    tl.store(row + 3 * V + v, tl.sum(prediction_sq))
    tl.store(row + 4 * V + v, tl.sum(target_sq))


@triton.jit
def _add_rows(rows_ptr, out_ptr, rows, row_step, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    # One program for each sum. A row holds WIDTH values of bce and of count, one for each class, and each counts all pixels.
    c = tl.program_id(0)
    first = tl.where(c < 2, c * WIDTH, 2 * WIDTH + c - 2)
    width = tl.where(c < 2, WIDTH, 1)
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        for k in range(0, width):
            total += tl.load(rows_ptr + row.to(tl.int64) * row_step + first + k, mask=row < rows, other=0.0)
    total = tl.sum(total)
    tl.store(out_ptr + c, tl.where(c == 1, total / WIDTH, total).to(tl.float32))


@triton.jit
def _sigmoid_gradient(
    z_ptr, t_ptr, w_ptr, g_ptr, dz_ptr, programs, pixels, V, alpha, ignore,
    z_n, z_v, z_p, t_n, t_v, t_p,
    HAS_WEIGHT: tl.constexpr, HAS_IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // programs).to(tl.int64)
    v = tl.program_id(1).to(tl.int64)
    p = (tl.program_id(0) % programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = p < pixels
    g_bce = tl.load(g_ptr)
    g_to = tl.load(g_ptr + 2 + v)
    g_oo = tl.load(g_ptr + 2 + V + v)
    label = tl.load(t_ptr + n * t_n + v * t_v + p * t_p, mask=inside, other=0)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(w_ptr + n).to(tl.float32)
    w = _weight(label, inside, weight, ignore, HAS_IGNORE)
    z = tl.load(z_ptr + n * z_n + v * z_v + p * z_p, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(w != 0.0, z, 0.0)
    t = tl.where(w != 0.0, label, 0).to(tl.float32)
    small = tl.exp(-tl.abs(z))
    o = tl.where(z >= 0, 1.0, small) / (1.0 + small)
    rest = tl.where(z >= 0, small, 1.0) / (1.0 + small)
    d = g_bce * ((1.0 - alpha) * (1.0 - t) * o - alpha * t * rest) + (g_to * t + 2.0 * g_oo * o) * o * rest
    tl.store(dz_ptr + n * z_n + v * z_v + p * z_p, (w * d).to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_tile(z_ptr, t_ptr, w_ptr, n, p, pixels, V, ignore, z_n, z_v, z_p, t_n, t_p,
                  HAS_WEIGHT: tl.constexpr, HAS_IGNORE: tl.constexpr, CLASSES: tl.constexpr):  # fmt: skip
    inside = p < pixels
    label = tl.load(t_ptr + n * t_n + p * t_p, mask=inside, other=0)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(w_ptr + n).to(tl.float32)
    w = _weight(label, inside, weight, ignore, HAS_IGNORE)
    label = tl.where(w != 0.0, label, 0)
    v = tl.arange(0, CLASSES)
    place = n * z_n + (p * z_p)[None, :] + (v.to(tl.int64) * z_v)[:, None]
    there = (v < V)[:, None] & inside[None, :]
    z = tl.load(z_ptr + place, mask=there, other=0.0).to(tl.float32)
    z = tl.where((w != 0.0)[None, :], z, 0.0)
    z = tl.where((v < V)[:, None], z, float("-inf"))
    z = z - tl.max(z, axis=0)[None, :]
    e = tl.exp(z)
    norm = tl.sum(e, axis=0)
    o = e / norm[None, :]
    t = v[:, None] == label[None, :]
    return z, o, t, norm, w, label, place, there


@triton.jit
def _softmax_sums(
    z_ptr, t_ptr, w_ptr, out_ptr, programs, pixels, V, alpha, ignore,
    z_n, z_v, z_p, t_n, t_p, out_row,
    HAS_WEIGHT: tl.constexpr, HAS_IGNORE: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bce = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    intersection = tl.zeros((CLASSES,), tl.float32)
    prediction_sq = tl.zeros((CLASSES,), tl.float32)
    target_sq = tl.zeros((CLASSES,), tl.float32)
    n = (tl.program_id(0) // programs).to(tl.int64)
    start = (tl.program_id(0) % programs).to(tl.int64) * BLOCK
    while start < pixels:
        z, o, t, norm, w, label, _, _ = _softmax_tile(
            z_ptr, t_ptr, w_ptr, n, start + tl.arange(0, BLOCK), pixels, V, ignore, z_n, z_v, z_p, t_n, t_p,
            HAS_WEIGHT, HAS_IGNORE, CLASSES,
        )  # fmt: skip
        log_o = tl.sum(tl.where(t, z, 0.0), axis=0) - tl.log(norm)
        bce += w * tl.where(label != 0, alpha, 1.0 - alpha) * -log_o
        count += w
        weighed = tl.where(t, w[None, :], 0.0)
        intersection += tl.sum(weighed * o, axis=1)
        prediction_sq += tl.sum(w[None, :] * o * o, axis=1)
        target_sq += tl.sum(weighed, axis=1)
        start += programs * BLOCK
    row = out_ptr + tl.program_id(0).to(tl.int64) * out_row
    v = tl.arange(0, CLASSES)
    tl.store(row, tl.sum(bce))
    tl.store(row + 1, tl.sum(count))
    tl.store(row + 2 + v, intersection, mask=v < V)
    tl.store(row + 2 + V + v, prediction_sq, mask=v < V)
    tl.store(row + 2 + 2 * V + v, target_sq, mask=v < V)


@triton.jit
def _softmax_gradient(
    z_ptr, t_ptr, w_ptr, g_ptr, dz_ptr, programs, pixels, V, alpha, ignore,
    z_n, z_v, z_p, t_n, t_p,
    HAS_WEIGHT: tl.constexpr, HAS_IGNORE: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // programs).to(tl.int64)
    p = (tl.program_id(0) % programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, o, t, _, w, label, place, there = _softmax_tile(
        z_ptr, t_ptr, w_ptr, n, p, pixels, V, ignore, z_n, z_v, z_p, t_n, t_p, HAS_WEIGHT, HAS_IGNORE, CLASSES
    )
    v = tl.arange(0, CLASSES)
    g_to = tl.load(g_ptr + 2 + v, mask=v < V, other=0.0)
    g_oo = tl.load(g_ptr + 2 + V + v, mask=v < V, other=0.0)
    h = tl.where(t, g_to[:, None], 0.0) + 2.0 * g_oo[:, None] * o
    a = tl.load(g_ptr) * tl.where(label != 0, alpha, 1.0 - alpha)
    d = a[None, :] * (o - tl.where(t, 1.0, 0.0)) + o * (h - tl.sum(h * o, axis=0)[None, :])
    tl.store(dz_ptr + place, (w[None, :] * d).to(dz_ptr.dtype.element_ty), mask=there)


def _layout(logits: Tensor, target: Tensor) -> Layout:
    N, V, H, W = logits.shape
    # H and W are contiguous, so one number addresses a pixel. Strides are computed: torch's are arbitrary where a size is 1.
    z_v, z_p = (H * W, 1) if logits.is_contiguous() else (1, V)
    if target.ndim == 3:
        return Layout(N, V, H * W, V * H * W, z_v, z_p, H * W, 0, 1)
    t_v, t_p = (H * W, 1) if target.is_contiguous() else (1, V)
    return Layout(N, V, H * W, V * H * W, z_v, z_p, V * H * W, t_v, t_p)


def _dense(x: Tensor) -> Tensor:
    # Contiguous and channels-last tensors are read without a copy.
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def _prepare(logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    check_target(logits, target)
    target = _dense(target)
    weight = None if sample_weight is None else sample_weight.contiguous()
    return _dense(logits), target.view(torch.uint8) if target.dtype == torch.bool else target, weight


def _is_softmax(logits: Tensor, target: Tensor) -> bool:
    return logits.shape[1] > 1 and target.ndim == 3


def softmax_sizes(V: int) -> dict[str, int]:
    """Return the constants of the softmax kernels.

    Args:
        V: classes.
    """
    classes = triton.next_power_of_2(V)
    return {"CLASSES": classes, "BLOCK": max(16, SOFTMAX_TILE // classes)}


def programs_of_a_sample(at: Layout, block: int) -> int:
    """Return how many programs share the pixels of a sample, for about MAX_PROGRAMS in all.

    Args:
        at: layout of logits and target.
        block: pixels that a program holds at a time.
    """
    blocks: int = triton.cdiv(at.pixels, block)
    return max(1, min(blocks, MAX_PROGRAMS // (at.N * at.V)))


def _added_up(rows: Tensor, V: int, width: int) -> Tensor:
    sums = torch.empty(2 + 3 * V, dtype=torch.float32, device=rows.device)
    with backend.device_of(rows):
        _add_rows[(len(sums),)](rows, sums, len(rows), rows.stride(0), WIDTH=width, ROWS=ROWS, num_warps=ROW_WARPS)
    return sums


@torch.library.custom_op("deepskip::bce_dice_sums", mutates_args=())
def _sums(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, alpha: float, ignore_index: int | None
) -> Tensor:
    z, t, w = _prepare(logits, target, sample_weight)
    if not z.numel():
        return torch.zeros(2 + 3 * z.shape[1], device=z.device)
    at = _layout(z, t)
    ignore = ignored_label(target.dtype, ignore_index)
    # Without weights the kernel needs some pointer, which it does not read.
    weight = z if w is None else w
    strides = (at.z_n, at.z_v, at.z_p, at.t_n)
    if _is_softmax(logits, target):
        sizes = softmax_sizes(at.V)
        programs = programs_of_a_sample(at, sizes["BLOCK"])
        rows = torch.empty(at.N * programs, 2 + 3 * at.V, dtype=torch.float32, device=z.device)
        with backend.device_of(z):
            _softmax_sums[(len(rows),)](
                z, t, weight, rows, programs, at.pixels, at.V, alpha, ignore or 0, *strides, at.t_p, rows.stride(0),
                HAS_WEIGHT=w is not None, HAS_IGNORE=ignore is not None, **sizes, num_warps=WARPS,
            )  # fmt: skip
        return _added_up(rows, at.V, 1)
    if backend.uses_next(timings.loss(at.V), z) and bce_dice_wide_triton.fits(at, z, t):
        return _added_up(bce_dice_wide_triton.sum_rows(at, z, t, w, alpha, ignore), at.V, at.V)
    block = SIGMOID_BLOCK
    programs = programs_of_a_sample(at, block)
    rows = torch.empty(at.N * programs, 5 * at.V, dtype=torch.float32, device=z.device)
    with backend.device_of(z):
        _sigmoid_sums[(len(rows), at.V)](
            z, t, weight, rows, programs, at.pixels, at.V, alpha, ignore or 0, *strides, at.t_v, at.t_p, rows.stride(0),
            HAS_WEIGHT=w is not None, HAS_IGNORE=ignore is not None, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return _added_up(rows, at.V, at.V)


@_sums.register_fake
def _(logits: Tensor, target: Tensor, sample_weight: Tensor | None, alpha: float, ignore_index: int | None) -> Tensor:
    return logits.new_empty(2 + 3 * logits.shape[1], dtype=torch.float32)


@torch.library.custom_op("deepskip::bce_dice_gradient", mutates_args=())
def _gradient(
    grad: Tensor, logits: Tensor, target: Tensor, sample_weight: Tensor | None, alpha: float, ignore_index: int | None
) -> Tensor:
    z, t, w = _prepare(logits, target, sample_weight)
    at = _layout(z, t)
    ignore = ignored_label(target.dtype, ignore_index)
    weight = z if w is None else w
    strides = (at.z_n, at.z_v, at.z_p, at.t_n)
    dz = torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=z.device)
    if not z.numel():
        return dz
    g = grad.contiguous()
    if _is_softmax(logits, target):
        sizes = softmax_sizes(at.V)
        programs = triton.cdiv(at.pixels, sizes["BLOCK"])
        with backend.device_of(z):
            _softmax_gradient[(at.N * programs,)](
                z, t, weight, g, dz, programs, at.pixels, at.V, alpha, ignore or 0, *strides, at.t_p,
                HAS_WEIGHT=w is not None, HAS_IGNORE=ignore is not None, **sizes, num_warps=WARPS,
            )  # fmt: skip
    elif backend.uses_next(timings.loss(at.V), z) and bce_dice_wide_triton.fits(at, z, t):
        bce_dice_wide_triton.gradient(at, g, z, t, w, dz, alpha, ignore)
    else:
        block = SIGMOID_BLOCK
        programs = triton.cdiv(at.pixels, block)
        with backend.device_of(z):
            _sigmoid_gradient[(at.N * programs, at.V)](
                z, t, weight, g, dz, programs, at.pixels, at.V, alpha, ignore or 0, *strides, at.t_v, at.t_p,
                HAS_WEIGHT=w is not None, HAS_IGNORE=ignore is not None, BLOCK=block, num_warps=WARPS,
            )  # fmt: skip
    return dz


@_gradient.register_fake
def _(
    grad: Tensor, logits: Tensor, target: Tensor, sample_weight: Tensor | None, alpha: float, ignore_index: int | None
) -> Tensor:
    return torch.empty_like(logits)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, sample_weight, ctx.alpha, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, sample_weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, target, sample_weight = ctx.saved_tensors
    dz = _gradient(grad, logits, target, sample_weight, ctx.alpha, ctx.ignore_index)
    return dz, None, None, None, None


def no_second_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Raise the error for a second derivative; every Triton operator's gradient registers this as its backward.

    Args:
        ctx: autograd's context.
        grads: gradients of any shape (*,).

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "Triton kernels have no second derivative; DEEPSKIP_KERNELS=reference differentiates any number of times"
    )


_sums.register_autograd(_backward, setup_context=_keep)
_gradient.register_autograd(no_second_backward, setup_context=lambda ctx, inputs, output: None)


def must_run(x: Tensor) -> None:
    """Check that Triton kernels can run on a tensor's device.

    Meta tensors pass: nothing runs on them, and the benchmarks count with them.

    Args:
        x: tensor of any shape (*,).

    Raises:
        ValueError: if the tensor is neither a CUDA nor a meta tensor, and the interpreter is off.
    """
    if not (x.is_cuda or x.is_meta or INTERPRETED):
        raise ValueError(
            f"Triton kernels cannot run on a tensor on {x.device}; set DEEPSKIP_KERNELS and run.kernels to auto, "
            "or TRITON_INTERPRET=1 for the slow interpreter"
        )


def bce_dice_sums(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    ignore_index: int | None = 255,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Compute the sums that weighted BCE and Dice are made of (eqs. 6 and 7), as `reference.bce_dice_sums`.

    Args:
        logits: logits (N, V, H, W), fp32, fp16 or bf16; contiguous or channels last, other layouts are copied.
        target: labels (N, H, W) or (N, V, H, W), uint8, int16, int32, int64 or bool.
        alpha: weight of foreground pixels in BCE; background gets 1 - alpha.
        ignore_index: label of pixels that are not counted; None counts all.
        sample_weight: weights of the samples, (N,), or None for all one.

    Returns:
        Sums (2 + 3 V,) in fp32.

    Raises:
        ValueError: if the target does not fit the logits, or the tensors are on a CPU.
        RuntimeError: if a second derivative is computed.
    """
    must_run(logits)
    sums: Tensor = _sums(logits, target, sample_weight, alpha, ignore_index)
    return sums
