"""Upsampling by a whole number followed by three taps, as small matrices; what the deep-skip forms are made of.

conv3(up(x)) is linear in x, and up is separable: along one axis, row Y = s y + p of the result takes tap d of the row Y + d of
up(x), which is a mean of the rows y - 1, y, y + 1 of x. The weights repeat for every y but the first and the last.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def _dense(h: int, s: int, mode: str) -> Tensor:
    """Gives (h s, h, 3): weight of row y of x in tap d of row Y; taps outside are 0."""
    align_corners = False if mode == "bilinear" else None
    kind = "linear" if mode == "bilinear" else mode
    up = F.interpolate(torch.eye(h)[None], scale_factor=float(s), mode=kind, align_corners=align_corners)[0].T
    taps = torch.zeros(h * s, h, 3)
    taps[1:, :, 0], taps[:, :, 1], taps[:-1, :, 2] = up[:-1], up, up[1:]
    return taps


@lru_cache(maxsize=256)
def row_taps(h: int, s: int, mode: str) -> Tensor:
    """Gives (h, s, 3, 3): weight of row y + o - 1 of x in tap d of row s y + p, by y, p, o, d; what is outside is 0.

    h: rows of x. s: factor. mode: "bilinear" (align_corners=False) or "nearest". fp32, CPU; not to be written to.
    """
    # three rows have a first, a middle and a last one
    few = min(h, 3)
    dense = F.pad(_dense(few, s, mode), (0, 0, 1, 1)).view(few, s, few + 2, 3)
    blocks = torch.stack([dense[y, :, y : y + 3] for y in range(few)])
    return blocks if h <= 3 else torch.cat([blocks[:1], blocks[1:2].expand(h - 2, -1, -1, -1), blocks[2:]])


@lru_cache(maxsize=256)
def gathered_taps(h: int, s: int, mode: str) -> Tensor:
    """Gives (h, 3, 3 s), the transpose of `row_taps`: weight of row s (y - 1) + r, r from 0 to 3 s, in tap d of row y."""
    taps = F.pad(row_taps(h, s, mode), (0, 0, 0, 0, 0, 0, 1, 1))
    # row y is the row below for the outputs of y - 1, the row itself for its own, the row above for those of y + 1
    return torch.cat([taps[o : h + o, :, 2 - o] for o in range(3)], 1).transpose(1, 2).contiguous()


def column_taps(s: int, mode: str) -> Tensor:
    """Gives (s, 3, 3): as `row_taps`, of a column far from the sides."""
    return row_taps(3, s, mode)[1]
