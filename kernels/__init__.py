"""Operators that DeepSkip spends its time in; the plain PyTorch forms in `reference` are the only backend so far."""

from kernels.reference import bce_dice_sums, deep_skip

# tells this package from another one of the same name on PyPI; `import deepskip` looks for it
PROJECT = "deepskip"

__all__ = ["PROJECT", "bce_dice_sums", "deep_skip"]
