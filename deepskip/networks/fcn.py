"""FCN (Long et al. 2015) on a dilated ResNet, as torchvision builds it."""

from collections.abc import Sequence

from torch import Tensor, nn

from deepskip.kernels import torchvision_ops


class Features(nn.Module):
    """The last feature map of a timm ResNet at 1/8 of the input's size, as torchvision's FCN takes it."""

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
            # as torchvision does; else the first step leaves all but the last norms of a block as they are
            zero_init_last=False,
        )
        self.out_channels = self.body.feature_info.channels()[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(x)[-1]}


class FullyConvolutional(nn.Module):
    """forward: (N, bands, H, W) float -> logits (N, classes, H, W), of any size."""

    def __init__(self, in_channels: int, num_classes: int, backbone: str, channels: Sequence[int]) -> None:
        super().__init__()
        from torchvision.models.segmentation.fcn import FCN, FCNHead

        features = Features(in_channels, backbone, channels)
        self.network = FCN(features, FCNHead(features.out_channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def build_fcn(in_channels: int, num_classes: int, *, backbone: str, channels: Sequence[int]) -> nn.Module:
    """Builds torchvision's FCN; channels: of the ResNet's four stages (a bottleneck's output is four times that)."""
    torchvision_ops.load_torchvision()
    return FullyConvolutional(in_channels, num_classes, backbone, channels)
