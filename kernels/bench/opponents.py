"""Losses that the fused one is compared with; each takes logits and target and gives a scalar."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepskip import kernels
from deepskip.kernels import reference, torchvision_ops
from deepskip.kernels.bench import cases

Loss = Callable[[Tensor, Tensor], Tensor]


def fused(logits: Tensor, target: Tensor) -> Tensor:
    """This project's: Triton on a GPU, blocks on a CPU."""
    return kernels.loss_of_sums(kernels.bce_dice_sums(logits, target))[0]


def eager(logits: Tensor, target: Tensor) -> Tensor:
    """The plain PyTorch form."""
    return reference.loss_of_sums(reference.bce_dice_sums(logits, target))[0]


def monai_dice_ce(classes: int) -> Loss:
    """MONAI's DiceCELoss."""
    from monai.losses import DiceCELoss

    binary = classes == 1
    loss = DiceCELoss(sigmoid=binary, softmax=not binary, to_onehot_y=not binary, squared_pred=True, batch=True)
    return lambda logits, target: loss(logits, (target[:, None]).float())


def smp_dice_bce(classes: int) -> Loss:
    """segmentation_models_pytorch's Dice and its BCE, or torch's cross-entropy, added up."""
    # segmentation_models_pytorch imports torchvision
    torchvision_ops.declare()
    from segmentation_models_pytorch.losses import DiceLoss, SoftBCEWithLogitsLoss

    if classes == 1:
        dice, bce = DiceLoss("binary"), SoftBCEWithLogitsLoss()
        return lambda logits, target: dice(logits, target[:, None].float()) + bce(logits, target[:, None].float())
    dice, entropy = DiceLoss("multiclass"), torch.nn.CrossEntropyLoss()
    return lambda logits, target: dice(logits, target.long()) + entropy(logits, target.long())


def all_of(classes: int, **options: Any) -> dict[str, Loss]:
    """Return every loss by its name, options for torch.compile; those whose package is not installed are left out."""
    compiled = cases.compiled(eager, **(options or {"mode": "max-autotune-no-cudagraphs"}))
    found: dict[str, Loss] = {"deepskip": fused, "eager": eager, "torch.compile": compiled}
    for name, make in (("MONAI DiceCELoss", monai_dice_ce), ("smp Dice + BCE", smp_dice_bce)):
        try:
            found[name] = make(classes)
        except (ImportError, RuntimeError):
            # a torchvision of another build than torch's raises the latter
            continue
    return found
