"""DeepSkip trained with branches that fold, or distilled from a larger network: tried on the published benchmarks.

`pip install docs/benchmarks/trials` adds both as networks. Their inference costs what DeepSkip's does.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip import checkpoint, kernels, networks
from deepskip.encoders import ConvNormReLU, norm_layer
from deepskip.network import DecoderLevel, DeepSkipUNet


class BranchedBlock(nn.Module):
    """Norm of a 3x3 convolution, plus norm of a 1x1 one, plus norm of the input where channels agree; then ReLU (RepVGG).

    Args:
        block: block whose convolution and norm are taken over.
    """

    def __init__(self, block: ConvNormReLU) -> None:
        super().__init__()
        self.conv, self.norm = block[0], block[1]
        out_channels, in_channels = self.conv.weight.shape[:2]
        self.point = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.point_norm = norm_layer("batch", out_channels)
        self.input_norm = norm_layer("batch", out_channels) if in_channels == out_channels else None
        nn.init.kaiming_normal_(self.point.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the maps (N, out_channels, H, W) of x (N, in_channels, H, W)."""
        if not self.training:
            weight, bias = self.folded()
            return kernels.conv3(x, weight, bias).relu_()
        y = self.norm(kernels.conv3(x, self.conv.weight)) + self.point_norm(F.conv2d(x, self.point.weight))
        return F.relu(y if self.input_norm is None else y + self.input_norm(x))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the weight (out_channels, in_channels, 3, 3) and bias (out_channels,) that give the same maps."""
        point = F.pad(self.point.weight, (1, 1, 1, 1))
        pairs = [(self.conv.weight, self.norm), (point, self.point_norm)]
        if self.input_norm is not None:
            one = torch.eye(len(point), dtype=point.dtype, device=point.device)[..., None, None]
            pairs.append((F.pad(one, (1, 1, 1, 1)), self.input_norm))
        scales = [norm.weight * (norm.running_var + norm.eps).rsqrt() for _, norm in pairs]
        weight = sum(w * s[:, None, None, None] for (w, _), s in zip(pairs, scales, strict=True))
        bias = sum(norm.bias - norm.running_mean * s for (_, norm), s in zip(pairs, scales, strict=True))
        return weight, bias


class BranchedLevel(DecoderLevel):
    """A decoder level whose linear 3x3 branches have a 1x1 one each, added to their centre.

    Args:
        level: level whose branches and blocks are taken over.
    """

    def __init__(self, level: DecoderLevel) -> None:
        nn.Module.__init__(self)
        self.upsample, self.branches, self.merge = level.upsample, level.branches, level.merge
        shapes = [branch.weight.shape[:2] for branch in level.branches]
        self.points = nn.ModuleList(nn.Conv2d(c, k, 1, bias=False) for k, c in shapes)
        for point in self.points:
            nn.init.kaiming_normal_(point.weight, mode="fan_in", nonlinearity="linear")

    def weights(self) -> list[Tensor]:
        """Return the weights of eq. 1, each (C_u, C_j, 3, 3)."""
        pairs = zip(self.branches, self.points, strict=True)
        return [branch.weight + F.pad(point.weight, (1, 1, 1, 1)) for branch, point in pairs]

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Compute the decoder map of `DecoderLevel.forward`."""
        return self.merge(kernels.deep_skip(inputs, self.weights(), self.upsample))


def branched(in_channels: int, num_classes: int, base_channels: int = 8, levels: int = 5) -> DeepSkipUNet:
    """Build DeepSkip with branches that fold into its own weights.

    Args:
        in_channels: bands.
        num_classes: 1 for binary, else exclusive classes.
        base_channels: see `DeepSkipUNet`.
        levels: see `DeepSkipUNet`.
    """
    network = DeepSkipUNet(in_channels, num_classes, base_channels, levels)
    for u, level in enumerate(network.decoder):
        network.decoder[u] = BranchedLevel(level)
    for part in list(network.modules()):
        for name, child in part.named_children():
            if isinstance(child, ConvNormReLU):
                setattr(part, name, BranchedBlock(child))
    return network


@torch.no_grad()
def folded(network: DeepSkipUNet, base_channels: int = 8) -> DeepSkipUNet:
    """Return the DeepSkip network that computes what a branched one does in inference.

    Args:
        network: what `branched` built.
        base_channels: see `branched`.
    """
    plain = DeepSkipUNet(network.in_channels, network.num_classes, base_channels, network.levels)
    blocks = [m for m in plain.modules() if isinstance(m, ConvNormReLU)]
    for block, source in zip(blocks, (m for m in network.modules() if isinstance(m, BranchedBlock)), strict=True):
        weight, bias = source.folded()
        block[0].weight.copy_(weight)
        block[1].bias.copy_(bias)
        block[1].running_var.fill_(1 - block[1].eps)
    for level, source in zip(plain.decoder, network.decoder, strict=True):
        for branch, weight in zip(level.branches, source.weights(), strict=True):
            branch.weight.copy_(weight)
    plain.head.load_state_dict(network.head.state_dict())
    return plain


class AddTeacher(torch.autograd.Function):
    """The logits themselves; the gradient is that of the loss plus `share` times BCE's with a teacher's probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, share: float) -> Tensor:
        """Return the logits (N, 1, H, W)."""
        ctx.save_for_backward(logits, teacher)
        ctx.share = share
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient (N, 1, H, W)."""
        logits, teacher = ctx.saved_tensors
        more = (logits.sigmoid() - teacher) * (ctx.share / logits.numel())
        return gradient + more, None, None


@functools.lru_cache(1)
def load_teacher(path: str) -> nn.Module:
    """Return the averaged network of a checkpoint, in inference."""
    state = checkpoint.read_model(Path(path))
    data = state["data"]
    teacher = networks.build(state["config"]["model"], data["in_channels"], data["num_classes"])
    teacher.load_state_dict(state["model"] if state["ema"] is None else state["ema"])
    return teacher.eval().requires_grad_(False)


class Distilled(DeepSkipUNet):
    """DeepSkip, whose training also minimises BCE with the probabilities of a trained network; for one worker.

    Args:
        in_channels: bands.
        teacher: checkpoint of the trained network, for the same bands.
        share: weight of that BCE.
        base_channels: see `DeepSkipUNet`.
    """

    def __init__(self, in_channels: int, teacher: str, share: float, base_channels: int) -> None:
        super().__init__(in_channels, 1, base_channels)
        self.teacher, self.share = teacher, share

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, 1, H, W) of images (N, in_channels, H, W)."""
        logits = super().forward(x)
        if not self.training:
            return logits
        with torch.no_grad():
            probability = load_teacher(self.teacher)(x).sigmoid()
        return AddTeacher.apply(logits, probability, self.share)


def distilled(
    in_channels: int, num_classes: int, teacher: str, share: float = 1.0, base_channels: int = 8
) -> DeepSkipUNet:
    """Build `Distilled`, for one class.

    Args:
        in_channels: bands.
        num_classes: 1.
        teacher: see `Distilled`.
        share: see `Distilled`.
        base_channels: see `Distilled`.

    Raises:
        ValueError: for more classes.
    """
    if num_classes != 1:
        raise ValueError(f"num_classes is {num_classes}; distilled is for one class")
    return Distilled(in_channels, teacher, share, base_channels)
