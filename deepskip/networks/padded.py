"""Accept any input size for networks that halve their input a fixed number of times."""

from torch import Tensor, nn

from deepskip.network import crop, pad_by_edge


class Padded(nn.Module):
    """Run a network on input padded by its edge, and crop the logits.

    Args:
        network: maps images (N, bands, H, W) to logits (N, classes, H, W), for H and W that are multiples of
            `multiple`.
        multiple: divisor of the padded sides, in pixels; a side has at least twice as many.
    """

    def __init__(self, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W) of images (N, bands, H, W), float."""
        height, width = x.shape[-2:]
        # At least two pixels a side at the lowest level: instance norm has no deviation of one pixel.
        bottom, right = (max(-side % self.multiple, 2 * self.multiple - side) for side in (height, width))
        return crop(self.network(pad_by_edge(x, bottom, right)), height, width)
