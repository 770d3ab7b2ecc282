"""Loss, BCE and Dice of the sums (eqs. 5 to 7) in Triton: one launch, and one for the gradient.

As tensor operators they are some forty launches on a few numbers, more time than the pixels take for small images.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepskip.kernels import backend
from deepskip.kernels.bce_dice_triton import must_run, no_second_backward

# The smallest normal fp32: the BCE of a batch without a counted pixel is 0, not nan.
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _loss_of_sums(s_ptr, q_ptr, loss_ptr, bce_ptr, dice_ptr, V, beta, eps, HAS_Q: tl.constexpr, CLASSES: tl.constexpr):
    v = tl.arange(0, CLASSES)
    intersection = tl.load(s_ptr + 2 + v, mask=v < V, other=0.0)
    prediction_sq = tl.load(s_ptr + 2 + V + v, mask=v < V, other=0.0)
    target_sq = tl.load(s_ptr + 2 + 2 * V + v, mask=v < V, other=0.0)
    q = tl.where(v < V, 1.0 / V, 0.0)
    if HAS_Q:
        q = tl.load(q_ptr + v, mask=v < V, other=0.0)
    bce = tl.load(s_ptr) / tl.maximum(tl.load(s_ptr + 1), TINY)
    dice = 1.0 - tl.sum(q * (2.0 * intersection + eps) / (target_sq + prediction_sq + eps))
    tl.store(loss_ptr, beta * bce + dice)
    tl.store(bce_ptr, bce)
    tl.store(dice_ptr, dice)


@triton.jit
def _loss_of_sums_gradient(
    g_loss_ptr, g_bce_ptr, g_dice_ptr, s_ptr, q_ptr, ds_ptr, V, beta, eps,
    HAS_LOSS: tl.constexpr, HAS_BCE: tl.constexpr, HAS_DICE: tl.constexpr, HAS_Q: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    v = tl.arange(0, CLASSES)
    intersection = tl.load(s_ptr + 2 + v, mask=v < V, other=0.0)
    prediction_sq = tl.load(s_ptr + 2 + V + v, mask=v < V, other=0.0)
    target_sq = tl.load(s_ptr + 2 + 2 * V + v, mask=v < V, other=0.0)
    q = tl.where(v < V, 1.0 / V, 0.0)
    if HAS_Q:
        q = tl.load(q_ptr + v, mask=v < V, other=0.0)
    bce, count = tl.load(s_ptr), tl.load(s_ptr + 1)
    g_bce, g_dice = 0.0, 0.0
    if HAS_LOSS:
        g_dice = tl.load(g_loss_ptr)
        g_bce = beta * g_dice
    if HAS_BCE:
        g_bce += tl.load(g_bce_ptr)
    if HAS_DICE:
        g_dice += tl.load(g_dice_ptr)
    pixels = tl.maximum(count, TINY)
    tl.store(ds_ptr, g_bce / pixels)
    tl.store(ds_ptr + 1, tl.where(count > TINY, -g_bce * bce / pixels / pixels, 0.0))
    size = target_sq + prediction_sq + eps
    d_size = g_dice * q * (2.0 * intersection + eps) / size / size
    tl.store(ds_ptr + 2 + v, -2.0 * g_dice * q / size, mask=v < V)
    tl.store(ds_ptr + 2 + V + v, d_size, mask=v < V)
    tl.store(ds_ptr + 2 + 2 * V + v, d_size, mask=v < V)


@torch.library.custom_op("deepskip::loss_of_sums", mutates_args=())
def _loss(sums: Tensor, class_weights: Tensor | None, beta: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    V = (len(sums) - 2) // 3
    out = [torch.empty((), dtype=torch.float32, device=sums.device) for _ in range(3)]
    with backend.device_of(sums):
        _loss_of_sums[(1,)](
            sums.contiguous(), sums if class_weights is None else class_weights, *out, V, beta, eps,
            HAS_Q=class_weights is not None, CLASSES=triton.next_power_of_2(V), num_warps=1,
        )  # fmt: skip
    return out[0], out[1], out[2]


@_loss.register_fake
def _(sums: Tensor, class_weights: Tensor | None, beta: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return sums.new_empty(()), sums.new_empty(()), sums.new_empty(())


@torch.library.custom_op("deepskip::loss_of_sums_gradient", mutates_args=())
def _loss_gradient(
    g_loss: Tensor | None, g_bce: Tensor | None, g_dice: Tensor | None,
    sums: Tensor, class_weights: Tensor | None, beta: float, eps: float,
) -> Tensor:  # fmt: skip
    V = (len(sums) - 2) // 3
    out = torch.empty(2 + 3 * V, dtype=torch.float32, device=sums.device)
    grads = [sums if g is None else g for g in (g_loss, g_bce, g_dice)]
    with backend.device_of(sums):
        _loss_of_sums_gradient[(1,)](
            *grads, sums.contiguous(), sums if class_weights is None else class_weights, out, V, beta, eps,
            HAS_LOSS=g_loss is not None, HAS_BCE=g_bce is not None, HAS_DICE=g_dice is not None,
            HAS_Q=class_weights is not None, CLASSES=triton.next_power_of_2(V), num_warps=1,
        )  # fmt: skip
    return out


@_loss_gradient.register_fake
def _(
    g_loss: Tensor | None, g_bce: Tensor | None, g_dice: Tensor | None,
    sums: Tensor, class_weights: Tensor | None, beta: float, eps: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(sums)


def _keep_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sums, class_weights, ctx.beta, ctx.eps = inputs
    ctx.save_for_backward(sums, class_weights)
    # Materializing a gradient of zeros would cost a launch.
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    sums, class_weights = ctx.saved_tensors
    ds = _loss_gradient(*grads, sums, class_weights, ctx.beta, ctx.eps)
    return ds, None, None, None


_loss.register_autograd(_loss_backward, setup_context=_keep_sums)
_loss_gradient.register_autograd(no_second_backward, setup_context=lambda ctx, inputs, output: None)


def loss_of_sums(
    sums: Tensor, class_weights: Tensor | None = None, beta: float = 1.0, eps: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, BCE and Dice (eqs. 5 to 7) from the sums, as `reference.loss_of_sums`.

    Args:
        sums: sums (2 + 3 V,) in fp32.
        class_weights: Q_v of eq. 7, (V,) fp32 on the same device, with sum 1; None weights all classes equally.
        beta: weight of BCE.
        eps: smoothing of Dice, in pixels.

    Returns:
        Loss, BCE and Dice, fp32 scalars.

    Raises:
        ValueError: if the sums are on a CPU.
        RuntimeError: if a second derivative is computed.
    """
    must_run(sums)
    parts: tuple[Tensor, Tensor, Tensor] = _loss(sums, class_weights, beta, eps)
    return parts
