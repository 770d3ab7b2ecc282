"""Weighted BCE + Dice for CPUs: plain PyTorch, a block of pixels at a time, with the gradient written out (eqs. 5 to 8).

A block stays in the cache through all its operators, nothing but the inputs is kept for backward, and there is no one-hot. The
formulas are those of `bce_dice`. Blocks are added up in fp64, in their order: the same input gives the same sums.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import check_target

# elements of logits in a block: measured; smaller ones spend their time in calls, larger ones leave the cache
BLOCK = 2**18


def _blocks(logits: Tensor, target: Tensor, weight: Tensor | None) -> Iterator[tuple[int, slice, float]]:
    """Yields sample, rows and weight; samples of weight 0 are left out."""
    N, V, H, W = logits.shape
    rows = max(1, BLOCK // (V * W))
    weights = [1.0] * N if weight is None else weight.tolist()
    for n in range(N):
        for top in range(0, H, rows) if weights[n] else ():
            yield n, slice(top, top + rows), weights[n]


def _counted(labels: Tensor, ignore_index: int | None) -> Tensor | None:
    """Gives which labels count, as bool; None where all do, for sure, which saves work."""
    if ignore_index is None or labels.dtype == torch.bool:
        return None
    # the extremes of bytes are found thirty times as fast as whether any of them is the one
    if int(labels.amax()) < ignore_index or int(labels.amin()) > ignore_index:
        return None
    return labels != ignore_index


def _sigmoid_block(z: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gives z, t, o in fp32 and what counts, for (V, rows, W); z and t are 0 where nothing counts."""
    counts = _counted(labels, ignore_index)
    z, t = z.float(), labels.float()
    if counts is not None:
        z, t = torch.where(counts, z, 0.0), torch.where(counts, t, 0.0)
    o = torch.sigmoid(z)
    return z, t, o, counts


def _softmax_block(z: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gives log o in fp32 (V, rows, W), labels int64 (rows, W) and what counts; labels are 0 where nothing counts."""
    counts = _counted(labels, ignore_index)
    z, labels = z.float(), labels.long()
    if counts is not None:
        z, labels = torch.where(counts, z, 0.0), torch.where(counts, labels, 0)
    return F.log_softmax(z, 0), labels, counts


def balance(t: Tensor, alpha: float) -> Tensor:
    """Gives alpha where t is 1, and 1 - alpha where it is 0."""
    return (t * (2 * alpha - 1)).add_(1 - alpha)


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
            z, labels = logits[n, :, rows], target[n, ..., rows, :]
            if exclusive:
                log_o, labels, counts = _softmax_block(z, labels, ignore_index)
                picked = log_o.gather(0, labels[None])[0]
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
                sums[2 + V : 2 + 2 * V] += w * o.square_().sum((1, 2))
                each = torch.bincount(flat if counts is None else flat[counts.flatten()], minlength=V)
                sums[2 + 2 * V :] += w * each
                continue
            z, t, o, counts = _sigmoid_block(z, labels if labels.ndim == 3 else labels[None], ignore_index)
            # -log o where t is 1, -log (1 - o) where it is 0, without a difference of large numbers
            bce = balance(t, alpha).mul_(F.softplus(torch.addcmul(z, t, z, value=-2)))
            pixels = t.numel() if counts is None else counts.sum()
            if counts is not None:
                bce, o = bce * counts, o * counts
            sums[0] += w * bce.sum()
            sums[1] += w * pixels / V
            t, o = t.flatten(1), o.flatten(1)
            for part, (x, y) in enumerate(((t, o), (o, o), (t, t))):
                sums[2 + part * V : 2 + (part + 1) * V] += w * torch.stack(
                    [a.dot(b) for a, b in zip(x, y, strict=True)]
                )
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
            z, labels = logits[n, :, rows], target[n, ..., rows, :]
            if exclusive:
                log_o, labels, counts = _softmax_block(z, labels, ignore_index)
                o = log_o.exp_()
                # h o, with t where it is not 0
                ho = (2 * g_oo * o).mul_(o)
                picked = o.gather(0, labels[None])
                ho.scatter_add_(0, labels[None], picked * g_to[labels][None])
                a = g_bce * torch.where(labels != 0, alpha, 1 - alpha)
                d = ho.addcmul_(o, a - ho.sum(0))
                d.scatter_add_(0, labels[None], -a[None])
            else:
                z, t, o, counts = _sigmoid_block(z, labels if labels.ndim == 3 else labels[None], ignore_index)
                d = balance(t, alpha).mul_(o - t).mul_(g_bce)
                slope = o - o * o
                d.addcmul_(slope, t * g_to[:, None, None] + 2 * g_oo * o)
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
    """Returns the sums that weighted BCE and Dice are made of (eqs. 6 and 7), in fp32: as `reference.bce_dice_sums`.

    Shapes as there; logits fp32, fp16 or bf16. Has no second derivative. Raises ValueError for shapes that do not fit.
    """
    check_target(logits, target)
    return _Sums.apply(logits, target, sample_weight, alpha, ignore_index)
