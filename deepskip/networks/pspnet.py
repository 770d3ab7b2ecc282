"""Build PSPNet (Zhao et al. 2017) as segmentation_models_pytorch does."""

from collections.abc import Sequence

from torch import nn

from deepskip.kernels import torchvision_ops
from deepskip.networks.padded import Padded
from deepskip.networks.pooling import with_exportable_pooling


def build_pspnet(
    in_channels: int, num_classes: int, *, backbone: str, channels: Sequence[int], pyramid_channels: int
) -> nn.Module:
    """Build PSPNet on the first two stages of a ResNet (1/8 of the input's size).

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        backbone: name of the ResNet.
        channels: channels of the ResNet's stages.
        pyramid_channels: channels of the map into which the pooled ones are merged.
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
        # As torchvision does. Otherwise the first step changes only the last norm of each block.
        zero_init_last=False,
    )
    return Padded(with_exportable_pooling(network), 8)
