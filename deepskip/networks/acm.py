"""Build ACM-UNet, asymmetric contextual modulation (Dai et al. 2021, WACV), for infrared small targets.

Convolutions before batch norm have no bias, which would have no effect. The published code has 168 of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepskip.networks.padded import Padded


def build_acm(in_channels: int, num_classes: int, *, channels: Sequence[int], blocks: Sequence[int]) -> nn.Module:
    """Build ACM-UNet for images of any size.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        channels: channels of the stem, at half the input's size, and of the three stages, at a quarter to a sixteenth.
        blocks: residual blocks of each of the three stages.
    """
    return Padded(ACM(in_channels, num_classes, channels, blocks), 16)


class ACM(nn.Module):
    """A U-Net of residual blocks whose skips are modulated in both directions.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        channels: channels of the stem and of the three stages.
        blocks: residual blocks of each of the three stages.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        stem, first, second, third = channels
        self.stem = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            *convolution(in_channels, stem, stride=2),
            *convolution(stem, stem),
            *convolution(stem, first),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stage1 = stage(first, first, blocks[0])
        self.stage2 = stage(first, second, blocks[1], stride=2)
        self.stage3 = stage(second, third, blocks[2], stride=2)
        self.up2, self.fuse2 = nn.ConvTranspose2d(third, second, 4, 2, 1), Modulation(second)
        self.merge2 = stage(second, second, blocks[1])
        self.up1, self.fuse1 = nn.ConvTranspose2d(second, first, 4, 2, 1), Modulation(first)
        self.merge1 = stage(first, first, blocks[0])
        narrow = max(1, first // 4)
        self.head = nn.Sequential(*convolution(first, narrow), nn.Dropout(0.1), nn.Conv2d(narrow, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W) of images (N, bands, H, W); H and W are multiples of 16."""
        x1 = self.stage1(self.stem(x))
        x2 = self.stage2(x1)
        x3 = self.stage3(x2)
        y2 = self.merge2(self.fuse2(self.up2(x3), x2))
        y1 = self.merge1(self.fuse1(self.up1(y2), x1))
        return nn.functional.interpolate(self.head(y1), scale_factor=4.0, mode="bilinear")


class Modulation(nn.Module):
    """Fuse a deep and a shallow map, each scaled by what the other one shows.

    The deep map scales channels of the shallow one by its means over the image (top-down). The shallow map scales the
    deep one pixel by pixel (bottom-up).

    Args:
        channels: channels of both maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.top_down = nn.Sequential(nn.AdaptiveAvgPool2d(1), *gate(channels))
        self.bottom_up = nn.Sequential(*gate(channels))
        self.merge = nn.Sequential(*convolution(channels, channels))

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """Fuse two maps (N, C, H, W) to one of that shape."""
        fused: Tensor = self.merge(2 * shallow * self.top_down(deep) + 2 * deep * self.bottom_up(shallow))
        return fused


class ResidualBlock(nn.Module):
    """Add two convolutions to their input.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(*convolution(in_channels, channels, stride))
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output (N, C, H / stride, W / stride) of a map (N, C_in, H, W)."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def convolution(in_channels: int, channels: int, stride: int = 1) -> list[nn.Module]:
    """Return a 3x3 convolution, batch norm and ReLU.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the convolution.
    """
    return [
        nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
    ]  # fmt: skip


def gate(channels: int) -> list[nn.Module]:
    """Return the layers that compute weights from 0 to 1 of a map's channels, through a quarter as many.

    Args:
        channels: channels of the map.
    """
    narrow = max(1, channels // 4)
    return [
        nn.Conv2d(channels, narrow, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(inplace=True),
        nn.Conv2d(narrow, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.Sigmoid(),
    ]  # fmt: skip


def stage(in_channels: int, channels: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """Return a sequence of residual blocks, of which the first has the stride.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        blocks: number of blocks.
        stride: of the first block.
    """
    return nn.Sequential(
        *(ResidualBlock(channels if i else in_channels, channels, 1 if i else stride) for i in range(blocks))
    )
