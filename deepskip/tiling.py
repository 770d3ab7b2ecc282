"""Large images in overlapping tiles whose result is that of the whole image, a stripe of rows at a time.

Along each side tiles start at multiples of 2^(B-1), where the network's pooling starts too, and overlap by twice the margin
and a ramp. The margin is the receptive radius, so on the ramp both tiles hold what the whole image would give, and weights
that add up to one lead from one to the other. With batch norm that is exact; with group and instance-batch norm, whose
statistics are each tile's own, a broad ramp hides the step.
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
# where tiles differ a little even far from their borders
BROAD_RAMP = 128
# what is taken for a network that is not ours
OTHER_MARGIN = 64


@dataclass(frozen=True)
class Overlap:
    """How neighbouring tiles overlap: pixels next to a tile's border that count nothing, and of the ramp between two tiles.

    multiple: tiles start at multiples of it.
    """

    margin: int
    ramp: int
    multiple: int

    @property
    def pixels(self) -> int:
        """Pixels that two neighbours share, at least."""
        return 2 * self.margin + self.ramp

    @property
    def smallest_tile(self) -> int:
        """The side of a tile below which its two ramps would meet."""
        return sum(-(-pixels // self.multiple) * self.multiple for pixels in (self.pixels, self.ramp))


@dataclass(frozen=True)
class Span:
    """A tile along one side: pixels start to stop go through the network, first to last of them count.

    weights: (last - first,) float32, of the pixels that count; those of all tiles at a pixel add up to one.
    """

    start: int
    stop: int
    first: int
    last: int
    weights: Tensor


def overlap_of(network: nn.Module) -> Overlap:
    """Gives the overlap that a network's tiles need."""
    if isinstance(network, Flipped):
        return overlap_of(network.network)
    if not isinstance(network, DeepSkipUNet):
        return Overlap(OTHER_MARGIN, BROAD_RAMP, multiple_of(network))
    multiple = multiple_of(network)
    margin = -(-receptive_radius(network) // multiple) * multiple
    apart = any(isinstance(module, nn.GroupNorm | InstanceBatchNorm) for module in network.modules())
    return Overlap(margin, BROAD_RAMP if apart else RAMP, multiple)


def receptive_radius(network: DeepSkipUNet) -> int:
    """Computes how many pixels away, along either side, an input pixel can still change a pixel of the logits.

    An interval of output pixels is followed back through every path: 3x3 convolutions, pooling, bilinear upsampling, and the
    enlargement of the image.
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
        # the two of the merge and the branch's own
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
    """Gives the pixels that pixels low to high of a map, enlarged bilinearly by a scale, are made of."""
    if scale == 1:
        return low, high
    # centres: (y + 0.5) / scale - 0.5, in whole numbers
    return (2 * low + 1 - scale) // (2 * scale), (2 * high + 1 - scale) // (2 * scale) + 1


def spans(length: int, tile: int, overlap: Overlap) -> list[Span]:
    """Cuts one side into tiles of `tile` pixels; raises ValueError where a tile is no larger than its overlaps."""
    if length <= tile:
        return [Span(0, length, 0, length, torch.ones(length))]
    if tile < overlap.smallest_tile:
        raise ValueError(f"tile is {tile}; with this network it must be {overlap.smallest_tile} or more")
    tile = tile // overlap.multiple * overlap.multiple
    advance = (tile - overlap.pixels) // overlap.multiple * overlap.multiple
    count = 1 - (tile - length) // advance
    starts = [i * advance for i in range(count)]
    # a short last tile begins earlier instead: tiles of one size go through the network in one batch
    starts[-1] = min(starts[-1], -(-(length - tile) // overlap.multiple) * overlap.multiple)
    stops = [*(start + tile for start in starts[:-1]), length]
    # as late as the margin permits: where the last tile begins earlier its ramp must not meet the one before
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
    """Gives the logits of a whole image in stripes from top to bottom: first row, and (channels, stripe's rows, width) fp32.

    logits_of: takes a tile's rows and some tiles' columns (at most `batch`, of one width), gives (n, channels, h, w).
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
        # a copy, so that the stripe itself can go
        carried = stripe[:, whole:].clone()
        yield row.first, stripe[:, :whole]


def batches(columns: Sequence[Span], batch: int) -> Iterator[Sequence[Span]]:
    """Groups neighbouring tiles of one width, at most `batch` together."""
    group: list[Span] = []
    for column in columns:
        if group and (len(group) == batch or column.stop - column.start != group[0].stop - group[0].start):
            yield group
            group = []
        group.append(column)
    yield group


def logits_in_tiles(network: nn.Module, image_NCHW: Tensor, tile: int, overlap: Overlap | None = None) -> Tensor:
    """Computes the logits (N, V, H, W) of normalised images tile by tile; tile: pixels a side."""
    overlap = overlap or overlap_of(network)
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
    """Gives the number of a network's logits a pixel; of one that does not say it, by trying."""
    known = getattr(network, "num_classes", None)
    return known if isinstance(known, int) else int(network(image_NCHW[:1, :, :64, :64]).shape[1])


def enlarged_rows(small_VHW: np.ndarray, height: int, width: int, top: int, bottom: int) -> np.ndarray:
    """Gives rows top to bottom of maps (V, h, w) that are enlarged bilinearly to a height and width: (V, bottom - top, width).

    As torch.nn.functional.interpolate of align_corners=False, without the whole of it in memory.
    """
    _, h, w = small_VHW.shape
    above, below, share_y = neighbours(np.arange(top, bottom), h, height)
    left, right, share_x = neighbours(np.arange(width), w, width)
    rows = small_VHW[:, above] * (1 - share_y)[:, None] + small_VHW[:, below] * share_y[:, None]
    return rows[..., left] * (1 - share_x) + rows[..., right] * share_x


def neighbours(pixels: np.ndarray, small: int, large: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives the two pixels of a side of `small` pixels that lie around each pixel of `large`, and the second one's share."""
    place = np.clip((pixels + 0.5) * (small / large) - 0.5, 0, small - 1)
    low = np.minimum(place.astype(np.int64), small - 1)
    return low, np.minimum(low + 1, small - 1), (place - low).astype(np.float32)
