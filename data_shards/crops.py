"""Training crops: where they are cut, and other samples' objects laid on them (copy-paste, Ghiasi et al. 2021)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Crops:
    """How training crops are cut: size in pixels, share laid around a foreground pixel, seed.

    paste: share that another sample of their shard is drawn for, whose objects are laid on.
    """

    size: int
    foreground: float
    seed: int
    paste: float = 0.0


class Item(NamedTuple):
    """A sample to train on: image (H, W, bands), mask (H, W) uint8, the image's mean and std (bands,) float32."""

    image: np.ndarray
    mask: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def random_crop(
    image_HWC: np.ndarray, mask_HW: np.ndarray, crops: Crops, ignore_index: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a square crop; a smaller image is padded by its edge and its mask by ignore_index.

    With probability crops.foreground the crop holds a random pixel of a random foreground class of the image.
    """
    size = crops.size
    H, W = mask_HW.shape
    if size > H or size > W:
        pad = ((0, max(0, size - H)), (0, max(0, size - W)))
        image_HWC = np.pad(image_HWC, (*pad, (0, 0)), mode="edge")
        mask_HW = np.pad(mask_HW, pad, constant_values=ignore_index)
        H, W = mask_HW.shape
    # all are drawn whether used or not, so that the image's contents do not shift the stream of random numbers
    around, share, y, x = rng.random(4)
    which = rng.random()
    top, left = int(y * (H - size + 1)), int(x * (W - size + 1))
    if around < crops.foreground:
        classes = [label for label in np.unique(mask_HW) if label not in (0, ignore_index)]
        if classes:
            pixels = np.flatnonzero(mask_HW == classes[int(which * len(classes))])
            row, column = divmod(int(pixels[int(share * len(pixels))]), W)
            # the pixel lies anywhere in the crop with equal chance, as far as the image's border lets it
            top = min(max(row - int(y * size), 0), H - size)
            left = min(max(column - int(x * size), 0), W - size)
    window = slice(top, top + size), slice(left, left + size)
    return image_HWC[window], mask_HW[window]


def donor_of(sample: int, shard: range, share: float, rng: np.random.Generator) -> int | None:
    """Draws the sample whose objects are laid on a sample: another one of its shard, which is at hand; or none.

    share: of samples that get any.
    """
    chance, which = rng.random(2)
    if chance >= share or len(shard) < 2:
        return None
    donor = shard[int(which * (len(shard) - 1))]
    return donor if donor < sample else donor + 1


def pasted(item: Item, donor: Item, ignore_index: int, turn: int) -> Item:
    """Lays a donor's foreground on a crop of the same size, normalised by its own image's statistics; gives float32.

    turn: the donor's position, 0 to 7: quarter turns, from 4 on of its mirror image. Ignored pixels stay ignored.
    """
    objects, values = donor.mask, donor.image
    if turn >= 4:
        objects, values = objects[:, ::-1], values[:, ::-1]
    objects, values = np.rot90(objects, turn % 4), np.rot90(values, turn % 4)
    laid_on = (objects != 0) & (objects != ignore_index) & (item.mask != ignore_index)
    found = values[laid_on].astype(np.float32)
    # where all are normalised alike the values stay as they are, to the bit
    if not (np.array_equal(item.mean, donor.mean) and np.array_equal(item.std, donor.std)):
        # a band without contrast is normalised as if its deviation were 1
        own, other = (np.where(std > 0, std, 1) for std in (item.std, donor.std))
        found = (found - donor.mean) / other * own + item.mean
    image, mask = item.image.astype(np.float32), item.mask.copy()
    image[laid_on], mask[laid_on] = found, objects[laid_on]
    return Item(image, mask, item.mean, item.std)
