"""Folders as people have them: images of noise with bright squares, and their masks, in files of all kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.sources.folder import pack_folder

Scene = tuple[np.ndarray, np.ndarray]


def scene(seed: int, height: int = 64, width: int = 80, objects: int = 4, side: int = 10) -> Scene:
    """Draw an RGB image of dark noise with bright squares, and the true mask of 0 and 1."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(objects):
        top, left = rng.integers(2, height - side - 2), rng.integers(2, width - side - 2)
        mask[top : top + side, left : left + side] = 1
    return (rng.integers(0, 60, (height, width, 3)) + mask[..., None] * 150).astype(np.uint8), mask


def write(
    root: Path,
    image: Callable[[Path, Scene], Any] | None = None,
    mask: Callable[[Path, Scene], Any] | None = None,
    count: int = 4,
    **shape: int,
) -> dict[str, Scene]:
    """Write pairs into root/i and root/m; image and mask write one to a path without its ending, by default as PNG."""
    made = {}
    for folder in ("i", "m"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for k in range(count):
        made[str(k)] = found = scene(k, **shape)
        if image is None:
            Image.fromarray(found[0]).save(root / "i" / f"{k}.png")
        else:
            image(root / "i" / str(k), found)
        if mask is None:
            Image.fromarray(found[1] * 255).save(root / "m" / f"{k}.png")
        else:
            mask(root / "m" / str(k), found)
    return made


def packed(root: Path, **options: Any) -> tuple[dict[str, Scene], str]:
    """Pack root/i and root/m and read the data set whole; return images and masks by key, and the messages."""
    said: list[str] = []
    out = root / f"o{len(list(root.glob('o*')))}"
    pack_folder(root / "i", options.pop("masks", root / "m"), out, say=said.append, **options)
    return read(out), "\n".join(said)


def read(out: Path) -> dict[str, Scene]:
    """Read the splits of a data set: images (H, W, bands) and masks (H, W) by key."""
    found = {}
    for split in ("train", "val"):
        shards = Shards(out / split)
        for entry in shards.index.entries(list(range(len(shards)))):
            item = shards.whole(entry)
            found[entry.key] = item.image, item.mask
    return found


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Return the intersection over union of two masks' foreground."""
    a, b = one == 1, other == 1
    return float((a & b).sum() / max(1, (a | b).sum()))
