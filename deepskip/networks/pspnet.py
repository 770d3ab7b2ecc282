"""PSPNet (Zhao et al. 2017) as segmentation_models_pytorch builds it."""

from collections.abc import Sequence

from torch import nn

from deepskip.kernels import torchvision_ops
from deepskip.networks.padded import Padded
from deepskip.networks.pooling import with_exportable_pooling


def build_pspnet(
    in_channels: int, num_classes: int, *, backbone: str, channels: Sequence[int], pyramid_channels: int
) -> nn.Module:
    """Builds PSPNet on the first two stages of a ResNet (1/8 of the input's size).

    channels: of the ResNet's stages. pyramid_channels: of the map that the pooled ones are merged to.
    """
    torchvision_ops.load_torchvision()
    from segmentation_models_pytorch import PSPNet

    network = PSPNet(
        f"tu-{backbone}",
        encoder_weights=None,
        encoder_depth=3,
        psp_out_channels=pyramid_channels,
        in_channels=in_channels,
        classes=num_classes,
        channels=tuple(channels),
        # as torchvision does; else the first step leaves all but the last norms of a block as they are
        zero_init_last=False,
    )
    return Padded(with_exportable_pooling(network), 8)
