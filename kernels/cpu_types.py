"""The number formats of the CPU forms: fp32, and bf16 where autocast asks for it."""

import torch
from torch import Tensor

# Numbers of bf16 in an int64.
IN_ONE_WORD = 4


def working_type(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which the CPU forms compute for an input, or None if they cannot.

    Args:
        x: input of any shape (*,).
    """
    if torch.is_autocast_enabled("cpu"):
        asked = torch.get_autocast_dtype("cpu")
        return asked if asked == torch.bfloat16 and x.dtype in (torch.float32, asked) else None
    return x.dtype if x.dtype == torch.float32 else None


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View bf16 tensors as int64, four numbers at a time, which torch copies faster; others, or all if one is odd, as they are.

    Args:
        *tensors: tensors (*, n), between which numbers are copied.
    """
    return tuple(x.view(torch.int64) for x in tensors) if all(_by_words(x) for x in tensors) else tensors


def _by_words(x: Tensor) -> bool:
    places = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.dtype == torch.bfloat16 and x.stride(-1) == 1 and all(place % IN_ONE_WORD == 0 for place in places)


def copy(into: Tensor, source: Tensor) -> None:
    """Copy a tensor into another of its shape (*, n) and dtype."""
    into, source = wide(into, source)
    into.copy_(source)
