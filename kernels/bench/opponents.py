"""Losses to compare with the fused one; each takes logits and target and returns a scalar."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepskip import kernels
from deepskip.kernels import reference, torchvision_ops
from deepskip.kernels.bench import cases

Loss = Callable[[Tensor, Tensor], Tensor]


def fused(logits: Tensor, target: Tensor) -> Tensor:
    """Compute this project's loss: Triton on a GPU, blocks on a CPU.

    Args:
        logits: logits (N, V, H, W).
        target: labels (N, H, W).
    """
    return kernels.loss_of_sums(kernels.bce_dice_sums(logits, target))[0]


def eager(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the plain PyTorch loss.

    Args:
        logits: logits (N, V, H, W).
        target: labels (N, H, W).
    """
    return reference.loss_of_sums(reference.bce_dice_sums(logits, target))[0]


def monai_dice_ce(classes: int) -> Loss:
    """Return MONAI's DiceCELoss for that many classes."""
    from monai.losses import DiceCELoss

    binary = classes == 1
    loss = DiceCELoss(sigmoid=binary, softmax=not binary, to_onehot_y=not binary, squared_pred=True, batch=True)
    return lambda logits, target: loss(logits, (target[:, None]).float())


def smp_dice_bce(classes: int) -> Loss:
    """Return the sum of segmentation_models_pytorch's Dice and its BCE, or torch's cross-entropy."""
    # segmentation_models_pytorch imports torchvision.
    torchvision_ops.declare()
    from segmentation_models_pytorch.losses import DiceLoss, SoftBCEWithLogitsLoss

    if classes == 1:
        dice, bce = DiceLoss("binary"), SoftBCEWithLogitsLoss()
        return lambda logits, target: dice(logits, target[:, None].float()) + bce(logits, target[:, None].float())
    dice, entropy = DiceLoss("multiclass"), torch.nn.CrossEntropyLoss()
    return lambda logits, target: dice(logits, target.long()) + entropy(logits, target.long())


def all_of(classes: int, **options: Any) -> dict[str, Loss]:
    """Return every loss by its name, except those whose package is not installed.

    Args:
        classes: number of classes.
        options: options of torch.compile.
    """
    compiled = cases.compiled(eager, **(options or {"mode": "max-autotune-no-cudagraphs"}))
    found: dict[str, Loss] = {"deepskip": fused, "eager": eager, "torch.compile": compiled}
    for name, make in (("MONAI DiceCELoss", monai_dice_ce), ("smp Dice + BCE", smp_dice_bce)):
        try:
            found[name] = make(classes)
        except (ImportError, RuntimeError):
            # A torchvision built for another torch raises RuntimeError.
            continue
    return found
