"""Build Mask R-CNN (He et al. 2017) from torchvision's parts.

It is trained on connected components, and its segmentation is the union of its masks.
"""

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
# Probabilities are clamped by this, so that logits stay finite where a mask is 0 or 1.
EPS = 1e-4


class Pyramid(nn.Module):
    """A feature pyramid on a timm ResNet: four maps at 1/4 to 1/32 of the input's size and one at 1/64.

    Args:
        in_channels: bands.
        backbone: name of the ResNet.
        channels: channels of the ResNet's four stages.
        out_channels: channels of each map.
    """

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
            # As torchvision does. Otherwise the first step changes only the last norm of each block.
            zero_init_last=False,
        )
        self.pyramid = FeaturePyramidNetwork(
            self.body.feature_info.channels(), out_channels, extra_blocks=LastLevelMaxPool()
        )
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps (N, out_channels, h, w) of images (N, bands, H, W) by name, largest first."""
        maps: dict[str, Tensor] = self.pyramid(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))
        return maps


class MaskRCNNSegmenter(nn.Module):
    """Mask R-CNN with the interface of the other networks.

    A pixel's logit is that of the largest product of score and mask probability among its detections. So the threshold
    of a prediction sets how certain a detection must be. At most 100 detections of an image count. Among exclusive
    classes, background has logit 0: it wins where no product is over 0.5.

    It detects as in evaluation even in training mode, and no gradient flows through `forward`: `training_loss` is for
    training.

    Args:
        in_channels: bands.
        num_classes: 1 for binary, else exclusive classes.
        backbone: name of the ResNet.
        channels: channels of the ResNet's four stages.
        pyramid_channels: channels of the pyramid's maps.
        box_features: features of the box head.
        mask_channels: channels of the mask head.
        anchors: side of the anchors on each map, in pixels.
        score_threshold: smallest score of a detection that counts.

    Attributes:
        not_exported: why `export.to_program` refuses it.
    """

    # The reason why it cannot be exported as a graph of plain operators.
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
        # Images are already normalised and at the size at which they are scored. _skip_resize respects that only in
        # training and enlarges to 800 pixels for prediction, so objects would have sizes that were never trained on.
        transform = GeneralizedRCNNTransform(1, 1, image_mean=[0.0] * in_channels, image_std=[1.0] * in_channels)
        transform.resize = as_it_is
        self.detector.transform = transform
        # Torchvision computes boxes and the indices of their masks in the dtype of these parts.
        # In bfloat16, numbers from 128 on have no fractions.
        for part in (
            self.detector.rpn.head,
            self.detector.roi_heads.box_predictor,
            self.detector.roi_heads.mask_predictor,
        ):
            part.register_forward_hook(in_single_precision)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W) of images (N, bands, H, W), float."""
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
        """Return the sum of torchvision's five losses over the samples of weight other than 0, a scalar.

        Args:
            image: images (N, bands, H, W).
            target: labels (N, H, W); labels that are no class count as background.
            sample_weight: (N,); None takes all samples.
        """
        kept = range(len(image)) if sample_weight is None else sample_weight.nonzero().flatten().tolist()
        if not kept:
            return sum(p.sum() for p in self.parameters()) * 0.0  # type: ignore[return-value]
        self.detector.train()
        instances = [instances_of(target[n], max(self.num_classes, 2)) for n in kept]
        return torch.stack(list(self.detector([image[n] for n in kept], instances).values())).sum()


def as_it_is(image: Tensor, target: Any) -> tuple[Tensor, Any]:
    """Return an image (bands, H, W) and its target unchanged, in place of torchvision's resizing."""
    return image, target


def in_single_precision(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Convert the tensors of a module's output to fp32, as a forward hook.

    Args:
        module: not used.
        inputs: not used.
        output: a tensor of any shape (*,), or a list or tuple of such outputs.
    """
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(in_single_precision(module, inputs, each) for each in output)


def instances_of(target: Tensor, classes: int) -> dict[str, Any]:
    """Cut labels into the instances that torchvision trains on: one for each connected component (8 neighbours) of a class.

    Args:
        target: labels (H, W).
        classes: number of classes, background included.

    Returns:
        "boxes" (n, 4) fp32, "labels" (n,) int64 and "masks" (n, H, W) uint8. A box is x1, y1, x2, y2 in pixels; x2 and
        y2 are one past the last column and row.
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
    """Build Mask R-CNN.

    Args:
        in_channels: bands.
        num_classes: 1 for binary, else exclusive classes.
        **widths: the other arguments of MaskRCNNSegmenter.
    """
    torchvision_ops.load_torchvision()
    return MaskRCNNSegmenter(in_channels, num_classes, **widths)
