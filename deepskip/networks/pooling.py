"""Pooling to a fixed number of cells in a form that every runtime of exported networks has."""

import torch
from torch import Tensor, nn


class CellMeans(nn.Module):
    """The means over n x n cells of a map, as nn.AdaptiveAvgPool2d(n) has them, by two matrix products.

    ONNX has no such pooling for maps of any size, and what its exporter makes of it fails where a map is small.
    forward: (N, C, H, W) -> (N, C, n, n).
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.shares(side, x) for side in x.shape[-2:])
        return rows @ x @ columns.T

    def shares(self, side: int, like: Tensor) -> Tensor:
        """Give the share (cells, side) of each pixel in each cell's mean: cell i has pixels floor(i s/n) to ceil((i+1) s/n)."""
        pixel = torch.arange(side, device=like.device)
        cell = torch.arange(self.cells, device=like.device)[:, None]
        first, end = cell * side // self.cells, ((cell + 1) * side + self.cells - 1) // self.cells
        inside = ((pixel >= first) & (pixel < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


def with_exportable_pooling(network: nn.Module) -> nn.Module:
    """Replace a network's adaptive average pooling to more than one cell; it computes the same."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size not in (1, (1, 1)):
                size = child.output_size
                cells = size if isinstance(size, int) else (size or (None,))[0]
                # what the field's networks have: squares
                assert isinstance(cells, int)
                assert size in (cells, (cells, cells))
                setattr(parent, name, CellMeans(cells))
    return network
