"""Build UNet 3+ (Huang et al. 2020, ICASSP, "UNet 3+: A Full-Scale Connected UNet for Medical Image Segmentation").

Every decoder level takes all encoder maps of its own level and above, and all decoder maps below it. The paper's
additions for training are not included: deep supervision and the classification-guided module.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip.encoders import ConvNormReLU
from deepskip.networks.padded import Padded

LEVELS = 5


class UNet3Plus(nn.Module):
    """UNet 3+ for images whose height and width are multiples of 16.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        base_channels: channels of the first encoder level, doubled at each level, and of every branch; a decoder level has five
            times as many.
    """

    def __init__(self, in_channels: int, num_classes: int, base_channels: int) -> None:
        super().__init__()
        encoded = [base_channels * 2**u for u in range(LEVELS)]
        wide = LEVELS * base_channels
        self.encoder = nn.ModuleList(
            nn.Sequential(ConvNormReLU(below, channels, "batch"), ConvNormReLU(channels, channels, "batch"))
            for below, channels in zip([in_channels, *encoded], encoded, strict=False)
        )
        # Level u takes E_0 .. E_u, D_{u+1} .. D_{B-2} and E_{B-1}.
        self.branches = nn.ModuleList(
            nn.ModuleList(
                ConvNormReLU(encoded[j] if j <= u or j == LEVELS - 1 else wide, base_channels, "batch")
                for j in range(LEVELS)
            )
            for u in range(LEVELS - 1)
        )
        self.merges = nn.ModuleList(ConvNormReLU(wide, wide, "batch") for _ in range(LEVELS - 1))
        self.head = nn.Conv2d(wide, num_classes, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W) of images (N, bands, H, W)."""
        maps: list[Tensor] = []
        for u, level in enumerate(self.encoder):
            x = level(x if u == 0 else F.max_pool2d(x, 2))
            maps.append(x)
        for u in reversed(range(LEVELS - 1)):
            size = maps[u].shape[-2:]
            brought = [bring(y, size, 2 ** (u - j) if j < u else 1) for j, y in enumerate(maps)]
            branches = self.branches[u]
            assert isinstance(branches, nn.ModuleList)
            taken = [branch(y) for branch, y in zip(branches, brought, strict=True)]
            maps[u] = self.merges[u](torch.cat(taken, 1))
        logits: Tensor = self.head(maps[0])
        return logits


def bring(x: Tensor, size: torch.Size, shrink: int) -> Tensor:
    """Resize a map to a level's size: by max pooling if it is larger, bilinearly if it is smaller.

    Args:
        x: map (N, C, h, w).
        size: height and width of the level.
        shrink: factor of the max pooling; 1 enlarges instead.

    Returns:
        The map (N, C, H, W).
    """
    if shrink > 1:
        return F.max_pool2d(x, shrink)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def build_unet3plus(in_channels: int, num_classes: int, *, base_channels: int) -> nn.Module:
    """Build UNet 3+ for images of any size.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        base_channels: see UNet3Plus.
    """
    return Padded(UNet3Plus(in_channels, num_classes, base_channels), 2 ** (LEVELS - 1))
