"""Any input size for networks that halve theirs a fixed number of times."""

from torch import Tensor, nn

from deepskip.network import crop, pad_by_edge


class Padded(nn.Module):
    """Runs a network on input padded by its edge to a multiple of `multiple`, twice that at least, and crops the logits.

    forward: (N, bands, H, W) float -> logits (N, classes, H, W).
    """

    def __init__(self, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # of one pixel at the lowest level instance norm has no deviation
        bottom, right = (max(-side % self.multiple, 2 * self.multiple - side) for side in (height, width))
        return crop(self.network(pad_by_edge(x, bottom, right)), height, width)
