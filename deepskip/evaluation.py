"""Validate a network on whole images: its loss and metrics over all ranks."""

from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepskip.inference import normalize, predict_logits, to_labels
from deepskip.loss import BCEDiceLoss
from deepskip.metrics import SegmentationMetrics, ThresholdScores
from deepskip.precision import autocast
from deepskip.training_step import Batch


class PanelImage(TypedDict):
    """A validation image with its labels.

    Attributes:
        image: raw image (bands, H, W).
        mask: true labels (H, W).
        key: key of the sample.
        labels: predicted labels (H, W).
    """

    image: Tensor
    mask: Tensor
    key: str
    labels: Tensor


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    criterion: BCEDiceLoss,
    num_classes: int,
    ignore_index: int,
    images: Iterable[Batch],
    device: torch.device,
    panels: int = 0,
    precision: torch.dtype = torch.float32,
) -> tuple[dict[str, float], list[PanelImage]]:
    """Measure the network on whole images.

    Args:
        network: takes normalised images (N, bands, H, W) and returns logits (N, V, H, W). It is set to evaluation mode.
        criterion: the loss.
        num_classes: 1 for binary, else exclusive classes.
        ignore_index: label of pixels that are not counted.
        images: this rank's share, one image a batch; only "image", "mask", "mean", "std" and "key" are read.
        device: where the network is.
        panels: number of images to return with their labels.
        precision: torch.float32, or torch.bfloat16 for autocast.

    Returns:
        The metrics over all ranks, and this rank's first `panels` images.

        "loss" and "soft_dice" are computed from sums over the whole split (eq. 5). "images" is the number of images.
        For a binary task there are also "best_threshold" and "iou_best_threshold". All other metrics are at a
        probability of 0.5.

    Raises:
        ValueError: if the validation split is empty.
    """
    network.eval()
    metrics = SegmentationMetrics(num_classes, ignore_index, device)
    thresholds = ThresholdScores(ignore_index).to(device) if num_classes == 1 else None
    sums = torch.zeros(2 + 3 * num_classes, dtype=torch.float64, device=device)
    panel: list[PanelImage] = []
    count = torch.zeros((), device=device)
    for batch in images:
        image = normalize(batch["image"].to(device), batch["mean"].to(device), batch["std"].to(device))
        mask = batch["mask"].to(device).long()
        with autocast(device, precision):
            logits = predict_logits(network, image.contiguous(memory_format=torch.channels_last)).float()
        labels = to_labels(logits, 0).long()
        sums += criterion.sums(logits, mask).double()
        metrics.update(labels[0], mask[0])
        if thresholds is not None:
            thresholds.update(logits[0, 0], mask[0])
        count += 1
        if len(panel) < panels:
            panel.append({
                "image": batch["image"][0], "mask": batch["mask"][0], "key": batch["key"][0], "labels": labels[0].cpu()
            })  # fmt: skip
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
    """Return an image and its maps reduced to what a panel shows, at most `side` pixels a side.

    Args:
        image_CHW: image (C, H, W).
        maps_HW: maps of shape (H, W), by name.
        side: largest height and width, in pixels; every k-th pixel is kept.

    Returns:
        "image" of shape (h, w, bands) and the maps (h, w). Of more than three bands, the first, the middle and the last
        are kept.
    """
    bands, height, width = image_CHW.shape
    step = -(-max(height, width) // side)
    shown = image_CHW if bands <= 3 else image_CHW[[0, bands // 2, bands - 1]]
    small = {name: np.array(values[::step, ::step]) for name, values in maps_HW.items()}
    return {"image": np.array(shown[:, ::step, ::step].permute(1, 2, 0))} | small
