"""Training crops: cut at random places, with objects of other samples pasted on (copy-paste, Ghiasi et al. 2021)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Crops:
    """How training crops are cut.

    Attributes:
        size: Side of the square crop in pixels.
        foreground: Share of crops, 0 to 1, that are placed around a foreground pixel.
        seed: Seed of the random numbers.
        paste: Share of crops, 0 to 1, for which another sample of the same shard is drawn, whose objects are pasted on.
    """

    size: int
    foreground: float
    seed: int
    paste: float = 0.0


class Item(NamedTuple):
    """One sample to train on.

    Attributes:
        image: Image (H, W, bands).
        mask: Labels (H, W) uint8.
        mean: Mean of each band to normalise by, (bands,) float32.
        std: Standard deviation of each band to normalise by, (bands,) float32.
    """

    image: np.ndarray
    mask: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def random_crop(
    image_HWC: np.ndarray, mask_HW: np.ndarray, crops: Crops, ignore_index: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a random square crop out of an image and its mask, at `crop_place` and by `cut`.

    Args:
        image_HWC: Image (H, W, bands).
        mask_HW: Labels (H, W).
        crops: Size and share of foreground crops.
        ignore_index: Label of ignored pixels.
        rng: Source of random numbers.

    Returns:
        Image (size, size, bands) and mask (size, size), views where no padding was needed.
    """
    rows, columns = crop_place(mask_HW, crops, ignore_index, rng)
    return cut(image_HWC[rows, columns], mask_HW[rows, columns], crops.size, ignore_index)


def cut(image_hwC: np.ndarray, mask_hw: np.ndarray, size: int, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad a window of an image, and of its mask, to a square at the bottom and right.

    Args:
        image_hwC: Window (h, w, bands), which is padded with its edge values.
        mask_hw: Window (h, w), which is padded with ignore_index.
        size: Side of the square in pixels, at least h and w.
        ignore_index: Label of ignored pixels.

    Returns:
        Image (size, size, bands) and mask (size, size), the windows themselves if they are large enough.
    """
    h, w = mask_hw.shape
    if (h, w) == (size, size):
        return image_hwC, mask_hw
    pad = ((0, size - h), (0, size - w))
    return np.pad(image_hwC, (*pad, (0, 0)), mode="edge"), np.pad(mask_hw, pad, constant_values=ignore_index)


def crop_place(mask_HW: np.ndarray, crops: Crops, ignore_index: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Draw the place of a random square crop.

    With probability crops.foreground the crop holds a random pixel of a random foreground class of the image.

    Args:
        mask_HW: Labels (H, W) uint8.
        crops: Size and share of foreground crops.
        ignore_index: Label of ignored pixels.
        rng: Source of random numbers; each call draws the same number of values, whatever the image holds.

    Returns:
        Rows and columns within the image; fewer than the crop's size where the image is smaller.
    """
    size = crops.size
    height, width = mask_HW.shape
    # A smaller image is padded at the bottom and right.
    H, W = max(height, size), max(width, size)
    # All numbers are drawn whether used or not, so that the image's contents do not shift the random stream.
    around, share, y, x = rng.random(4)
    which = rng.random()
    top, left = int(y * (H - size + 1)), int(x * (W - size + 1))
    if around < crops.foreground:
        # Objects are small, so all but a few pixels are passed over once.
        places = np.flatnonzero((mask_HW != 0) & (mask_HW != ignore_index))
        labels = mask_HW.reshape(-1)[places]
        classes = np.flatnonzero(np.bincount(labels, minlength=256))
        if len(classes):
            pixels = places[labels == classes[int(which * len(classes))]]
            row, column = divmod(int(pixels[int(share * len(pixels))]), width)
            # The pixel lies anywhere in the crop with equal probability, as far as the image's border allows.
            top = min(max(row - int(y * size), 0), H - size)
            left = min(max(column - int(x * size), 0), W - size)
    return slice(top, min(top + size, height)), slice(left, min(left + size, width))


def donor_of(sample: int, shard: range, share: float, rng: np.random.Generator) -> int | None:
    """Draw the sample whose objects are pasted onto another sample.

    Args:
        sample: Number of the sample that is pasted onto.
        shard: Sample numbers of its shard; donors come from the same shard, which is already open.
        share: Share of samples, 0 to 1, that get a donor.
        rng: Source of random numbers.

    Returns:
        The number of another sample of the shard, or None for no donor.
    """
    chance, which = rng.random(2)
    if chance >= share or len(shard) < 2:
        return None
    donor = shard[int(which * (len(shard) - 1))]
    return donor if donor < sample else donor + 1


def pasted(item: Item, donor: Item, ignore_index: int, turn: int) -> Item:
    """Paste the foreground of a donor onto a crop of the same size.

    The donor's pixels are normalised by the donor's own statistics. Ignored pixels, in either mask, are not changed.

    Args:
        item: Crop with image (size, size, bands) and mask (size, size).
        donor: Crop of the same shape, whose objects are taken.
        ignore_index: Label of ignored pixels.
        turn: Orientation of the donor, 0 to 7: number of quarter turns; from 4 on, of its mirror image.

    Returns:
        A new item with a float32 image and the statistics of `item`.
    """
    objects, values = donor.mask, donor.image
    if turn >= 4:
        objects, values = objects[:, ::-1], values[:, ::-1]
    objects, values = np.rot90(objects, turn % 4), np.rot90(values, turn % 4)
    laid_on = (objects != 0) & (objects != ignore_index) & (item.mask != ignore_index)
    found = values[laid_on].astype(np.float32)
    # Without this branch, rounding would change values that need no scaling.
    if not (np.array_equal(item.mean, donor.mean) and np.array_equal(item.std, donor.std)):
        # A band without contrast is normalised as if its standard deviation were 1.
        own, other = (np.where(std > 0, std, 1) for std in (item.std, donor.std))
        found = (found - donor.mean) / other * own + item.mean
    image, mask = item.image.astype(np.float32), item.mask.copy()
    image[laid_on], mask[laid_on] = found, objects[laid_on]
    return Item(image, mask, item.mean, item.std)
