"""Build U-Net (Ronneberger et al. 2015) as MONAI does."""

from collections.abc import Sequence

from torch import nn

from deepskip.networks.padded import Padded


def build_unet(in_channels: int, num_classes: int, *, features: Sequence[int]) -> nn.Module:
    """Build MONAI's BasicUNet for images of any size.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        features: channels of the five encoder levels, then of the last decoder level.
    """
    from monai.networks.nets import BasicUNet

    return Padded(BasicUNet(2, in_channels, num_classes, tuple(features)), 16)
