"""A category's samples, all on the device, and the plan of a training: which samples each step takes and how they are turned.

The plan is a function of the seed and the number of samples and steps alone, so every network sees the same batches.
"""

import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deepskip.inference import image_statistics, normalize

IGNORE_INDEX = 255
# a training sample is shown smaller or larger by up to this factor
ZOOM = 1.25
# and one laid around a foreground pixel larger by up to this one
CLOSE = 2.0


@dataclass(frozen=True)
class Split:
    """Samples of a split: images (N, bands, S, S) fp32, normalised, and masks (N, S, S) uint8 on a device.

    raw: the images as stored, (N, S, S, bands), for pictures.
    """

    keys: list[str]
    images: Tensor
    masks: Tensor
    raw: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Category:
    """A category's three splits."""

    name: str
    splits: dict[str, Split]

    @property
    def bands(self) -> int:
        """Bands of its images."""
        return self.splits["train"].images.shape[1]

    @property
    def size(self) -> int:
        """Height and width of its images."""
        return self.splits["train"].images.shape[2]


def load(path: Path, device: torch.device) -> Category:
    """Reads what jobs.comparison.data wrote; raises ValueError that names the file."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        N, H, W, C = (int(n) for n in arrays["shape"])
        masks = np.frombuffer(zlib.decompress(arrays["masks"].tobytes()), np.uint8).reshape(N, H, W)
        if "lengths" in arrays:
            ends = np.cumsum(arrays["lengths"])
            parts = [arrays["images"][end - length : end] for end, length in zip(ends, arrays["lengths"], strict=True)]
            images = np.stack([np.asarray(Image.open(io.BytesIO(part.tobytes()))) for part in parts])
        else:
            planes = np.frombuffer(zlib.decompress(arrays["images"].tobytes()), np.uint8)
            images = np.ascontiguousarray(planes.reshape(2, -1).T).view(np.float16)
        images = images.reshape(N, H, W, C)
    except (OSError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not what jobs.comparison.data writes: {error}") from error
    splits = {}
    for name in ("train", "val", "test"):
        own = np.flatnonzero(arrays["splits"] == name)
        chosen = torch.from_numpy(np.ascontiguousarray(images[own].transpose(0, 3, 1, 2))).to(device)
        splits[name] = Split(
            [str(key) for key in arrays["keys"][own]],
            torch.cat([normalize(image, *image_statistics(image)) for image in chosen.split(16)]),
            torch.from_numpy(masks[own].copy()).to(device),
            images[own],
        )
    return Category(path.stem, splits)


def size_of(path: Path) -> int:
    """Gives the height and width of a category's images without reading them."""
    with np.load(path, allow_pickle=False) as stored:
        return int(stored["shape"][1])


@cache
def digest_of(path: Path) -> str:
    """Gives the sha256 of a category's file, which the npz format keeps free of dates."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Plan(NamedTuple):
    """What each of (steps, batch) samples is: its number, and the map (2, 3) from output to input places, both -1 to 1.

    donor, donor_map: the sample whose objects are laid on it where `paste` is true.
    """

    sample: Tensor
    map: Tensor
    donor: Tensor
    donor_map: Tensor
    paste: Tensor


def draw_plan(
    split: Split, steps: int, batch_size: int, seed: int, foreground_crops: float = 0.0, copy_paste: float = 0.0
) -> Plan:
    """Draws the plan of a training on the split's device; all its numbers are drawn whether used or not."""
    count = steps * batch_size
    rng = np.random.default_rng([seed, len(split), 3])
    # every sample once before any comes twice
    epochs = -(-count // len(split))
    sample = np.concatenate([rng.permutation(len(split)) for _ in range(epochs)])[:count]
    u = rng.random((count, 10))
    donor = rng.integers(len(split), size=count)
    scale = ZOOM ** (2 * u[:, 0] - 1)
    centre = (2 * u[:, 1:3] - 1) * np.abs(1 - scale)[:, None]
    if foreground_crops:
        places = [np.argwhere(mask == 1) for mask in split.masks.cpu().numpy()]
        size = split.masks.shape[-1]
        for i in np.flatnonzero(u[:, 3] < foreground_crops):
            if len(found := places[sample[i]]):
                scale[i] = CLOSE ** (-u[i, 4])
                row, column = found[int(u[i, 5] * len(found))]
                at = (np.array([column, row]) + 0.5) / size * 2 - 1
                # the window lies anywhere around the pixel that is inside the image
                centre[i] = np.clip(at + (2 * u[i, 1:3] - 1) * scale[i], scale[i] - 1, 1 - scale[i])
    device = split.images.device
    shape = (steps, batch_size)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device).reshape(*shape, *array.shape[1:])

    return Plan(
        tensor(sample),
        tensor(maps(scale, centre, u[:, 6])),
        tensor(donor),
        tensor(maps(np.ones(count), np.zeros((count, 2)), u[:, 7])),
        tensor(u[:, 8] < copy_paste),
    )


def maps(scale: np.ndarray, centre: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Makes maps (N, 2, 3) that look at a window of `scale` about `centre`, in one of the square's eight positions."""
    position = (turn * 8).astype(int)
    quarter = position % 4
    cos, sin = np.array([1, 0, -1, 0])[quarter], np.array([0, 1, 0, -1])[quarter]
    mirror = np.where(position < 4, 1, -1)
    rows = [np.stack([scale * cos * mirror, -scale * sin, centre[:, 0]], 1),
            np.stack([scale * sin * mirror, scale * cos, centre[:, 1]], 1)]  # fmt: skip
    return np.stack(rows, 1).astype(np.float32)


def batch(split: Split, plan: Plan, step: int, paste: bool = False) -> tuple[Tensor, Tensor]:
    """Makes a step's images (N, bands, S, S), channels-last, and masks (N, S, S) uint8, without waiting for the device."""
    image, mask = view(split, plan.sample[step], plan.map[step])
    if paste:
        other, objects = view(split, plan.donor[step], plan.donor_map[step])
        laid_on = (objects == 1) & plan.paste[step][:, None, None] & (mask != IGNORE_INDEX)
        image, mask = torch.where(laid_on[:, None], other, image), torch.where(laid_on, objects, mask)
    return image.contiguous(memory_format=torch.channels_last), mask


def view(split: Split, sample: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Shows samples (N,) through maps (N, 2, 3): images bilinearly, masks by nearest; outside are the edge and IGNORE_INDEX."""
    images, masks = split.images[sample], split.masks[sample]
    grid = F.affine_grid(where, [len(sample), 1, *masks.shape[1:]], align_corners=False)
    image = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # labels shifted by one, so that the zeros from outside can be told from label 0
    labels = F.grid_sample(masks[:, None].float() + 1, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    labels = labels[:, 0].round()
    return image, torch.where(labels == 0, IGNORE_INDEX, labels - 1).to(torch.uint8)
