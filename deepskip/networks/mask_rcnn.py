"""Mask R-CNN (He et al. 2017) of torchvision's parts, trained on connected components, scored by the union of its masks."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from deepskip.kernels import torchvision_ops

BOX_POOL, MASK_POOL = 7, 14
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
# logits of masks stay finite where a mask is 0 or 1
EPS = 1e-4


class Pyramid(nn.Module):
    """A feature pyramid on a timm ResNet: four maps at 1/4 to 1/32 of the input's size and one at 1/64."""

    def __init__(self, in_channels: int, backbone: str, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        import timm
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        self.body = timm.create_model(
            backbone,
            pretrained=False,
            features_only=True,
            out_indices=(1, 2, 3, 4),
            in_chans=in_channels,
            channels=tuple(channels),
            # as torchvision does; else the first step leaves all but the last norms of a block as they are
            zero_init_last=False,
        )
        self.pyramid = FeaturePyramidNetwork(
            self.body.feature_info.channels(), out_channels, extra_blocks=LastLevelMaxPool()
        )
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.pyramid(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))


class MaskRCNNSegmenter(nn.Module):
    """Mask R-CNN behind the interface of the other networks.

    forward: (N, bands, H, W) float -> logits (N, classes, H, W), of the largest product of score and mask probability among a
    pixel's detections: so whoever chooses a threshold chooses how sure a detection must be. At most 100 of an image,
    of at least `score_threshold`, count. Among exclusive classes, background has logit 0: it wins where no product is over 0.5.
    It detects as in evaluation even in training mode, and no gradient goes through it: `training_loss` is what trains.
    """

    # why it has no graph of plain operators
    not_exported = "Mask R-CNN computes on as many boxes as it finds, which no graph of fixed operators can"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        backbone: str,
        channels: Sequence[int],
        pyramid_channels: int,
        box_features: int,
        mask_channels: int,
        anchors: Sequence[int],
        score_threshold: float = 0.001,
    ) -> None:
        super().__init__()
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.models.detection.rpn import AnchorGenerator
        from torchvision.models.detection.transform import GeneralizedRCNNTransform

        self.num_classes = num_classes
        kinds = max(num_classes, 2)
        self.detector = MaskRCNN(
            Pyramid(in_channels, backbone, channels, pyramid_channels),
            rpn_anchor_generator=AnchorGenerator(tuple((a,) for a in anchors), (ANCHOR_RATIOS,) * len(anchors)),
            box_head=TwoMLPHead(pyramid_channels * BOX_POOL**2, box_features),
            box_predictor=FastRCNNPredictor(box_features, kinds),
            mask_head=MaskRCNNHeads(pyramid_channels, (mask_channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(mask_channels, mask_channels, kinds),
            box_score_thresh=score_threshold,
        )
        # images come normalised and in the size they are scored in; _skip_resize heeds that in training alone and
        # enlarges to 800 pixels at prediction, so objects would come in sizes that were never trained on
        transform = GeneralizedRCNNTransform(1, 1, image_mean=[0.0] * in_channels, image_std=[1.0] * in_channels)
        transform.resize = as_it_is
        self.detector.transform = transform
        # torchvision reckons boxes and the numbers of their masks in the dtype of these; bfloat16 has whole pixels from 128 on
        for part in (
            self.detector.rpn.head,
            self.detector.roi_heads.box_predictor,
            self.detector.roi_heads.mask_predictor,
        ):
            part.register_forward_hook(in_single_precision)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        training = self.detector.training
        self.detector.eval()
        try:
            found = self.detector(list(x))
        finally:
            self.detector.train(training)
        probability = x.new_zeros(len(x), max(self.num_classes, 2), *x.shape[-2:])
        for n, detections in enumerate(found):
            for label in detections["labels"].unique().tolist():
                own = detections["labels"] == label
                products = detections["scores"][own, None, None] * detections["masks"][own, 0]
                probability[n, label] = products.amax(0).to(probability)
        logits = probability.clamp(EPS, 1 - EPS).logit()
        logits[:, 0] = 0
        return logits[:, 1:] if self.num_classes == 1 else logits

    def training_loss(self, image: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Adds up torchvision's five losses over the samples of weight other than 0.

        image: (N, bands, H, W). target: (N, H, W) labels; pixels of labels that are no class count as background.
        """
        kept = range(len(image)) if sample_weight is None else sample_weight.nonzero().flatten().tolist()
        if not kept:
            return sum(p.sum() for p in self.parameters()) * 0.0  # type: ignore[return-value]
        self.detector.train()
        instances = [instances_of(target[n], max(self.num_classes, 2)) for n in kept]
        return torch.stack(list(self.detector([image[n] for n in kept], instances).values())).sum()


def as_it_is(image: Tensor, target: Any) -> tuple[Tensor, Any]:
    """Leaves an image and its target in their size."""
    return image, target


def in_single_precision(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Makes the tensors of a module's output, or of lists of lists of it, fp32: a forward hook."""
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(in_single_precision(module, inputs, each) for each in output)


def instances_of(target: Tensor, classes: int) -> dict[str, Any]:
    """Cuts labels (H, W) into the instances that torchvision trains on: one a connected component (8 neighbours) of a class.

    Boxes are x1, y1, x2, y2 in pixels, the last column and row included.
    """
    labels = target.cpu().numpy()
    boxes, kinds, masks = [], [], []
    for kind in range(1, classes):
        components, _ = ndimage.label(labels == kind, structure=np.ones((3, 3)))
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), 1):
            boxes.append([columns.start, rows.start, columns.stop, rows.stop])
            kinds.append(kind)
            masks.append(components == number)
    shape = (len(masks), *labels.shape)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32, device=target.device).reshape(-1, 4),
        "labels": torch.tensor(kinds, dtype=torch.int64, device=target.device),
        "masks": torch.from_numpy(np.array(masks, np.uint8).reshape(shape)).to(target.device),
    }


def build_mask_rcnn(in_channels: int, num_classes: int, **widths: Any) -> nn.Module:
    """Builds Mask R-CNN; widths as MaskRCNNSegmenter has them."""
    torchvision_ops.load_torchvision()
    return MaskRCNNSegmenter(in_channels, num_classes, **widths)
