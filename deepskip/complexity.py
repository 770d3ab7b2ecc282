"""Count convolution weights: by the paper's equations 2 to 4 without building the network, or of a built network."""

from torch import nn

from deepskip.encoders import ENCODERS, RESNET34_BLOCKS

KERNEL = 3


def decoder_level_weights(u: int, base_channels: int, levels: int) -> int:
    """Count the convolution weights of one decoder level (eq. 2).

    Args:
        u: level, 1 to levels - 1.
        base_channels: b, the channels of level 1.
        levels: B, the depth of the network.
    """
    branches_and_merge: int = sum(2 ** (j - u) for j in range(u, levels)) + levels - u + 4
    weights: int = branches_and_merge * 2 ** (2 * u - 2) * base_channels**2 * KERNEL**2
    return weights


def conv_weights(
    in_channels: int, num_classes: int, base_channels: int = 8, levels: int = 5, encoder: str = "vgg16"
) -> int:
    """Count the network's convolution weights, without biases and normalisation (eq. 3 for vgg16, eq. 4 for resnet34).

    The paper prints f(Z^1) inside eq. 3's last sum where f(Z^u) is meant.

    Args:
        in_channels: bands of the input.
        num_classes: channels of the logits.
        base_channels: b, the channels of level 1.
        levels: B, the depth of the network.
        encoder: "vgg16" or "resnet34".

    Raises:
        ValueError: for an unknown encoder.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder is {encoder!r}; it must be one of {', '.join(ENCODERS)}")
    c: list[int] = [base_channels * 2**u for u in range(levels)]
    decoder = sum(decoder_level_weights(u, base_channels, levels) for u in range(1, levels))
    head = num_classes * c[0]
    below = range(1, levels)
    if encoder == "vgg16":
        first = (in_channels * c[0] + c[0] ** 2) * KERNEL**2
        rest = sum((c[u - 1] * c[u] + c[u] ** 2) * KERNEL**2 for u in below)
    else:
        first = in_channels * c[0] * KERNEL**2
        blocks = RESNET34_BLOCKS
        rest = sum(c[u - 1] * c[u] + (c[u - 1] * c[u] + (2 * blocks[u - 1] - 1) * c[u] ** 2) * KERNEL**2 for u in below)
    return first + rest + decoder + head


def convolution_weights(network: nn.Module) -> int:
    """Count a built network's convolution weights, without biases and normalisation."""
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
    return sum(module.weight.numel() for module in network.modules() if isinstance(module, kinds))
