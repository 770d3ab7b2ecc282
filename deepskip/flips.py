"""Average probabilities over an image and its mirrorings (test-time augmentation by flips)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip.network import crop, multiple_of, pad_by_edge

# The axes of (N, C, H, W) that each mirroring flips.
MIRRORINGS: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (2, 3))


class Flipped(nn.Module):
    """Wrap a network so that its probabilities are the mean over an image and its three mirrorings, in four times the time.

    The image is padded before it is mirrored, so that the same pixels are pooled together as without flips. So the
    result of tiles equals that of the whole image here too (deepskip.tiling).

    Args:
        network: maps images (N, bands, H, W) to logits (N, V, H, W).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # The code that cuts images into tiles reads these two from a network.
        self.enlarge, self.num_classes = getattr(network, "enlarge", 1), getattr(network, "num_classes", None)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Compute the logits (N, V, H, W) fp32 whose sigmoid, or softmax for V > 1, is the mean probability.

        Args:
            image_NCHW: normalised images (N, bands, H, W).
        """
        H, W = image_NCHW.shape[-2:]
        multiple = multiple_of(self.network)
        return crop(mean_logits(self.network, pad_by_edge(image_NCHW, -H % multiple, -W % multiple)), H, W)


def mean_logits(network: nn.Module, image_NCHW: Tensor) -> Tensor:
    """Compute the logits of the mean probability over an image's mirrorings.

    Args:
        network: maps images (N, bands, H, W) to logits (N, V, H, W).
        image_NCHW: normalised images (N, bands, H, W).

    Returns:
        Logits (N, V, H, W) fp32, for `inference.to_probabilities`.
    """
    total: list[Tensor] = []
    for axes in MIRRORINGS:
        logs = log_probabilities(turned(network(turned(image_NCHW, axes)).float(), axes))
        total = [torch.logaddexp(*pair) for pair in zip(total, logs, strict=True)] if total else logs
        # Free this memory before the next pass.
        del logs
    return total[0] - total[1] if len(total) == 2 else total[0]


def turned(x_NCHW: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mirror maps along axes, into channels-last memory; without axes, return them as they are.

    Args:
        x_NCHW: maps (N, C, H, W).
        axes: axes of `x_NCHW` to flip.
    """
    return x_NCHW.flip(axes).contiguous(memory_format=torch.channels_last) if axes else x_NCHW


def log_probabilities(logits: Tensor) -> list[Tensor]:
    """Return the log-probabilities of logits; logarithms keep their digits for probabilities close to 1.

    Args:
        logits: tensor (N, V, H, W).

    Returns:
        For V = 1 those of foreground and of background, each (N, 1, H, W); else one tensor (N, V, H, W) of all classes.
    """
    return [F.logsigmoid(logits), F.logsigmoid(-logits)] if logits.shape[1] == 1 else [F.log_softmax(logits, 1)]
