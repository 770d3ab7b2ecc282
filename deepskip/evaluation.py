"""Validate a network on whole images: its loss and metrics over all ranks."""

from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepskip import exact_sums
from deepskip.inference import normalize, predict_logits, to_labels
from deepskip.loss import BCEDiceLoss
from deepskip.metrics import SegmentationMetrics, ThresholdScores
from deepskip.precision import autocast
from deepskip.ranks import add_up
from deepskip.sync_batch_norm import in_group
from deepskip.training_step import Batch

# Longest side of the images in a panel, in pixels.
PANEL_SIDE = 512


class PanelImage(TypedDict):
    """A validation image with its labels, reduced by `thumbnail`.

    Attributes:
        image: raw image (h, w, bands), of three bands at most.
        mask: true labels (h, w).
        labels: predicted labels (h, w).
        key: key of the sample.
    """

    image: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    key: str


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
        images: this rank's block of the split, one image a batch; only "image", "mask", "mean", "std" and "key" are read.
        device: where the network is.
        panels: number of images to return with their labels.
        precision: torch.float32, or torch.bfloat16 for autocast.

    Returns:
        The metrics over all ranks, and on rank 0 the first `panels` images of all ranks, in the order of the ranks.

        "loss" and "soft_dice" are computed from sums over the whole split (eq. 5). "images" is the number of images.
        For a binary task there are also "best_threshold" and "iou_best_threshold". All other metrics are at a
        probability of 0.5.

    Raises:
        ValueError: if the validation split is empty.
    """
    network.eval()
    metrics = SegmentationMetrics(num_classes, ignore_index, device)
    thresholds = ThresholdScores(ignore_index, device) if num_classes == 1 else None
    terms = 2 + 3 * num_classes
    # Digits of the loss's sums, the number of terms that are no number, and that of images: all integers, so that the results
    # depend neither on the order of images nor on the number of ranks.
    digits = torch.zeros(terms, exact_sums.LIMBS, dtype=torch.int64, device=device)
    broken = torch.zeros(terms, dtype=torch.int64, device=device)
    panel: list[PanelImage] = []
    count = torch.zeros((), dtype=torch.int64)
    for batch in images:
        image = normalize(batch["image"].to(device), batch["mean"].to(device), batch["std"].to(device))
        mask = batch["mask"].to(device).long()
        with autocast(device, precision):
            logits = predict_logits(network, image.contiguous(memory_format=torch.channels_last)).float()
        labels = to_labels(logits, 0).long()
        sums = criterion.sums(logits, mask).double()
        digits += exact_sums.digits(sums)
        broken += ~exact_sums.is_term(sums)
        metrics.update(labels[0], mask[0])
        if thresholds is not None:
            thresholds.update(logits[0, 0], mask[0])
        count += 1
        if len(panel) < panels:
            small = thumbnail(batch["image"][0], {"mask": batch["mask"][0], "labels": labels[0].cpu()}, PANEL_SIDE)
            panel.append(
                {"image": small["image"], "mask": small["mask"], "labels": small["labels"], "key": batch["key"][0]}
            )
    if in_group():
        add_up([digits, broken, count, *metrics.counts(), *([thresholds.counts] if thresholds else [])], device)
        panel = first_images(panel, panels, device) if panels else panel
    if count == 0:
        raise ValueError("the validation split is empty")
    sums = torch.tensor(exact_sums.total(digits), dtype=torch.float64).to(device)
    parts = criterion.from_sums(torch.where(broken > 0, torch.nan, sums))
    result = metrics.compute()
    if thresholds is not None:
        result |= {name: value.item() for name, value in thresholds.compute().items()}
    return result | {"loss": parts.loss.item(), "soft_dice": 1 - parts.dice.item(), "images": int(count)}, panel


def first_images(panel: list[PanelImage], most: int, device: torch.device) -> list[PanelImage]:
    """Return the first images of all ranks, in the order of the ranks; every rank must call this.

    Only if the first rank has fewer than `most`, as with a small split, others send theirs.

    Args:
        panel: the first images of this rank, `most` at most.
        most: number of images to return, or fewer if there are not that many.
        device: device for the collectives.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    held = torch.zeros(world_size, dtype=torch.int64, device=device)
    held[rank] = len(panel)
    dist.all_reduce(held)
    numbers = held.tolist()
    found = list(panel)
    for sender in range(1, world_size):
        wanted = min(numbers[sender], most - sum(numbers[:sender]))
        if wanted > 0:
            sent: list[Any] = [panel[:wanted]]
            dist.broadcast_object_list(sent, sender)
            found += sent[0]
    return found if rank == 0 else panel


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
