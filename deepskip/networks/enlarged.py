"""Larger images for any network, as DeepSkip's `enlarge` has them."""

from torch import Tensor, nn

from deepskip.network import averaged, enlarged


class Enlarged(nn.Module):
    """Runs a network on images enlarged `times` times, bilinearly, and averages logits over what became of each pixel.

    forward: (N, bands, H, W) float -> logits (N, classes, H, W).
    """

    def __init__(self, network: nn.Module, times: int) -> None:
        super().__init__()
        self.network, self.enlarge = network, times

    def forward(self, x: Tensor) -> Tensor:
        return averaged(self.network(enlarged(x, self.enlarge)), self.enlarge)
