"""Build FCN (Long et al. 2015) on a dilated ResNet, as torchvision does."""

from collections.abc import Sequence

from torch import Tensor, nn

from deepskip.kernels import torchvision_ops


class Features(nn.Module):
    """The last feature map of a timm ResNet at 1/8 of the input's size, as torchvision's FCN takes it.

    Args:
        in_channels: bands.
        backbone: name of the ResNet.
        channels: channels of the ResNet's stages.

    Attributes:
        out_channels: channels of the map.
    """

    def __init__(self, in_channels: int, backbone: str, channels: Sequence[int]) -> None:
        super().__init__()
        import timm

        self.body = timm.create_model(
            backbone,
            pretrained=False,
            features_only=True,
            out_indices=(len(channels),),
            in_chans=in_channels,
            output_stride=8,
            channels=tuple(channels),
            # As torchvision does. Otherwise the first step changes only the last norm of each block.
            zero_init_last=False,
        )
        self.out_channels = self.body.feature_info.channels()[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature map (N, out_channels, h, w) of images (N, bands, H, W) under the key "out"."""
        return {"out": self.body(x)[-1]}


class FullyConvolutional(nn.Module):
    """Torchvision's FCN on `Features`, for images of any size.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        backbone: name of the ResNet.
        channels: channels of the ResNet's stages.
    """

    def __init__(self, in_channels: int, num_classes: int, backbone: str, channels: Sequence[int]) -> None:
        super().__init__()
        from torchvision.models.segmentation.fcn import FCN, FCNHead

        features = Features(in_channels, backbone, channels)
        self.network = FCN(features, FCNHead(features.out_channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W) of images (N, bands, H, W)."""
        logits: Tensor = self.network(x)["out"]
        return logits


def build_fcn(in_channels: int, num_classes: int, *, backbone: str, channels: Sequence[int]) -> nn.Module:
    """Build torchvision's FCN.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        backbone: name of the ResNet.
        channels: channels of the ResNet's four stages (a bottleneck's output has four times as many).
    """
    torchvision_ops.load_torchvision()
    return FullyConvolutional(in_channels, num_classes, backbone, channels)
