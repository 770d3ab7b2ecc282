"""Augment batches on the device, for any number of bands.

The changes of a sample are drawn from (seed, epoch, sample) alone, so they are the same on any number of workers. The draws
are numbers on the host, made where a batch is made (`loader_entries`). They come to the device as one tensor with the batch.

Flips and quarter turns move pixels and change none: they are permutations of the pixels of a sample, taken from a table of the
eight symmetries of a square. Other rotations and scaling are resampled; geometry and resampling are done by kornia.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from deepskip.config import AugmentConfig
from deepskip.device import to_device

# tables of symmetries that are kept: a training has crops of one size
TABLES = 4


@dataclass(frozen=True)
class Draws:
    """The changes of each of N samples.

    Attributes:
        matrix: map about the centre, from input to output pixels (x, y), of shape (N, 2, 2).
        gain: factor of all bands, (N, 1).
        power: exponent of the values of each band, scaled to 0 to 1, (N, 1).
        shift: shift of each band in standard deviations, (N, bands).
        symmetry: number of quarter turns, plus 4 if the sample is mirrored left-right before, (N,) int64. It is the matrix
            without angle and scale.
        noise_seed: seed of the noise of each sample, N integers.
    """

    matrix: Tensor
    gain: Tensor
    power: Tensor
    shift: Tensor
    symmetry: Tensor
    noise_seed: list[int]


class LoaderEntries(TypedDict):
    """The draws of N samples as a batch carries them.

    Attributes:
        draws: what `pack` made of them, (N, 7 + bands) fp32.
        noise_seed: seed of the noise of each sample, N integers.
    """

    draws: Tensor
    noise_seed: list[int]


def draw(config: AugmentConfig, seed: int, epoch: list[int], sample: list[int], bands: int) -> Draws:
    """Draw the changes of N samples.

    Args:
        config: settings of the augmentation.
        seed: seed of the run.
        epoch: epoch of each sample, N numbers.
        sample: number of each sample, N numbers.
        bands: number of bands of the images.
    """
    matrices, gains, powers, shifts, symmetries, noise_seeds = [], [], [], [], [], []
    for e, s in zip(epoch, sample, strict=True):
        rng = np.random.default_rng([seed, e, s, 1])
        # Draw every number whether it is used or not, so that enabling one change does not alter the others.
        mirror_x, mirror_y, quarter, angle, zoom, bright, gain = rng.random(7)
        noise_seed = int(rng.integers(2**62))
        quarters = config.rotate90 * math.floor(4 * quarter)
        turn = math.radians(config.rotate * (2 * angle - 1)) + quarters * math.pi / 2
        size = (1 - config.scale) ** (2 * zoom - 1)
        cos, sin = math.cos(turn) * size, math.sin(turn) * size
        x = -1 if config.flip and mirror_x < 0.5 else 1
        y = -1 if config.flip and mirror_y < 0.5 else 1
        matrices.append([[cos * x, -sin * y], [sin * x, cos * y]])
        # Mirroring up-down is mirroring left-right and half a turn.
        symmetries.append((quarters + 2 * (y < 0)) % 4 + 4 * (x != y))
        gains.append([1 + config.contrast * (2 * gain - 1)])
        per_band = rng.uniform(-1, 1, bands)
        shifts.append(config.brightness * (2 * bright - 1) + config.band_shift * per_band)
        noise_seeds.append(noise_seed)
        # Drawn last: the numbers above are those of earlier versions.
        powers.append([(1 + config.gamma) ** (2 * rng.random() - 1)])
    return Draws(
        torch.tensor(matrices, dtype=torch.float32),
        torch.tensor(gains, dtype=torch.float32),
        torch.tensor(powers, dtype=torch.float32),
        torch.tensor(np.array(shifts), dtype=torch.float32),
        torch.tensor(symmetries),
        noise_seeds,
    )


def pack(draws: Draws) -> Tensor:
    """Return the draws as one tensor (N, 7 + bands) fp32, apart from noise_seed: one copy to a device."""
    parts = [draws.matrix.flatten(1), draws.gain, draws.symmetry[:, None].float(), draws.power, draws.shift]
    return torch.cat(parts, dim=1)


def unpack(packed: Tensor, noise_seed: list[int]) -> Draws:
    """Return the draws that `pack` packed into (N, 7 + bands), on the tensor's device."""
    matrix, gain, symmetry = packed[:, :4].unflatten(1, (2, 2)), packed[:, 4:5], packed[:, 5].long()
    return Draws(matrix, gain, packed[:, 6:7], packed[:, 7:], symmetry, noise_seed)


def loader_entries(config: AugmentConfig, seed: int, bands: int, epoch: list[int], sample: list[int]) -> LoaderEntries:
    """Return the draws of N samples as a batch carries them; the arguments are those of `draw`."""
    draws = draw(config, seed, epoch, sample, bands)
    return {"draws": pack(draws), "noise_seed": draws.noise_seed}


@lru_cache(TABLES)
def _sources(H: int, W: int, device: torch.device) -> Tensor:
    # (8, H W): for each symmetry, the source pixel of each place. Odd quarter turns need squares.
    places = torch.arange(H * W).view(H, W)
    found = []
    for symmetry in range(8):
        seen = places.flip(1) if symmetry >= 4 else places
        # The y axis points down, so a rotation from x to y goes from the second axis to the first.
        turns = symmetry % 4 if H == W else symmetry % 4 // 2 * 2
        found.append(torch.rot90(seen, -turns, (0, 1)).flatten())
    return torch.stack(found).to(device)


