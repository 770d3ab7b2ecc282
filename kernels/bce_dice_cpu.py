"""Weighted BCE + Dice for CPUs: plain PyTorch, a block of pixels at a time, with an explicit gradient (eqs. 5 to 8).

A block stays in the cache through all its operators. Only the inputs are kept for backward, and there is no one-hot tensor. The
formulas are those of `bce_dice_triton`. Blocks are added up in fp64 in a fixed order: the same input gives the same sums.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip.kernels.reference import check_target, ignored_label

# Elements of logits in a block, measured: smaller blocks spend their time in calls, larger ones do not fit the cache.
BLOCK = 2**18
# The BCE of a batch without a counted pixel is 0, not nan.
TINY = torch.finfo(torch.float32).tiny


def _blocks(logits: Tensor, target: Tensor, weight: Tensor | None) -> Iterator[tuple[slice, slice, float]]:
    """Yield samples, rows and the samples' weight; samples of weight 0 are skipped.

    A block is some rows of one sample, or several whole samples of the same weight: for small samples the calls themselves
    cost time.
    """
    N, V, H, W = logits.shape
    rows = min(H, max(1, BLOCK // max(1, V * W)))
    samples = max(1, BLOCK // max(1, V * H * W))
    weights = [1.0] * N if weight is None else weight.tolist()
    n = 0
    while n < N:
        end = n + 1
        while end < min(N, n + samples) and weights[end] == weights[n]:
            end += 1
        for top in range(0, H, rows) if weights[n] else ():
            yield slice(n, end), slice(top, top + rows), weights[n]
        n = end


def _counted(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """Return which labels count, as bool, or None if all of them certainly do, which saves work."""
    if ignore_index is None:
        return None
    # Finding the extremes of bytes is thirty times as fast as comparing each with the ignored label.
    if int(labels.amax()) < ignore_index or int(labels.amin()) > ignore_index:
        return None
    return labels != ignore_index


def _sigmoid_block(z: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return z, t, o in fp32, and which pixels count, for a block (n, V, rows, W).

    z and t are 0 where nothing counts.
    """
    counts = _counted(labels, ignore_index)
    z, t = z.float(), labels.float()
    if counts is not None:
        z, t = torch.where(counts, z, 0.0), torch.where(counts, t, 0.0)
    o = torch.sigmoid(z)
    return z, t, o, counts


def _softmax_block(z: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log o in fp32 (n, V, rows, W), labels in int64 (n, 1, rows, W), and which pixels count.

    Labels are 0 where nothing counts.
    """
    counts = _counted(labels, ignore_index)
    z, labels = z.float(), labels.long()
    if counts is not None:
        z, labels = torch.where(counts, z, 0.0), torch.where(counts, labels, 0)
    return F.log_softmax(z, 1), labels, counts


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Sum x * y of blocks (n, V, rows, W) over all axes but V."""
    if x.shape[1] == 1:
        return x.flatten().dot(y.flatten())[None]
    # A class of one sample is contiguous.
    return sum(
        (
            torch.stack([a.dot(b) for a, b in zip(p.flatten(1), q.flatten(1), strict=True)])
            for p, q in zip(x, y, strict=True)
        ),
        torch.zeros(x.shape[1]),
    )


def _balance(t: Tensor, alpha: float, scale: float = 1.0) -> Tensor:
    """Return alpha where t is 1 and 1 - alpha where it is 0, times scale; one number if the two are equal."""
    if alpha == 0.5:
        return torch.tensor(0.5 * scale)
    return torch.add(torch.tensor((1 - alpha) * scale), t, alpha=(2 * alpha - 1) * scale)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, alpha: float, ignore_index: int | None
    ) -> Tensor:
        ctx.save_for_backward(logits, target, weight)
        ctx.alpha, ctx.ignore_index = alpha, ignore_index
        V = logits.shape[1]
        sums = torch.zeros(2 + 3 * V, dtype=torch.float64)
        exclusive = V > 1 and target.ndim == 3
        for n, rows, w in _blocks(logits, target, weight):
            z, labels = logits[n, :, rows], (target if target.ndim == 4 else target[:, None])[n, :, rows]
            if exclusive:
                log_o, labels, counts = _softmax_block(z, labels, ignore_index)
                picked = log_o.gather(1, labels)
                a = torch.where(labels != 0, alpha, 1 - alpha)
                o = log_o.exp_()
                probability = picked.exp()
                if counts is not None:
                    a, probability, o = a * counts, probability * counts, o * counts
                flat = labels.flatten()
                sums[0] -= w * (a * picked).sum()
                pixels = flat.numel() if counts is None else counts.sum()
                sums[1] += w * pixels
                sums[2 : 2 + V] += w * torch.bincount(flat, probability.flatten().double(), V)
                sums[2 + V : 2 + 2 * V] += w * o.square_().sum((0, 2, 3))
                each = torch.bincount(flat if counts is None else flat[counts.flatten()], minlength=V)
                sums[2 + 2 * V :] += w * each
                continue
            z, t, o, counts = _sigmoid_block(z, labels, ignore_index)
            # This is -log o where t is 1 and -log(1 - o) where it is 0, without a difference of large numbers.
            bce = F.softplus(torch.addcmul(z, t, z, value=-2))
            pixels = t.numel() if counts is None else counts.sum()
            if counts is not None:
                bce, o = bce * counts, o * counts
            a = _balance(t, alpha)
            total = a * bce.sum() if a.ndim == 0 else a.flatten().dot(bce.flatten())
            parts = [total[None], torch.as_tensor(pixels / V)[None], _dots(t, o), _dots(o, o), _dots(t, t)]
            sums.add_(torch.cat(parts), alpha=w)
        return sums.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight = ctx.saved_tensors
        alpha, ignore_index = ctx.alpha, ctx.ignore_index
        V = logits.shape[1]
        exclusive = V > 1 and target.ndim == 3
        dz = torch.zeros_like(logits) if weight is not None else torch.empty_like(logits)
        g_bce = grad[0].item()
        g_to, g_oo = grad[2 : 2 + V], grad[2 + V : 2 + 2 * V, None, None]
        for n, rows, w in _blocks(logits, target, weight):
            z, labels = logits[n, :, rows], (target if target.ndim == 4 else target[:, None])[n, :, rows]
            if exclusive:
                log_o, labels, counts = _softmax_block(z, labels, ignore_index)
                o = log_o.exp_()
                # h o; the term with t is added only where t is not 0.
                ho = (2 * g_oo * o).mul_(o)
                picked = o.gather(1, labels)
                ho.scatter_add_(1, labels, picked * g_to[labels])
                a = g_bce * torch.where(labels != 0, alpha, 1 - alpha)
                d = ho.addcmul_(o, a - ho.sum(1, keepdim=True))
                d.scatter_add_(1, labels, -a)
            else:
                z, t, o, counts = _sigmoid_block(z, labels, ignore_index)
                h = torch.addcmul(t * g_to[:, None, None], o, 2 * g_oo)
                d = (o - t).mul_(_balance(t, alpha, g_bce))
                d.addcmul_(torch.addcmul(o, o, o, value=-1), h)
            if w != 1:
                d *= w
            if counts is not None:
                d *= counts
            dz[n, :, rows] = d
        return dz, None, None, None, None


