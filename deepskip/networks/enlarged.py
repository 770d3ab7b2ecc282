"""Enlarge images for any network, as DeepSkip's setting `enlarge` does."""

from torch import Tensor, nn

from deepskip.network import averaged, enlarged


class Enlarged(nn.Module):
    """Run a network on bilinearly enlarged images, and average its logits over the square that each pixel became.

    Args:
        network: maps images (N, bands, H, W) to logits (N, classes, H, W).
        times: factor of the enlargement.
    """

    def __init__(self, network: nn.Module, times: int) -> None:
        super().__init__()
        self.network, self.enlarge = network, times

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W) of images (N, bands, H, W)."""
        return averaged(self.network(enlarged(x, self.enlarge)), self.enlarge)
