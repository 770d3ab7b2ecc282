"""Prepare a device, and copy tensors to it without waiting."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from deepskip.allocator import keep_freed_memory

T = TypeVar("T", bound=Mapping[str, Any])


def prepared(device: torch.device | str) -> torch.device:
    """Return a device that is ready to train on."""
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        # Events are recorded on the current device.
        torch.cuda.set_device(device)
    return device


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


def on_device(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    """Yield batches with their tensors on the device, copied while the last batch is computed."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        # With a stream of None the context does nothing.
        with torch.cuda.stream(stream):
            moved = {k: to_device(v, device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if stream is not None:
            now = torch.cuda.current_stream(device)
            now.wait_stream(stream)
            for value in moved.values():
                if isinstance(value, Tensor):
                    # Its memory must not be reused by the next copy while this stream still reads it.
                    value.record_stream(now)
        yield cast(T, moved)
