"""Operators that DeepSkip spends its time in; `backend` says which implementation a tensor gets."""

from torch import Tensor

from kernels import backend, bce_dice_cpu, reference
from kernels.reference import deep_skip

# tells this package from another one of the same name on PyPI; `import deepskip` looks for it
PROJECT = "deepskip"

__all__ = ["PROJECT", "backend", "bce_dice_sums", "deep_skip"]


def bce_dice_sums(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    ignore_index: int | None = 255,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Returns the sums that weighted BCE and Dice are made of (eqs. 6 and 7); see `reference.bce_dice_sums`."""
    found = backend.implementation(logits)
    if found == "triton":
        # triton is not there on every system
        from kernels import bce_dice

        sums = bce_dice.bce_dice_sums
    else:
        sums = bce_dice_cpu.bce_dice_sums if found == "cpu" else reference.bce_dice_sums
    return sums(logits, target, alpha=alpha, ignore_index=ignore_index, sample_weight=sample_weight)