def bce_dice_sums(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    ignore_index: int | None = 255,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Compute the sums that weighted BCE and Dice are made of (eqs. 6 and 7), as `reference.bce_dice_sums`.

    It has no second derivative.

    Args:
        logits: logits (N, V, H, W), fp32, fp16 or bf16.
        target: labels (N, H, W), or (N, V, H, W) for independent labels.
        alpha: weight of foreground pixels in BCE; background gets 1 - alpha.
        ignore_index: label of pixels that are not counted; None counts all.
        sample_weight: weights of the samples, (N,), or None for all one.

    Returns:
        Sums (2 + 3 V,) in fp32.

    Raises:
        ValueError: if the target does not fit the logits.
    """
    check_target(logits, target)
    ignored = ignored_label(target.dtype, ignore_index)
    sums: Tensor = _Sums.apply(logits, target, sample_weight, alpha, ignored)  # type: ignore[no-untyped-call]
    return sums


class _Loss(torch.autograd.Function):
    # For a few numbers, Python takes a tenth of the time of tensor operators and their gradients.

    @staticmethod
    def forward(ctx: Any, sums: Tensor, class_weights: Tensor | None, beta: float, eps: float) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.beta, ctx.eps = sums.tolist(), beta, eps
        V = (len(ctx.sums) - 2) // 3
        ctx.class_weights = [1 / V] * V if class_weights is None else class_weights.tolist()
        bce_sum, count, *rest = ctx.sums
        bce = bce_sum / max(count, TINY)
        intersection, prediction_sq, target_sq = rest[:V], rest[V : 2 * V], rest[2 * V :]
        dice = 1 - sum(
            q * (2 * x + eps) / (y + z + eps)
            for q, x, y, z in zip(ctx.class_weights, intersection, prediction_sq, target_sq, strict=True)
        )
        return sums.new_tensor(beta * bce + dice), sums.new_tensor(bce), sums.new_tensor(dice)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g_loss, g_bce, g_dice = (0.0 if grad is None else grad.item() for grad in grads)
        g_bce, g_dice = g_loss * ctx.beta + g_bce, g_loss + g_dice
        V = len(ctx.class_weights)
        bce_sum, count, *rest = ctx.sums
        intersection, prediction_sq, target_sq = rest[:V], rest[V : 2 * V], rest[2 * V :]
        sizes = [y + z + ctx.eps for y, z in zip(prediction_sq, target_sq, strict=True)]
        d_intersection = [-2 * g_dice * q / size for q, size in zip(ctx.class_weights, sizes, strict=True)]
        d_size = [
            g_dice * q * (2 * x + ctx.eps) / size**2
            for q, x, size in zip(ctx.class_weights, intersection, sizes, strict=True)
        ]
        d_count = -g_bce * bce_sum / count**2 if count > TINY else 0.0
        return torch.tensor([g_bce / max(count, TINY), d_count, *d_intersection, *d_size, *d_size]), None, None, None


def loss_of_sums(
    sums: Tensor, class_weights: Tensor | None = None, beta: float = 1.0, eps: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, BCE and Dice (eqs. 5 to 7) from the sums, as `reference.loss_of_sums`; once differentiable.

    Args:
        sums: sums (2 + 3 V,).
        class_weights: Q_v of eq. 7, (V,), with sum 1; None weights all classes equally.
        beta: weight of BCE.
        eps: smoothing of Dice, in pixels.

    Returns:
        Loss, BCE and Dice, scalars.
    """
    parts: tuple[Tensor, Tensor, Tensor] = _Loss.apply(sums, class_weights, beta, eps)  # type: ignore[no-untyped-call]
    return parts
