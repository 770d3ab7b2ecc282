"""U-Net (Ronneberger et al. 2015) as MONAI builds it, and DeepSkip's own without its deep skips."""

from collections.abc import Sequence

from torch import nn

from deepskip.network import DeepSkipUNet
from deepskip.networks.padded import Padded


def build_unet(in_channels: int, num_classes: int, *, features: Sequence[int]) -> nn.Module:
    """Builds MONAI's BasicUNet; features: channels of the five encoder levels, then of the last decoder level."""
    from monai.networks.nets import BasicUNet

    return Padded(BasicUNet(2, in_channels, num_classes, tuple(features)), 16)


def build_plain_unet(in_channels: int, num_classes: int, *, base_channels: int, levels: int) -> nn.Module:
    """Builds DeepSkipUNet without deep skips: D_u = cbr(cbr(concat(conv3(E_u), conv3(up(D_{u+1})))))."""
    return DeepSkipUNet(in_channels, num_classes, base_channels, levels, deep_skips=False)
