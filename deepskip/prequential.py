"""Measure the network on new samples before it is trained on them: prequential evaluation (Dawid 1984), test-then-train."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from deepskip.inference import normalize, predict_logits
from deepskip.precision import autocast
from deepskip.ranks import share_buffers
from deepskip.training_step import Batch, TrainingStep, overlap_counts


@torch.inference_mode()
def image_counts(training: TrainingStep, images: Iterable[Batch], samples: range) -> Tensor:
    """Count the pixels of each of some images with the moving average of the weights; every rank must call this.

    Args:
        training: the training.
        images: this rank's share of the images, one a batch. Those that cannot be read may be missing.
        samples: numbers of all images.

    Returns:
        True positive, false positive and false negative foreground pixels of each image over all ranks, and 1 if it was
        measured: (samples, 4) int64, on the CPU.
    """
    network, device = training.averaged, training.device
    if training.world_size > 1:
        share_buffers(network)
    network.eval()
    counts = torch.zeros(len(samples), 4, dtype=torch.int64, device=device)
    for batch in images:
        image = normalize(batch["image"].to(device), batch["mean"].to(device), batch["std"].to(device))
        with autocast(device, training.precision):
            logits = predict_logits(network, image.contiguous(memory_format=torch.channels_last)).float()
        mask, weight = batch["mask"].to(device), torch.ones(1, device=device)
        row = counts[batch["sample"][0] - samples.start]
        row[:3] = overlap_counts(logits, mask, weight, training.data.ignore_index)
        row[3] = 1
    if training.world_size > 1:
        dist.all_reduce(counts)
    training.network.train()
    return counts.cpu()


def iou_of(counts: Tensor) -> Tensor:
    """Return the IoU of counts (*, 3): 1 where there is neither foreground nor a prediction of it, (*) fp64."""
    tp, fp, fn = counts.double().unbind(-1)
    return torch.where(tp + fp + fn > 0, tp / (tp + fp + fn).clamp(min=1), 1.0)
