"""Pool to a fixed number of cells in a form that every runtime of exported networks supports."""

import torch
from torch import Tensor, nn


class CellMeans(nn.Module):
    """The means over n x n cells of a map, as nn.AdaptiveAvgPool2d(n) computes them, by two matrix products.

    ONNX has no such pooling for maps of any size, and the substitute of its exporter fails for small maps.

    Args:
        cells: n.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        """Compute the means (N, C, n, n) of maps (N, C, H, W)."""
        rows, columns = (self.shares(side, x) for side in x.shape[-2:])
        return rows @ x @ columns.T

    def shares(self, side: int, like: Tensor) -> Tensor:
        """Return the share of each pixel in each cell's mean; cell i has pixels floor(i s/n) to ceil((i+1) s/n).

        Args:
            side: s, in pixels.
            like: tensor of any shape (*,), whose device and dtype the shares have.

        Returns:
            Shares (cells, side); each row sums to 1.
        """
        pixel = torch.arange(side, device=like.device)
        cell = torch.arange(self.cells, device=like.device)[:, None]
        first, end = cell * side // self.cells, ((cell + 1) * side + self.cells - 1) // self.cells
        inside = ((pixel >= first) & (pixel < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


def with_exportable_pooling(network: nn.Module) -> nn.Module:
    """Replace a network's adaptive average pooling to more than one cell; the results are the same.

    Args:
        network: network to change in place.

    Returns:
        The network.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size not in (1, (1, 1)):
                size = child.output_size
                cells = size if isinstance(size, int) else (size or (None,))[0]
                # The networks of the libraries pool to squares only.
                assert isinstance(cells, int)
                assert size in (cells, (cells, cells))
                setattr(parent, name, CellMeans(cells))
    return network
