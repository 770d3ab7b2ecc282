"""Compute large images in overlapping tiles, a stripe of rows at a time, with the result of the whole image.

Along each side tiles start at multiples of 2^(B-1), where the network's pooling starts too. They overlap by twice the
margin and a ramp. The margin is the receptive radius, so on the ramp both tiles have the values of the whole image.
Weights that sum to one blend the tiles there. With batch norm that is exact. Group and instance-batch norm use
statistics of each tile, and a broad ramp hides the difference.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deepskip.flips import Flipped
from deepskip.instance_batch_norm import InstanceBatchNorm
from deepskip.network import DeepSkipUNet, multiple_of

RAMP = 32
# For networks whose tiles differ slightly even far from their borders.
BROAD_RAMP = 128
# The margin for other networks than DeepSkip, whose receptive radius is not known.
OTHER_MARGIN = 64


@dataclass(frozen=True)
class Overlap:
    """How neighbouring tiles overlap.

    Attributes:
        margin: pixels next to a tile's border that are discarded.
        ramp: pixels over which two tiles are blended.
        multiple: tiles start at multiples of it, in pixels.
    """

    margin: int
    ramp: int
    multiple: int

    @property
    def pixels(self) -> int:
        """The number of pixels that two neighbours share, at least."""
        return 2 * self.margin + self.ramp

    @property
    def smallest_tile(self) -> int:
        """The side of a tile, in pixels, below which its two ramps would meet."""
        return sum(-(-pixels // self.multiple) * self.multiple for pixels in (self.pixels, self.ramp))


@dataclass(frozen=True)
class Span:
    """A tile along one side: the network takes pixels start to stop, and first to last of its result are used.

    Attributes:
        start: first pixel of the tile.
        stop: end of the tile, excluded.
        first: first pixel whose result is used.
        last: end of those pixels, excluded.
        weights: (last - first,) float32, of the pixels that are used; at each pixel those of all tiles sum to one.
    """

    start: int
    stop: int
    first: int
    last: int
    weights: Tensor


def overlap_of(network: nn.Module) -> Overlap:
    """Return the overlap that a network's tiles need."""
    if isinstance(network, Flipped):
        return overlap_of(network.network)
    if not isinstance(network, DeepSkipUNet):
        return Overlap(OTHER_MARGIN, BROAD_RAMP, multiple_of(network))
    multiple = multiple_of(network)
    margin = -(-receptive_radius(network) // multiple) * multiple
    apart = any(isinstance(module, nn.GroupNorm | InstanceBatchNorm) for module in network.modules())
    return Overlap(margin, BROAD_RAMP if apart else RAMP, multiple)


def receptive_radius(network: DeepSkipUNet) -> int:
    """Compute the distance, in pixels along either side, within which an input pixel can change a pixel of the logits.

    An interval of output pixels is traced back through every path: 3x3 convolutions, pooling, bilinear upsampling, and
    the enlargement of the image.
    """
    convolutions = [
        sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in level.modules()) for level in network.encoder
    ]

    def of_encoded(u: int, low: int, high: int) -> tuple[int, int]:
        low, high = low - convolutions[u], high + convolutions[u]
        return (low, high) if u == 0 else of_encoded(u - 1, 2 * low, 2 * high + 1)

    def of_decoded(u: int, low: int, high: int) -> tuple[int, int]:
        if u == network.levels - 1:
            return of_encoded(u, low, high)
        # The two convolutions of the merge and that of the branch.
        low, high = low - 3, high + 3
        taken = range(u, network.levels - 1)[network.taken(0)] if network.deep_skips else [u]
        reached = [of_encoded(j, *upsampled_from(low, high, 2 ** (j - u))) for j in taken]
        reached.append(of_decoded(u + 1, *upsampled_from(low, high, 2)))
        return min(a for a, _ in reached), max(b for _, b in reached)

    radius, times = 0, network.enlarge
    for pixel in range(2 ** (network.levels - 1)):
        low, high = upsampled_from(*of_decoded(0, times * pixel, times * pixel + times - 1), times)
        radius = max(radius, pixel - low, high - pixel)
    return radius


