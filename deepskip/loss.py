"""Compute weighted BCE + Dice over the global batch (eqs. 5 to 8)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepskip import kernels
from deepskip.sync_batch_norm import in_group


class LossParts(NamedTuple):
    """The loss (eq. 5) and its parts over the global batch, scalars.

    Attributes:
        loss: beta * BCE + the overlap term, Dice or soft IoU.
        bce: weighted BCE (eq. 6).
        dice: Dice loss (eq. 7).
    """

    loss: Tensor
    bce: Tensor
    dice: Tensor


def total_over_ranks(numbers: Tensor, carried: Tensor | None = None) -> Tensor:
    """Add up numbers over all ranks, by one all-reduce, without a gradient.

    Args:
        numbers: numbers of this rank, (S,).
        carried: other numbers to add up with them, in place, (n,), which spares them a collective of their own.
    """
    numbers = numbers.detach()
    if not in_group():
        return numbers
    total = numbers.clone() if carried is None else torch.cat([numbers, carried.to(numbers.dtype)])
    dist.all_reduce(total)
    if carried is not None:
        carried.copy_(total[len(numbers) :])
    return total[: len(numbers)]


class BCEDiceLoss(nn.Module):
    """Compute loss = beta * BCE + overlap, the same number and gradient on any number of workers.

    The overlap term is Dice (eq. 7) or soft IoU, J = S / (2 - S) of Dice's score S. For one class that is
    1 - (I + eps / 2) / (T + O - I + eps / 2), with the sums I of t o, T of t^2 and O of o^2.

    The paper's eq. 7 prints log o where o is meant: as printed it has no lower bound.

    In a torch.distributed process group the sums are added up over all ranks. The gradient of a rank is then its own
    share: the parameters' gradient is the SUM over ranks. DistributedDataParallel averages, so a trainer that uses it
    multiplies the loss by the world size.

    Args:
        alpha: weight of foreground pixels in BCE, 0 to 1; background gets 1 - alpha (eq. 6).
        beta: weight of BCE (eq. 5).
        class_weights: Q_v of eq. 7, one for each class, normalised to sum 1; equal by default.
        ignore_index: label of pixels that are not counted; None counts all.
        eps: smoothing of Dice, in pixels.
        overlap: "dice" or "iou".

    Raises:
        ValueError: if alpha, eps, class_weights or overlap are out of range.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 1.0,
        class_weights: Sequence[float] | None = None,
        ignore_index: int | None = 255,
        eps: float = 1.0,
        overlap: str = "dice",
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; it must be 0 to 1")
        if eps <= 0:
            raise ValueError(f"eps is {eps}; it must be more than 0, or an empty class divides by 0")
        if class_weights is not None and (min(class_weights) < 0 or sum(class_weights) <= 0):
            raise ValueError(f"class_weights are {list(class_weights)}; none may be negative, one must be positive")
        if overlap not in ("dice", "iou"):
            raise ValueError(f'overlap is {overlap!r}; it must be "dice" or "iou"')
        self.alpha, self.beta, self.ignore_index, self.eps = alpha, beta, ignore_index, eps
        self.overlap = overlap
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.normalized_weights: Tensor
        if class_weights is not None:
            # A buffer is copied to a device once, not with every loss.
            self.register_buffer(
                "normalized_weights",
                torch.tensor(class_weights, dtype=torch.float64) / sum(class_weights),
                persistent=False,
            )

    def parts(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None, *, carried: Tensor | None = None
    ) -> LossParts:
        """Compute the loss and its two parts.

        Args:
            logits: tensor (N, V, H, W).
            target: labels (N, H, W), or (N, V, H, W) for independent labels.
            sample_weight: weights of the samples, (N,); samples of weight 0 are not counted.
            carried: other numbers to add up over all ranks, in place, (n,); see `total_over_ranks`.
        """
        sums = self.sums(logits, target, sample_weight)
        if in_group():
            # The value is that of the global sums, the gradient that of the local ones.
            sums = sums + (total_over_ranks(sums, carried) - sums.detach())
        return self.from_sums(sums)

    def sums(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Compute this rank's sums (2 + 3 V,), as `kernels.bce_dice_sums` returns them.

        Args:
            logits: tensor (N, V, H, W).
            target: labels (N, H, W), or (N, V, H, W) for independent labels.
            sample_weight: weights of the samples, (N,); samples of weight 0 are not counted.
        """
        return kernels.bce_dice_sums(
            logits, target, alpha=self.alpha, ignore_index=self.ignore_index, sample_weight=sample_weight
        )

    def from_sums(self, sums: Tensor) -> LossParts:
        """Compute the loss from sums.

        Args:
            sums: sums (2 + 3 V,), as `kernels.bce_dice_sums` returns them.

        Raises:
            ValueError: if the number of class weights is not V.
        """
        weights = None
        if self.class_weights is not None:
            V = (len(sums) - 2) // 3
            if len(self.class_weights) != V:
                raise ValueError(f"{len(self.class_weights)} class_weights for {V} classes")
            self.normalized_weights = self.normalized_weights.to(sums.device)
            weights = self.normalized_weights.to(sums.dtype)
        parts = LossParts(*kernels.loss_of_sums(sums, weights, self.beta, self.eps))
        if self.overlap == "iou":
            # 1 - S / (2 - S), where the Dice loss is 1 - S.
            return parts._replace(loss=self.beta * parts.bce + 2 * parts.dice / (1 + parts.dice))
        return parts

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            logits: tensor (N, V, H, W).
            target: labels (N, H, W), or (N, V, H, W) for independent labels.
            sample_weight: weights of the samples, (N,); samples of weight 0 are not counted.
        """
        return self.parts(logits, target, sample_weight).loss
