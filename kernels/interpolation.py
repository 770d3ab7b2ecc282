"""Upsampling by a whole factor followed by three taps, as small matrices; the deep-skip implementations use them.

conv3(up(x)) is linear in x, and up is separable. Along one axis, row Y = s y + p of the result takes tap d of row Y + d of
up(x), which is a mean of the rows y - 1, y, y + 1 of x. The weights are the same for every y but the first and the last.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def _dense(h: int, s: int, mode: str) -> Tensor:
    """Return the weights (h s, h, 3) of row y of x in tap d of row Y; taps outside are 0."""
    align_corners = False if mode == "bilinear" else None
    kind = "linear" if mode == "bilinear" else mode
    up = F.interpolate(torch.eye(h)[None], scale_factor=float(s), mode=kind, align_corners=align_corners)[0].T
    taps = torch.zeros(h * s, h, 3)
    taps[1:, :, 0], taps[:, :, 1], taps[:-1, :, 2] = up[:-1], up, up[1:]
    return taps


@lru_cache(maxsize=256)
def row_taps(h: int, s: int, mode: str) -> Tensor:
    """Return the weight of row y + o - 1 of x in tap d of row s y + p, indexed by y, p, o and d.

    Args:
        h: rows of x.
        s: upsampling factor.
        mode: "bilinear" (align_corners=False) or "nearest".

    Returns:
        Tensor (h, s, 3, 3), fp32 on the CPU, 0 for rows outside. It is cached: do not write to it.
    """
    # Three rows are enough for a first, a middle and a last one.
    few = min(h, 3)
    dense = F.pad(_dense(few, s, mode), (0, 0, 1, 1)).view(few, s, few + 2, 3)
    blocks = torch.stack([dense[y, :, y : y + 3] for y in range(few)])
    return blocks if h <= 3 else torch.cat([blocks[:1], blocks[1:2].expand(h - 2, -1, -1, -1), blocks[2:]])


@lru_cache(maxsize=256)
def gathered_taps(h: int, s: int, mode: str) -> Tensor:
    """Return the transpose of `row_taps`: the weight of row s (y - 1) + r, for r from 0 to 3 s, in tap d of row y.

    Args:
        h: rows of x.
        s: upsampling factor.
        mode: "bilinear" (align_corners=False) or "nearest".

    Returns:
        Tensor (h, 3, 3 s), fp32 on the CPU. It is cached: do not write to it.
    """
    taps = F.pad(row_taps(h, s, mode), (0, 0, 0, 0, 0, 0, 1, 1))
    # Row y is the row below for the outputs of y - 1, the same row for its own, and the row above for those of y + 1.
    return torch.cat([taps[o : h + o, :, 2 - o] for o in range(3)], 1).transpose(1, 2).contiguous()


def column_taps(s: int, mode: str) -> Tensor:
    """Return the taps (s, 3, 3) of a column far from the sides, as in `row_taps`.

    Args:
        s: upsampling factor.
        mode: "bilinear" (align_corners=False) or "nearest".
    """
    return row_taps(3, s, mode)[1]
