"""Define DeepSkipUNet: a light U-Net with deep skips in its decoder (Sun 2023, eq. 1; ELU-Net, Deng et al. 2022)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip import kernels
from deepskip.encoders import ENCODERS, ConvNormReLU

# Bias the head to logit(0.1), so that early predictions are mostly background.
FOREGROUND_PRIOR = 0.1
PRIOR_LOGIT = math.log(FOREGROUND_PRIOR / (1 - FOREGROUND_PRIOR))
HEAD_STD = 0.01
# A factor of 4 takes 16 times the memory.
LARGEST_ENLARGE = 4
# The multiple that most other networks need: their lowest map is at 1/32 of the input's size.
OTHER_MULTIPLE = 32


class DecoderLevel(nn.Module):
    """One decoder level: the deep-skip stage, then two blocks of convolution, normalisation and ReLU.

    Args:
        input_channels: channels of each input.
        channels: C_u, channels of the level's output.
        norm: "batch", "sync-batch", "instance-batch" or "group".
        upsample: "bilinear" or "nearest".
    """

    def __init__(self, input_channels: list[int], channels: int, norm: str, upsample: str) -> None:
        super().__init__()
        self.upsample = upsample
        # The branches are linear: no bias, no normalisation, no activation.
        self.branches = nn.ModuleList(nn.Conv2d(c, channels, 3, padding=1, bias=False) for c in input_channels)
        self.merge = nn.Sequential(
            ConvNormReLU(len(input_channels) * channels, channels, norm), ConvNormReLU(channels, channels, norm)
        )

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Compute the decoder map D_u (N, C_u, H_u, W_u).

        Args:
            inputs: the encoder maps E_u .. E_{B-1} and the decoder map D_{u+1}, each (N, C_j, H_j, W_j).
        """
        weights = [branch.get_parameter("weight") for branch in self.branches]
        merged: Tensor = self.merge(kernels.deep_skip(inputs, weights, self.upsample))
        return merged


class DeepSkipUNet(nn.Module):
    """Segment images of any size into logits for each pixel.

    Args:
        in_channels: bands, 1 or more.
        num_classes: 1 for binary (sigmoid), else exclusive classes (softmax) or independent labels.
        base_channels: b; level u has b * 2^(u-1) channels.
        levels: B, 3 to 6.
        encoder: "vgg16" or "resnet34".
        norm: "batch", "sync-batch" (over all ranks), "instance-batch" (half of the channels each) or "group".
        upsample: "bilinear" (align_corners=False) or "nearest".
        deep_skips: False leaves a plain U-Net of the same widths, the paper's baseline: level u then joins E_u and
            D_{u+1} only.
        enlarge: factor, 1 to 4, by which images are enlarged bilinearly before the first level. Logits are averaged
            over the square that each pixel became. For objects of few pixels, at enlarge^2 times the operations and the
            memory.

    Raises:
        ValueError: for an argument out of range. The message has the argument, its value and what is allowed.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        base_channels: int = 8,
        levels: int = 5,
        encoder: str = "vgg16",
        norm: str = "batch",
        upsample: str = "bilinear",
        deep_skips: bool = True,
        enlarge: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("num_classes", num_classes),
            ("base_channels", base_channels),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if norm == "instance-batch" and base_channels < 2:
            raise ValueError(f'base_channels is {base_channels}; with norm "instance-batch" it must be 2 or more')
        if not 3 <= levels <= 6:
            raise ValueError(f"levels is {levels}; it must be 3 to 6")
        if not 1 <= enlarge <= LARGEST_ENLARGE:
            raise ValueError(f"enlarge is {enlarge}; it must be 1 to {LARGEST_ENLARGE}")
        if encoder not in ENCODERS:
            raise ValueError(f"encoder is {encoder!r}; it must be one of {', '.join(ENCODERS)}")
        if upsample not in ("bilinear", "nearest"):
            raise ValueError(f'upsample is {upsample!r}; it must be "bilinear" or "nearest"')
        self.in_channels, self.num_classes, self.levels = in_channels, num_classes, levels
        self.deep_skips, self.enlarge = deep_skips, enlarge

        channels = [base_channels * 2**u for u in range(levels)]
        self.encoder = nn.ModuleList(
            ENCODERS[encoder](u + 1, in_channels if u == 0 else channels[u - 1], channels[u], norm)
            for u in range(levels)
        )
        # Level u takes E_u .. E_{B-1} and D_{u+1}. D_B is E_B, so E_B enters only through D_{B-1}.
        self.decoder = nn.ModuleList(
            DecoderLevel([*channels[self.taken(u)], channels[u + 1]], channels[u], norm, upsample)
            for u in range(levels - 1)
        )
        self.head = nn.Conv2d(channels[0], num_classes, 1)
        self.reset_parameters()

    def taken(self, u: int) -> slice:
        """Return the slice of the encoder maps that a decoder level takes.

        Args:
            u: level, 0 to levels - 2.
        """
        return slice(u, -1 if self.deep_skips else u + 1)

    def reset_parameters(self) -> None:
        """Initialise convolutions by He's rule (fan out), and the head's bias to a rare foreground."""
        if self.head.weight.is_meta:
            # There is nothing to fill, and torch would import its compiler for that: 2.5 s.
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for name, weight in self.decoder.named_parameters():
            if ".branches." in name:
                # A linear branch keeps the variance of its input.
                nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="linear")
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[0 if self.num_classes == 1 else slice(1, None)] = PRIOR_LOGIT

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, num_classes, H, W) of images.

        Args:
            x: images (N, in_channels, H, W), float, normalised.
        """
        x = enlarged(x, self.enlarge)
        height, width = x.shape[-2:]
        multiple = 2 ** (self.levels - 1)
        x = pad_by_edge(x, -height % multiple, -width % multiple)

        encoded = []
        for u, level in enumerate(self.encoder):
            x = level(x if u == 0 else F.max_pool2d(x, 2))
            encoded.append(x)
        for u in reversed(range(self.levels - 1)):
            x = self.decoder[u]([*encoded[self.taken(u)], x])
        return averaged(crop(self.head(x), height, width), self.enlarge)


