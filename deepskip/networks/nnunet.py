"""Build nnU-Net's plain convolutional U-Net (Isensee et al. 2021, Nature Methods) with its authors' package."""

from collections.abc import Sequence

import torch
from torch import nn

from deepskip.kernels import torchvision_ops
from deepskip.networks.padded import Padded


def build_nnunet(in_channels: int, num_classes: int, *, features: Sequence[int]) -> nn.Module:
    """Build PlainConvUNet with nnU-Net's 2-D settings and its initialisation, for images of any size.

    nnU-Net's training recipe (deep supervision, self-configuration) is not included.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        features: channels of each stage; their number is the number of stages.
    """
    torchvision_ops.declare()
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(features)
    network = PlainConvUNet(
        in_channels,
        stages,
        tuple(features),
        nn.Conv2d,
        3,
        [1] + [2] * (stages - 1),
        2,
        num_classes,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    network.apply(network.initialize)
    # The heads of lower stages are for deep supervision only.
    network.decoder.seg_layers = torch.nn.ModuleList([network.decoder.seg_layers[-1]])
    return Padded(network, 2 ** (stages - 1))
