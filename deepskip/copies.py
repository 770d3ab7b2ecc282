"""Copy tensors to a device without waiting for it."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for the copy.

    A copy from pageable memory to a GPU would wait for all work that is queued there.

    Args:
        x: tensor of any shape (*,).
        device: where it is needed.
    """
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
