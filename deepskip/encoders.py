"""Build the two encoders of the paper: VGG-16-like (eq. 3) and ResNet-34-like (eq. 4)."""

import torch.nn.functional as F
from torch import Tensor, nn

from deepskip import kernels
from deepskip.instance_batch_norm import InstanceBatchNorm
from deepskip.sync_batch_norm import SyncBatchNorm2d

# ResNet-34's number of basic blocks at levels 2, 3, ...; a sixth level repeats the last number.
RESNET34_BLOCKS = (3, 4, 6, 3, 3)


def norm_layer(kind: str, channels: int) -> nn.Module:
    """Build the normalisation of a block.

    Args:
        kind: "batch", "sync-batch" (batch norm over all ranks), "instance-batch", or "group" (4 channels in a group).
        channels: channels of the maps.

    Raises:
        ValueError: for another kind.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "sync-batch":
        return SyncBatchNorm2d(channels)
    if kind == "instance-batch":
        return InstanceBatchNorm(channels)
    if kind == "group":
        return nn.GroupNorm(max(1, channels // 4), channels)
    raise ValueError(f'norm is {kind!r}; it must be "batch", "sync-batch", "instance-batch" or "group"')


class ConvNormReLU(nn.Sequential):
    """3x3 convolution without bias, normalisation, ReLU: the paper's cbr.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        norm: "batch", "sync-batch", "instance-batch" or "group".
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            norm_layer(norm, out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the maps (N, out_channels, H, W) of x (N, in_channels, H, W)."""
        conv, norm, relu = self
        weight = conv.get_parameter("weight")
        if not isinstance(norm, nn.BatchNorm2d) or (isinstance(norm, SyncBatchNorm2d) and not norm.is_plain()):
            plain: Tensor = relu(norm(kernels.conv3(x, weight)))
            return plain
        gain, bias, mean, var = norm.weight, norm.bias, norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        if kernels.backend.folds_norms(x) and not norm.training:
            scale = gain * (var + norm.eps).rsqrt()
            return kernels.conv3(x, weight * scale[:, None, None, None], bias - mean * scale).relu_()
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        y, rows = kernels.conv3_with_sums(x, weight) if norm.training else (kernels.conv3(x, weight), None)
        return kernels.batch_norm_relu(y, gain, bias, mean, var, norm.training, norm.momentum or 0.0, norm.eps, rows)


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions, with a 1x1 projection where the channels change (He et al. 2016).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        norm: "batch", "sync-batch", "instance-batch" or "group".
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.first = ConvNormReLU(in_channels, out_channels, norm)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.second_norm = norm_layer(norm, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), norm_layer(norm, out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the maps (N, out_channels, H, W) of x (N, in_channels, H, W)."""
        return F.relu(self.second_norm(self.second(self.first(x))) + self.shortcut(x))


def vgg16_level(u: int, in_channels: int, channels: int, norm: str) -> nn.Module:
    """Build level u (1 first) of the VGG encoder: two 3x3 convolutions."""
    return nn.Sequential(ConvNormReLU(in_channels, channels, norm), ConvNormReLU(channels, channels, norm))


def resnet34_level(u: int, in_channels: int, channels: int, norm: str) -> nn.Module:
    """Build level u (1 first) of the ResNet encoder: one 3x3 convolution at level 1, basic blocks below it."""
    if u == 1:
        return ConvNormReLU(in_channels, channels, norm)
    blocks = [BasicBlock(in_channels, channels, norm)]
    blocks += [BasicBlock(channels, channels, norm) for _ in range(RESNET34_BLOCKS[u - 2] - 1)]
    return nn.Sequential(*blocks)


ENCODERS = {"vgg16": vgg16_level, "resnet34": resnet34_level}