def multiple_of(network: nn.Module) -> int:
    """Return the multiple, in pixels, to which a network pads each side; OTHER_MULTIPLE for other networks than DeepSkip."""
    return 2 ** (network.levels - 1) if isinstance(network, DeepSkipUNet) else OTHER_MULTIPLE


def enlarged(x: Tensor, times: int) -> Tensor:
    """Enlarge maps bilinearly, with pixels as areas (align_corners=False).

    Args:
        x: maps (N, C, H, W).
        times: factor, 1 or more.

    Returns:
        Maps (N, C, times * H, times * W).
    """
    return x if times == 1 else F.interpolate(x, scale_factor=float(times), mode="bilinear", align_corners=False)


def averaged(x: Tensor, times: int) -> Tensor:
    """Average maps over squares of pixels, back to their size before `enlarged`.

    Args:
        x: maps (N, C, times * H, times * W).
        times: side of a square, in pixels.

    Returns:
        Maps (N, C, H, W).
    """
    return x if times == 1 else F.avg_pool2d(x, times)


def pad_by_edge(x: Tensor, bottom: int, right: int) -> Tensor:
    """Pad maps by repeating the last row and the last column.

    Args:
        x: maps (N, C, H, W).
        bottom: number of rows to add.
        right: number of columns to add.

    Returns:
        Maps (N, C, H + bottom, W + right).
    """
    if not torch.compiler.is_exporting():
        return x if bottom == right == 0 else F.pad(x, (0, right, 0, bottom), mode="replicate")
    # Gather: with views an exported program would be fixed to either padded or unpadded sizes.
    height, width = x.shape[-2:]
    rows = torch.arange(height + bottom, device=x.device).clamp(max=height - 1)
    columns = torch.arange(width + right, device=x.device).clamp(max=width - 1)
    return x.index_select(2, rows).index_select(3, columns)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Return the first `height` rows and `width` columns of maps (N, C, H, W)."""
    if not torch.compiler.is_exporting():
        return x[..., :height, :width]
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return x.index_select(2, rows).index_select(3, columns)
