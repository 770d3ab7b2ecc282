"""Compute the gradient of a step a part at a time, so that memory is that of one part.

The loss is a function of a few sums over the global batch, L(S), S = sum of s_p over the parts p of all ranks.

    first    the sums s_p of all parts, without a graph but for the last part; S by one all-reduce
    then     dL/dS, and the gradient of dL/dS . s_p of each part: that of the last from its graph, the others anew

By the chain rule the gradients add up to that of L. With n parts, 2n - 1 forward passes and n backward ones take place of
n and n.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepskip.loss import LossParts, total_over_ranks

if TYPE_CHECKING:
    from deepskip.training_step import TrainingStep


def gradients(
    training: "TrainingStep", image: Tensor, mask: Tensor, weight: Tensor, votes: Tensor
) -> tuple[LossParts, Tensor]:
    """Accumulate the gradient of the global batch in the weights, and return the loss and this rank's overlap counts.

    Each part finds the network's buffers as they were, and those of the first part are kept: running statistics are then
    those of a rank whose whole share is a part. Random numbers are drawn from the first part to the last, twice the same.

    Args:
        training: training with `part_size`, the number of samples in a part.
        image: normalised images (N, bands, H, W).
        mask: labels (N, H, W).
        weight: weights of the samples, (N,).
        votes: added up over all ranks, in place, (1,).
    """
    size, criterion, world_size = training.part_size, training.criterion, training.world_size
    assert size is not None
    parts = list(zip(image.split(size), mask.split(size), weight.split(size), strict=True))
    buffers = list(training.network.buffers())
    before = [buffer.clone() for buffer in buffers]
    found, overlaps = [], []
    for number, (x, labels, weights) in enumerate(parts):
        last = number == len(parts) - 1
        with training.without_reduction(), torch.set_grad_enabled(last):
            if number:
                _restore(buffers, before)
            logits = training.forward(x)
            found.append(criterion.sums(logits, labels, weights))
            overlaps.append(training.overlap(logits, labels, weights))
            del logits
        if number == 0:
            after_first = [buffer.clone() for buffer in buffers]

    mine = torch.stack([sums.detach() for sums in found]).sum(0)
    S = total_over_ranks(mine, votes).clone().requires_grad_()
    loss = criterion.from_sums(S)
    # DDP averages over the ranks.
    slope = torch.autograd.grad(loss.loss, S)[0] * world_size
    with training.without_reduction():
        found.pop().backward(slope)
    training.seed()
    for number, (x, labels, weights) in enumerate(parts[:-1]):
        reduced = number == len(parts) - 2
        with nullcontext() if reduced else training.without_reduction():
            _restore(buffers, before)
            criterion.sums(training.forward(x), labels, weights).backward(slope)
    _restore(buffers, after_first)
    return LossParts(*(each.detach() for each in loss)), torch.stack(overlaps).sum(0)


@torch.no_grad()
def _restore(buffers: list[Tensor], values: list[Tensor]) -> None:
    if buffers:
        torch._foreach_copy_(buffers, values)