def permute(symmetry: Tensor, image_NCHW: Tensor, mask_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Move the pixels of each sample by one of the eight symmetries, exactly.

    Args:
        symmetry: (N,) int64, as in `Draws`, on the device.
        image_NCHW: (N, bands, H, W), any dtype; read without a copy in channels-last memory.
        mask_NHW: (N, H, W), any dtype.

    Returns:
        The image, in channels-last memory, and the mask.
    """
    N, C, H, W = image_NCHW.shape
    first = torch.arange(0, N * H * W, H * W, device=image_NCHW.device)
    rows = (_sources(H, W, image_NCHW.device)[symmetry] + first[:, None]).flatten()
    image = image_NCHW.permute(0, 2, 3, 1).reshape(-1, C).index_select(0, rows)
    mask = mask_NHW.reshape(-1).index_select(0, rows)
    return image.view(N, H, W, C).permute(0, 3, 1, 2), mask.view(N, H, W)


def resample(matrix: Tensor, image_NCHW: Tensor, mask_NHW: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Warp each sample by its map about the centre: the image bilinearly, the mask by nearest neighbour.

    Args:
        matrix: map about the centre, from input to output pixels (x, y), of shape (N, 2, 2).
        image_NCHW: images (N, bands, H, W).
        mask_NHW: labels (N, H, W), any integer type.
        ignore_index: label of pixels from outside; images get the value at the edge there.

    Returns:
        The images and the labels, of the same shapes.
    """
    # Imported only if it is needed: without rotation and scaling a machine can train without kornia.
    import kornia

    H, W = image_NCHW.shape[2:]
    # Filled on the device: a copy of numbers from the host would wait for it.
    centre = torch.cat([matrix.new_full((1,), (W - 1) / 2), matrix.new_full((1,), (H - 1) / 2)])
    affine = torch.cat([matrix, (centre - matrix @ centre)[..., None]], dim=2)
    warp = kornia.geometry.transform.warp_affine
    image_NCHW = warp(image_NCHW, affine, (H, W), mode="bilinear", padding_mode="border", align_corners=True)
    # Labels are shifted by one, in a type that holds 256, so that zeros from outside differ from label 0.
    labels = warp(
        mask_NHW[:, None].float() + 1, affine, (H, W), mode="nearest", padding_mode="zeros", align_corners=True
    )
    labels = labels[:, 0].round()
    return image_NCHW, torch.where(labels == 0, ignore_index, labels - 1).to(mask_NHW.dtype)


def raised(image_NCHW: Tensor, power: Tensor) -> Tensor:
    """Raise each band, scaled to 0 to 1 by its own range, to a power, and scale it back.

    Args:
        image_NCHW: images (N, bands, H, W).
        power: exponent for each image, (N, 1).

    Returns:
        The images (N, bands, H, W); a band without contrast is unchanged.
    """
    low, high = image_NCHW.amin((2, 3), keepdim=True), image_NCHW.amax((2, 3), keepdim=True)
    span = high - low
    scaled = (image_NCHW - low) / torch.where(span > 0, span, 1)
    return scaled.pow(power[..., None, None]) * span + low


def augment(
    config: AugmentConfig, draws: Draws, image_NCHW: Tensor, mask_NHW: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Apply the drawn changes to images and labels.

    Flips and quarter turns are exact. With other rotations or scaling, the image is resampled bilinearly and the mask by
    nearest neighbour. Pixels from outside then get the value at the edge in the image, and ignore_index in the mask.

    Args:
        config: settings of the augmentation.
        draws: changes that `draw` returned.
        image_NCHW: normalised images (N, bands, H, W).
        mask_NHW: integer labels (N, H, W).
        ignore_index: label of pixels that are not counted.

    Returns:
        The images (N, bands, H, W) and the labels (N, H, W).

    Raises:
        ValueError: if crops that are not square are to be rotated by quarter turns.
    """
    C, H, W = image_NCHW.shape[1:]
    device = image_NCHW.device
    if H != W and config.rotate90:
        raise ValueError(f"augment.rotate90 needs square crops; these are {H} x {W}")
    # The settings decide on the host: a look at the draws would wait for the device.
    if config.rotate or config.scale:
        image_NCHW, mask_NHW = resample(draws.matrix.to(device), image_NCHW, mask_NHW, ignore_index)
    elif config.flip or config.rotate90:
        image_NCHW, mask_NHW = permute(draws.symmetry.to(device), image_NCHW, mask_NHW)
    if config.gamma:
        image_NCHW = raised(image_NCHW, draws.power.to(device))
    if config.contrast or config.brightness or config.band_shift:
        image_NCHW = image_NCHW * draws.gain.to(device)[..., None, None] + draws.shift.to(device)[..., None, None]
    if config.noise:
        noise = [torch.randn(C, H, W, generator=torch.Generator().manual_seed(s)) for s in draws.noise_seed]
        image_NCHW = image_NCHW + config.noise * to_device(torch.stack(noise), device)
    return image_NCHW, mask_NHW
