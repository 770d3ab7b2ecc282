"""The operators that torchvision's wheel lacks beside a torch of another build, in plain PyTorch.

A torchvision wheel built for CUDA cannot load its compiled operators beside a CPU build of torch, and then
`import torchvision` ends in "operator torchvision::nms does not exist"; whatever imports it, torchmetrics among them,
ends with it. `declare` makes that import work, `load_torchvision` also makes nms and roi_align compute.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# what `import torchvision` and Mask R-CNN need; qnms is for quantized boxes and only declared
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
# operators live as long as the library that registered them
_LIBRARIES: list[Any] = []


def declare() -> None:
    """Registers the missing operators before torchvision is imported; does nothing where they load or it is not installed."""
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
    # made of differentiable operators
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    _LIBRARIES.append(library)


def load_torchvision() -> ModuleType:
    """Imports torchvision such that its detectors run; raises ImportError where it is not installed."""
    declare()
    torchvision = importlib.import_module("torchvision")
    if _LIBRARIES:
        # torchvision asks these, not the registry, before it calls an operator
        for name in ("torchvision.extension", "torchvision.ops.roi_align"):
            sys.modules[name]._has_ops = lambda: True  # type: ignore[attr-defined]
    return torchvision


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keeps every box that no better kept box overlaps by an IoU over the threshold.

    boxes: (N, 4) as x1, y1, x2, y2. scores: (N,). Gives the indices of those kept, best first.
    """
    order = scores.sort(descending=True, stable=True).indices
    boxes = boxes[order].float() if boxes.dtype != torch.float64 else boxes[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    top_left = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (bottom_right - top_left).clamp(min=0).prod(2)
    beats = (common / (areas[:, None] + areas - common) > iou_threshold).triu(1)
    kept = torch.ones_like(order, dtype=torch.bool)
    # the greedy choice is the only one that this leaves as it is; box i is right after i + 1 rounds, mostly after a few
    while True:
        still = ~(beats & kept[:, None]).any(0)
        if torch.equal(still, kept):
            return order[kept]
        kept = still


def roi_align(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Averages bilinear samples of features (N, C, H, W) in the bins of rois (K, 5) -> (K, C, pooled_height, pooled_width).

    A roi is image number, x1, y1, x2, y2; sampling_ratio samples a bin and axis, 0 or less for one a feature pixel.
    As bilinear weights are products of one a row and one a column, so is the average over a bin: two matrix products
    (He et al. 2017, "Mask R-CNN").
    """
    dtype, (H, W) = features.dtype, features.shape[-2:]
    features = features.to(rois.dtype)
    with torch.no_grad():
        x1, y1, x2, y2 = (rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)).unbind(1)
        smallest = -float("inf") if aligned else 1.0
        rows = bin_weights(y1, (y2 - y1).clamp(min=smallest), pooled_height, H, sampling_ratio)
        columns = bin_weights(x1, (x2 - x1).clamp(min=smallest), pooled_width, W, sampling_ratio)
        image = rois[:, 0].long()
    out = features.new_zeros(len(rois), features.shape[1], pooled_height, pooled_width)
    for n in range(len(features)):
        (own,) = torch.where(image == n)
        pooled = torch.einsum("kph,chw->kcpw", rows[own], features[n])
        out = out.index_copy(0, own, torch.einsum("kcpw,kqw->kcpq", pooled, columns[own]))
    return out.to(dtype)


def bin_weights(start: Tensor, size: Tensor, bins: int, length: int, sampling_ratio: int) -> Tensor:
    """Gives the weight of each of `length` pixels in each bin along one axis: start and size (K,) -> (K, bins, length)."""
    count = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else (size / bins).ceil().clamp(min=0)
    sample = torch.arange(int(count.max()) if len(count) else 0, device=size.device)
    each = count.clamp(min=1)[:, None, None]
    bin_size = (size / bins)[:, None, None]
    at = torch.arange(bins, device=size.device)[:, None] + (sample + 0.5) / each
    position = start[:, None, None] + at * bin_size
    # samples over a pixel outside count as 0
    counts = (position >= -1) & (position <= length) & (sample < each)
    position = position.clamp(0, length - 1)
    low = position.floor()
    weight = counts / each
    weights = size.new_zeros(len(size), bins, length)
    weights.scatter_add_(2, low.long(), weight * (1 - (position - low)))
    return weights.scatter_add_(2, (low.long() + 1).clamp(max=length - 1), weight * (position - low))
