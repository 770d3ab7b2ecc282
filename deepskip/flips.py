"""Flips at test: an image and its mirrorings go through a network, and their probabilities are averaged."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip.network import crop, multiple_of, pad_by_edge

# the axes that each mirroring turns round
MIRRORINGS: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (2, 3))


class Flipped(nn.Module):
    """A network whose probabilities are the mean over an image and its three mirrorings, at four times the time.

    forward: (N, bands, H, W) -> logits (N, V, H, W) fp32 of that mean: their sigmoid, for V > 1 their softmax, is the mean.
    The image is padded before it is turned round, so that its pixels are pooled together as they are unflipped: in tiles the
    result is that of the whole image here too (deepskip.tiling).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # what whoever cuts images into tiles asks of a network
        self.enlarge, self.num_classes = getattr(network, "enlarge", 1), getattr(network, "num_classes", None)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        H, W = image_NCHW.shape[-2:]
        multiple = multiple_of(self.network)
        return crop(mean_logits(self.network, pad_by_edge(image_NCHW, -H % multiple, -W % multiple)), H, W)


def mean_logits(network: nn.Module, image_NCHW: Tensor) -> Tensor:
    """Computes the logits (N, V, H, W) fp32 of the mean probability over an image's mirrorings; V as in `to_probabilities`."""
    total: list[Tensor] = []
    for axes in MIRRORINGS:
        logs = log_probabilities(turned(network(turned(image_NCHW, axes)).float(), axes))
        total = [torch.logaddexp(*pair) for pair in zip(total, logs, strict=True)] if total else logs
        # not beside the next pass
        del logs
    return total[0] - total[1] if len(total) == 2 else total[0]


def turned(x_NCHW: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Turns maps round, as they are where there are no axes."""
    return x_NCHW.flip(axes).contiguous(memory_format=torch.channels_last) if axes else x_NCHW


def log_probabilities(logits: Tensor) -> list[Tensor]:
    """Gives the logarithms of foreground's and background's probability, or of all classes'; close to 1 they keep digits."""
    return [F.logsigmoid(logits), F.logsigmoid(-logits)] if logits.shape[1] == 1 else [F.log_softmax(logits, 1)]