def upsampled_from(low: int, high: int, scale: int) -> tuple[int, int]:
    """Return the range of pixels from which a range of pixels of a bilinearly enlarged map is computed.

    Args:
        low: first pixel of the enlarged map.
        high: last pixel of the enlarged map, included.
        scale: factor of the enlargement.

    Returns:
        The first and the last pixel of the map before; they may lie outside of it.
    """
    if scale == 1:
        return low, high
    # The centre of pixel y lies at (y + 0.5) / scale - 0.5; computed in integers.
    return (2 * low + 1 - scale) // (2 * scale), (2 * high + 1 - scale) // (2 * scale) + 1


def spans(length: int, tile: int, overlap: Overlap) -> list[Span]:
    """Cut one side of an image into tiles.

    Args:
        length: length of the side, in pixels.
        tile: side of a tile, in pixels; it is rounded down to the overlap's multiple.
        overlap: overlap of neighbouring tiles.

    Raises:
        ValueError: if the side is longer than a tile, and a tile too small for its overlaps.
    """
    if length <= tile:
        return [Span(0, length, 0, length, torch.ones(length))]
    if tile < overlap.smallest_tile:
        raise ValueError(f"tile is {tile}; with this network it must be {overlap.smallest_tile} or more")
    tile = tile // overlap.multiple * overlap.multiple
    advance = (tile - overlap.pixels) // overlap.multiple * overlap.multiple
    count = 1 - (tile - length) // advance
    starts = [i * advance for i in range(count)]
    # The last tile starts earlier instead of being shorter: tiles of one size can share a batch.
    starts[-1] = min(starts[-1], -(-(length - tile) // overlap.multiple) * overlap.multiple)
    stops = [*(start + tile for start in starts[:-1]), length]
    # Ramps start as late as the margin permits: the last tile may start earlier, and its ramp must not meet the one before.
    ramps = [stop - overlap.margin - overlap.ramp for stop in stops[:-1]]
    rise = (torch.arange(overlap.ramp, dtype=torch.float32) + 0.5) / overlap.ramp
    found = []
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        first = ramps[i - 1] if i else 0
        last = ramps[i] + overlap.ramp if i + 1 < count else length
        weights = torch.ones(last - first)
        if i:
            weights[: overlap.ramp] = rise
        if i + 1 < count:
            weights[-overlap.ramp :] = 1 - rise
        found.append(Span(start, stop, first, last, weights))
    return found


def stitched(
    logits_of: Callable[[Span, Sequence[Span]], Tensor],
    rows: Sequence[Span],
    columns: Sequence[Span],
    channels: int,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, Tensor]]:
    """Yield the logits of a whole image in stripes of rows, from top to bottom.

    Args:
        logits_of: takes a tile's rows and the columns of n <= `batch` tiles of one width, and returns their logits
            (n, channels, h, w).
        rows: spans of the image's height.
        columns: spans of the image's width.
        channels: number of channels of the logits.
        batch: largest number of tiles at once.
        device: device of the stripes.

    Yields:
        A stripe's first row, and its logits (channels, rows of the stripe, width) fp32.
    """
    width = columns[-1].last
    carried = torch.zeros(channels, 0, width, device=device)
    for row, below in zip(rows, [*rows[1:], None], strict=True):
        stripe = torch.zeros(channels, row.last - row.first, width, device=device)
        stripe[:, : carried.shape[1]] = carried
        for group in batches(columns, batch):
            logits = logits_of(row, group).float().to(device)
            for column, logits_VHW in zip(group, logits, strict=True):
                weights = row.weights[:, None] * column.weights
                inner = logits_VHW[
                    :,
                    row.first - row.start : row.last - row.start,
                    column.first - column.start : column.last - column.start,
                ]
                stripe[..., column.first : column.last] += weights.to(device) * inner
        whole = (below.first if below else row.last) - row.first
        # A copy, so that the stripe itself can be freed.
        carried = stripe[:, whole:].clone()
        yield row.first, stripe[:, :whole]


def batches(columns: Sequence[Span], batch: int) -> Iterator[Sequence[Span]]:
    """Yield groups of neighbouring tiles of one width, at most `batch` in a group."""
    group: list[Span] = []
    for column in columns:
        if group and (len(group) == batch or column.stop - column.start != group[0].stop - group[0].start):
            yield group
            group = []
        group.append(column)
    yield group


def logits_in_tiles(network: nn.Module, image_NCHW: Tensor, tile: int) -> Tensor:
    """Compute the logits of normalised images tile by tile.

    Args:
        network: maps images (N, bands, H, W) to logits (N, V, H, W).
        image_NCHW: images (N, bands, H, W).
        tile: side of a tile, in pixels.

    Returns:
        Logits (N, V, H, W) fp32.

    Raises:
        ValueError: if a tile is too small for its overlaps.
    """
    overlap = overlap_of(network)
    H, W = image_NCHW.shape[-2:]
    first: dict[str, int] = {}

    def logits_of(row: Span, group: Sequence[Span]) -> Tensor:
        crops = [image_NCHW[..., row.start : row.stop, column.start : column.stop] for column in group]
        logits = torch.stack([network(crop.contiguous(memory_format=torch.channels_last)) for crop in crops])
        first["N"], first["V"] = logits.shape[1:3]
        return logits.flatten(1, 2)

    rows, columns = spans(H, tile, overlap), spans(W, tile, overlap)
    channels = image_NCHW.shape[0] * classes_of(network, image_NCHW)
    stripes = stitched(logits_of, rows, columns, channels, device=image_NCHW.device)
    whole = torch.cat([stripe for _, stripe in stripes], dim=1)
    return whole.view(first["N"], first["V"], H, W)


def classes_of(network: nn.Module, image_NCHW: Tensor) -> int:
    """Return the number of logits that a network has for a pixel.

    Args:
        network: a network; if it has no `num_classes`, it is run once on a corner of the first image.
        image_NCHW: images (N, bands, H, W).
    """
    known = getattr(network, "num_classes", None)
    return known if isinstance(known, int) else int(network(image_NCHW[:1, :, :64, :64]).shape[1])


def enlarged_rows(small_VHW: np.ndarray, height: int, width: int, top: int, bottom: int) -> np.ndarray:
    """Compute some rows of bilinearly enlarged maps, without the whole of them in memory.

    The result is that of torch.nn.functional.interpolate with align_corners=False.

    Args:
        small_VHW: maps (V, h, w).
        height: height of the enlarged maps, in pixels.
        width: width of the enlarged maps, in pixels.
        top: first row to compute.
        bottom: end of the rows, excluded.

    Returns:
        Maps (V, bottom - top, width).
    """
    _, h, w = small_VHW.shape
    above, below, share_y = neighbours(np.arange(top, bottom), h, height)
    left, right, share_x = neighbours(np.arange(width), w, width)
    rows = small_VHW[:, above] * (1 - share_y)[:, None] + small_VHW[:, below] * share_y[:, None]
    enlarged: np.ndarray = rows[..., left] * (1 - share_x) + rows[..., right] * share_x
    return enlarged


def neighbours(pixels: np.ndarray, small: int, large: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for pixels of an enlarged side, the two pixels between which each one is interpolated.

    Args:
        pixels: pixels of the enlarged side, (n,).
        small: length of the side before, in pixels.
        large: length of the enlarged side, in pixels.

    Returns:
        The lower pixels, the upper pixels and the weights of the upper ones, each (n,).
    """
    place = np.clip((pixels + 0.5) * (small / large) - 0.5, 0, small - 1)
    low = np.minimum(place.astype(np.int64), small - 1)
    return low, np.minimum(low + 1, small - 1), (place - low).astype(np.float32)
