"""Build H-DenseUNet (Li et al. 2018, IEEE TMI, "H-DenseUNet: Hybrid Densely Connected UNet...") with bands as third axis.

A 2-D DenseUNet takes all bands at once. A 3-D one takes the bands as a volume, together with the 2-D network's scores,
so its kernels combine neighbouring bands. Their features are added and merged (hybrid feature fusion).

The paper's volume has a label for each slice. Here one label is for all bands, so the 3-D features are averaged over
the bands before the last upsampling, which is 2-D. Both networks are trained together through the fused logits.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip.networks.padded import Padded

CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# In DenseNet-BC a bottleneck has four times the growth, and a transition halves the channels.
BOTTLENECK = 4


def norm_relu_conv(dims: int, in_channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    """Return the unit of a dense network: normalisation, ReLU, and a convolution that keeps the size."""
    conv = CONV[dims](in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return [NORM[dims](in_channels), nn.ReLU(inplace=True), conv]


def conv_norm_relu(dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Return the unit of the decoder: a convolution of width 3, normalisation, ReLU."""
    conv = CONV[dims](in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, NORM[dims](out_channels), nn.ReLU(inplace=True))


class DenseBlock(nn.ModuleList):
    """Layers that each take all maps before them (Huang et al. 2017).

    Args:
        dims: 2 or 3.
        in_channels: channels of the block's input.
        growth: channels of each layer.
        layers: number of layers.
    """

    def __init__(self, dims: int, in_channels: int, growth: int, layers: int) -> None:
        super().__init__(
            nn.Sequential(
                *norm_relu_conv(dims, in_channels + i * growth, BOTTLENECK * growth, 1),
                *norm_relu_conv(dims, BOTTLENECK * growth, growth, 3),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Append each layer's maps to x (N, C, [bands,] H, W): the result has C + layers * growth channels."""
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseUNet(nn.Module):
    """A DenseNet with a U-Net's decoder, whose skips are added, in 2 or 3 dimensions.

    Args:
        dims: 2 or 3.
        in_channels: channels of the input.
        stem: channels of the first convolution and of the result.
        growth: channels of each dense layer.
        blocks: number of layers of each dense block.
    """

    def __init__(self, dims: int, in_channels: int, stem: int, growth: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.dims = dims
        self.stem = nn.Sequential(
            CONV[dims](in_channels, stem, 7, stride=2, padding=3, bias=False), NORM[dims](stem), nn.ReLU(inplace=True)
        )
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        skips, channels = [stem], stem
        for i, layers in enumerate(blocks):
            self.blocks.append(DenseBlock(dims, channels, growth, layers))
            channels += layers * growth
            if i < len(blocks) - 1:
                skips.append(channels)
                self.transitions.append(nn.Sequential(*norm_relu_conv(dims, channels, channels // 2, 1)))
                channels //= 2
        self.last = nn.Sequential(NORM[dims](channels), nn.ReLU(inplace=True))
        # The lowest skip is widened to the channels of the maps that it is added to.
        # Above it the decoder has the widths of the skips.
        self.widen = CONV[dims](skips[-1], channels, 1, bias=False)
        widths = [channels, *reversed(skips[:-1])]
        self.decoder = nn.ModuleList(
            conv_norm_relu(dims, below, above) for below, above in zip(widths, [*widths[1:], stem], strict=True)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Compute features (N, stem, [bands / 2,] H / 2, W / 2).

        Args:
            x: maps (N, C, [bands,] H, W), H and W multiples of 2^(blocks + 1).
        """
        x = self.stem(x)
        skips = [x]
        x = F.max_pool2d(x, 3, 2, 1) if self.dims == 2 else F.max_pool3d(x, 3, 2, 1)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < len(self.transitions):
                skips.append(x)
                x = self.transitions[i](x)
                # As in the paper, transitions keep the third axis.
                x = F.avg_pool2d(x, 2) if self.dims == 2 else F.avg_pool3d(x, (1, 2, 2))
        x = self.last(x)
        skips[-1] = self.widen(skips[-1])
        for conv in self.decoder:
            skip = skips.pop()
            mode = "bilinear" if self.dims == 2 else "trilinear"
            x = conv(F.interpolate(x, skip.shape[2:], mode=mode, align_corners=False) + skip)
        return x


class HDenseUNet(nn.Module):
    """A 2-D and a 3-D DenseUNet with fused features.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        stem: channels of the first convolutions.
        growth: channels of each dense layer of the 2-D network.
        blocks: layers of each dense block of the 2-D network.
        growth_3d: channels of each dense layer of the 3-D network.
        blocks_3d: layers of each dense block of the 3-D network.
        features: channels of the fused features.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stem: int,
        growth: int,
        blocks: Sequence[int],
        growth_3d: int,
        blocks_3d: Sequence[int],
        features: int,
    ) -> None:
        super().__init__()
        self.flat = DenseUNet(2, in_channels, stem, growth, blocks)
        self.flat_features = conv_norm_relu(2, stem, features)
        self.flat_head = nn.Conv2d(features, num_classes, 1)
        self.volume = DenseUNet(3, 1 + num_classes, stem, growth_3d, blocks_3d)
        self.volume_features = conv_norm_relu(2, stem, features)
        self.fusion = conv_norm_relu(2, features, features)
        self.head = nn.Conv2d(features, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W).

        Args:
            x: images (N, bands, H, W), H and W multiples of 2^(blocks + 1).
        """
        size = x.shape[-2:]
        flat = self.flat_features(enlarge(self.flat(x), size))
        scores = self.flat_head(flat)
        volume = torch.cat([x[:, None], scores[:, :, None].expand(-1, -1, x.shape[1], -1, -1)], 1)
        with single_precision_on_cpus(x):
            deep = self.volume(volume.float() if x.device.type == "cpu" else volume).mean(2)
        deep = self.volume_features(enlarge(deep, size))
        logits: Tensor = self.head(self.fusion(flat + deep))
        return logits


def single_precision_on_cpus(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context that disables autocast on CPUs.

    There the weight gradient of a bf16 3-D convolution sometimes contains uninitialised memory. Seen with torch 2.13 on
    AVX-512 BF16, in the decoder's last convolution: from 1e-8 of the gradient to 1e26 times it.

    Args:
        x: tensor of any shape (*,), on the device in question.
    """
    return torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else nullcontext()


def enlarge(x: Tensor, size: torch.Size) -> Tensor:
    """Upsample maps (N, C, h, w) bilinearly to a height and width, `size`."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def build_h_dense_unet(in_channels: int, num_classes: int, **widths: int | Sequence[int]) -> nn.Module:
    """Build H-DenseUNet for images of any size.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        **widths: the other arguments of HDenseUNet.
    """
    network = HDenseUNet(in_channels, num_classes, **widths)  # type: ignore[arg-type]
    return Padded(network, 2 ** (len(network.flat.blocks) + 1))
