"""Validation: the network's loss and metrics on whole images, added up over all ranks."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepskip.inference import normalize, predict_logits, to_labels
from deepskip.loss import BCEDiceLoss
from deepskip.metrics import SegmentationMetrics, ThresholdScores


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    criterion: BCEDiceLoss,
    num_classes: int,
    ignore_index: int,
    images: Iterable[dict[str, Any]],
    device: torch.device,
    panels: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Tensor | str]]]:
    """Measures the network on whole images and returns the metrics (over all ranks) and this rank's first `panels` images.

    "loss" and "soft_dice" are of the whole split, from sums over it (eq. 5). "images" is the number of images. Of a binary task
    there are "best_threshold" and "iou_best_threshold" too; all other metrics are at a probability of 0.5.
    """
    network.eval()
    metrics = SegmentationMetrics(num_classes, ignore_index, device)
    thresholds = ThresholdScores(ignore_index).to(device) if num_classes == 1 else None
    sums = torch.zeros(2 + 3 * num_classes, dtype=torch.float64, device=device)
    panel: list[dict[str, Tensor | str]] = []
    count = torch.zeros((), device=device)
    for batch in images:
        image = normalize(*(batch[name].to(device) for name in ("image", "mean", "std")))
        mask = batch["mask"].to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = predict_logits(network, image.contiguous(memory_format=torch.channels_last)).float()
        labels = to_labels(logits, 0).long()
        sums += criterion.sums(logits, mask).double()
        metrics.update(labels[0], mask[0])
        if thresholds is not None:
            thresholds.update(logits[0, 0], mask[0])
        count += 1
        if len(panel) < panels:
            shown = {name: batch[name][0] for name in ("image", "mask", "key")}
            panel.append(shown | {"labels": labels[0].cpu()})
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(count)
    if count == 0:
        raise ValueError("the validation split is empty")
    parts = criterion.from_sums(sums)
    result = metrics.compute()
    if thresholds is not None:
        result |= {name: value.item() for name, value in thresholds.compute().items()}
    return result | {"loss": parts.loss.item(), "soft_dice": 1 - parts.dice.item(), "images": int(count)}, panel


def thumbnail(image_CHW: Tensor, maps_HW: dict[str, Any], side: int) -> dict[str, np.ndarray]:
    """Keeps of an image and its maps what a panel shows: three bands (H, W, 3), every k-th pixel, at most `side` a side."""
    bands, height, width = image_CHW.shape
    step = -(-max(height, width) // side)
    shown = image_CHW if bands <= 3 else image_CHW[[0, bands // 2, bands - 1]]
    small = {name: np.array(values[::step, ::step]) for name, values in maps_HW.items()}
    return {"image": np.array(shown[:, ::step, ::step].permute(1, 2, 0))} | small
