"""The operators that torchvision lacks if it was built for another build of torch, in plain PyTorch.

A torchvision wheel built for CUDA cannot load its compiled operators with a CPU build of torch. Then `import torchvision` fails
with "operator torchvision::nms does not exist", and so does every package that imports it, such as timm. `declare`
makes that import work; `load_torchvision` also makes nms and roi_align compute.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Operators that `import torchvision` and Mask R-CNN need; qnms is for quantized boxes and only declared.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
NMS_BLOCK = 256
# Operators live as long as the library that registered them.
_LIBRARIES: list[Any] = []


def declare() -> None:
    """Register the missing operators before torchvision is imported.

    It does nothing if torchvision's own operators load, or torchvision is not installed.
    """
    if hasattr(torch.ops.torchvision, "nms"):
        return
    found = importlib.util.find_spec("torchvision")
    if found is None:
        return
    for folder in found.submodule_search_locations or ():
        for compiled in Path(folder).glob("_C.*"):
            try:
                torch.ops.load_library(compiled)
                return
            except OSError:
                continue
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    library.impl("nms", nms, "CompositeExplicitAutograd")
    # It is composed of differentiable operators.
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    _LIBRARIES.append(library)


def load_torchvision() -> ModuleType:
    """Import torchvision such that its detectors run.

    Raises:
        ImportError: if torchvision is not installed.
    """
    declare()
    torchvision = importlib.import_module("torchvision")
    if _LIBRARIES:
        # torchvision calls these, not the registry, before it calls an operator.
        for name in ("torchvision.extension", "torchvision.ops.roi_align"):
            sys.modules[name]._has_ops = lambda: True  # type: ignore[attr-defined]
    return torchvision


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep every box that no kept box of a higher score overlaps by an IoU over the threshold.

    Args:
        boxes: boxes (N, 4) as x1, y1, x2, y2.
        scores: scores (N,).
        iou_threshold: IoU, 0 to 1.

    Returns:
        Indices (kept,) of the kept boxes, best first.
    """
    left = scores.sort(descending=True, stable=True).indices
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    found = [left[:0]]
    # Block by block: boxes that an earlier block suppresses are not compared again, and a block's table stays in the cache.
    while len(left):
        block, left = left[:NMS_BLOCK], left[NMS_BLOCK:]
        beats = (iou(boxes[block], boxes[block]) > iou_threshold).triu(1)
        kept = torch.ones_like(block, dtype=torch.bool)
        # The greedy choice is the only fixed point. Box i is right after i + 1 rounds, mostly after a few.
        while not torch.equal(still := ~(beats & kept[:, None]).any(0), kept):
            kept = still
        found.append(block[kept])
        left = left[~(iou(boxes[block[kept]], boxes[left]) > iou_threshold).any(0)]
    return torch.cat(found)


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the IoU of each of some boxes with each of others.

    Args:
        boxes: boxes (N, 4) as x1, y1, x2, y2.
        others: boxes (M, 4).

    Returns:
        IoU (N, M); nan for two boxes without an area.
    """
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes[:, None].unbind(2), others[None].unbind(2)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    common = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0).mul_(width)
    return common / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common)


def roi_align(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Average bilinear samples of feature maps in the bins of regions of interest.

    A bilinear weight is the product of a row's and a column's, and so is the average over a bin: two matrix products
    (He et al. 2017, "Mask R-CNN").

    Args:
        features: feature maps (N, C, H, W).
        rois: regions (K, 5): image number, x1, y1, x2, y2.
        spatial_scale: feature pixels for each unit of the regions' coordinates.
        pooled_height: bins of a region's rows.
        pooled_width: bins of a region's columns.
        sampling_ratio: samples of a bin along each axis; 0 or less takes one for each feature pixel.
        aligned: whether to shift the regions by half a feature pixel; else they are at least one pixel large.

    Returns:
        Averages (K, C, pooled_height, pooled_width).
    """
    dtype, (H, W) = features.dtype, features.shape[-2:]
    # Corners in half precision would be off by pixels.
    rois = rois if rois.dtype == torch.float64 else rois.float()
    features = features.to(rois.dtype)
    with torch.no_grad():
        x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)).unbind(1)
        smallest = -float("inf") if aligned else 1.0
        rows = bin_weights(y1, (y2 - y1).clamp(min=smallest), pooled_height, H, sampling_ratio)
        columns = bin_weights(x1, (x2 - x1).clamp(min=smallest), pooled_width, W, sampling_ratio)
        image = rois[:, 0].long()
        owns = [torch.where(image == n)[0] for n in range(len(features))]
    # Mask R-CNN also crops the masks of an image without objects.
    pooled = [features.new_zeros(0, pooled_height, features.shape[1], pooled_width)]
    with torch.autocast(features.device.type, enabled=False):
        for map_CHW, own in zip(features, owns, strict=True):
            # With this order of axes, neither product copies the large intermediate.
            bands = torch.einsum("kph,chw->kpcw", rows[own], map_CHW)
            pooled.append(torch.einsum("kpcw,kqw->kpcq", bands, columns[own]))
    return torch.cat(pooled)[torch.cat([image[:0], *owns]).argsort()].transpose(1, 2).to(dtype)


def bin_weights(start: Tensor, size: Tensor, bins: int, length: int, sampling_ratio: int) -> Tensor:
    """Compute the weight of each pixel in each bin along one axis.

    Args:
        start: starts of the regions, (K,), in pixels.
        size: sizes of the regions, (K,), in pixels.
        bins: bins of each region.
        length: pixels along the axis.
        sampling_ratio: samples of a bin; 0 or less takes one for each pixel.

    Returns:
        Weights (K, bins, length).
    """
    count = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else (size / bins).ceil().clamp(min=0)
    sample = torch.arange(int(count.max()) if len(count) else 0, device=size.device)
    each = count.clamp(min=1)[:, None, None]
    bin_size = (size / bins)[:, None, None]
    at = torch.arange(bins, device=size.device)[:, None] + (sample + 0.5) / each
    position = start[:, None, None] + at * bin_size
    # Samples more than a pixel outside count as 0.
    counts = (position >= -1) & (position <= length) & (sample < each)
    position = position.clamp(0, length - 1)
    low = position.floor()
    weight = counts / each
    weights = size.new_zeros(len(size), bins, length)
    weights.scatter_add_(2, low.long(), weight * (1 - (position - low)))
    return weights.scatter_add_(2, (low.long() + 1).clamp(max=length - 1), weight * (position - low))
