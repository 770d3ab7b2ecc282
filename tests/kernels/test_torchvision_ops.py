import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from deepskip.kernels import torchvision_ops


# The kernels' tests also run on machines without torchvision.
@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_and_torchmetrics_import_and_compute() -> None:
    torchvision = torchvision_ops.load_torchvision()
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2.5], [5, 5, 6, 6]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.1, 0.9, 0.5]), 0.5).tolist() == [1, 2]
    assert torchvision.ops.roi_align(torch.ones(1, 2, 8, 8), [boxes], 3).shape == (3, 2, 3, 3)


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_nms_against_brute_force(threshold: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_ops, "NMS_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(120, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + 0.5 + torch.rand(120, 2, generator=generator) * 8], 1).double()
    # There are few distinct scores, so that ties occur.
    scores = torch.randint(0, 40, (120,), generator=generator) / 40

    def iou(a: list[float], b: list[float]) -> float:
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        common = max(width, 0) * max(height, 0)
        return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)

    kept: list[int] = []
    for i in sorted(range(120), key=lambda i: -scores[i].item()):
        if all(iou(boxes[i].tolist(), boxes[j].tolist()) <= threshold for j in kept):
            kept.append(i)
    assert torchvision_ops.nms(boxes, scores, threshold).tolist() == kept
    assert torchvision_ops.nms(boxes[:0], scores[:0], threshold).tolist() == []


ROIS = [[0, 1.3, 2.1, 6.8, 5.0], [1, -3.0, -2.0, 4.0, 20.0], [0, 3.0, 3.0, 3.2, 3.1], [1, 0.0, 0.0, 18.0, 14.0]]


def roi_align_by_hand(features: Tensor, scale: float, ph: int, pw: int, ratio: int, aligned: bool) -> Tensor:
    """Compute He et al. 2017 by nested loops, sample by sample, with torchvision's rules at the border."""
    _, C, H, W = features.shape
    out = torch.zeros(len(ROIS), C, ph, pw, dtype=torch.float64)
    for k, (n, *box) in enumerate(ROIS):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0.0) for c in box)
        h, w = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
        ny, nx = (ratio, ratio) if ratio > 0 else (math.ceil(h / ph), math.ceil(w / pw))
        for p in range(ph):
            for q in range(pw):
                for i in range(ny):
                    for j in range(nx):
                        y, x = y1 + (p + (i + 0.5) / ny) * h / ph, x1 + (q + (j + 0.5) / nx) * w / pw
                        if not (-1 <= y <= H and -1 <= x <= W):
                            continue
                        y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
                        for r in range(H):
                            for c in range(W):
                                weight = max(0, 1 - abs(y - r)) * max(0, 1 - abs(x - c))
                                if weight:
                                    out[k, :, p, q] += weight * features[int(n), :, r, c] / (ny * nx)
    return out


@pytest.mark.parametrize(
    ("ratio", "aligned", "scale"), [(2, False, 1.0), (0, False, 0.5), (2, True, 0.5), (0, True, 1.0)]
)
def test_roi_align_against_loops(ratio: int, aligned: bool, scale: float) -> None:
    features = torch.randn(2, 3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (features.clone().requires_grad_() for _ in range(2))
    rois = torch.tensor(ROIS, dtype=torch.float64)
    pooled = torchvision_ops.roi_align(one, rois, scale, 3, 2, ratio, aligned)
    by_hand = roi_align_by_hand(other, scale, 3, 2, ratio, aligned)
    torch.testing.assert_close(pooled, by_hand, rtol=1e-12, atol=1e-12)
    slope = torch.randn(by_hand.shape, dtype=torch.float64)
    pooled.backward(slope)
    by_hand.backward(slope)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_roi_align_of_no_images_and_under_autocast() -> None:
    empty = torchvision_ops.roi_align(torch.ones(0, 1, 7, 9), torch.ones(0, 5), 1.0, 3, 2, 2, False)
    assert empty.shape == (0, 1, 3, 2)
    features, rois = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0)), torch.tensor(ROIS)
    expected = torchvision_ops.roi_align(features, rois, 0.5, 3, 2, 0, True)
    with torch.autocast("cpu", torch.bfloat16):
        # The corners and the average stay fp32, as in torchvision under autocast.
        assert torch.equal(torchvision_ops.roi_align(features, rois, 0.5, 3, 2, 0, True), expected)
        half = torchvision_ops.roi_align(features.bfloat16(), rois, 0.5, 3, 2, 0, True)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)
