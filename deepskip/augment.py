"""Augment batches on the device, for any number of bands.

The changes of a sample are drawn from (seed, epoch, sample) alone, so they are the same on any number of workers.
Geometry and resampling are done by kornia.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepskip.config import AugmentConfig


@dataclass(frozen=True)
class Draws:
    """The changes of each of N samples.

    Attributes:
        matrix: map about the centre, from input to output pixels (x, y), of shape (N, 2, 2).
        gain: factor of all bands, (N, 1).
        shift: shift of each band in standard deviations, (N, bands).
        noise_seed: seed of each sample's noise, N integers.
    """

    matrix: Tensor
    gain: Tensor
    shift: Tensor
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
    matrices, gains, shifts, noise_seeds = [], [], [], []
    for e, s in zip(epoch, sample, strict=True):
        rng = np.random.default_rng([seed, e, s, 1])
        # Draw every number whether it is used or not, so that enabling one change does not alter the others.
        mirror_x, mirror_y, quarter, angle, zoom, bright, gain = rng.random(7)
        noise_seed = int(rng.integers(2**62))
        turn = math.radians(config.rotate * (2 * angle - 1)) + config.rotate90 * math.floor(4 * quarter) * math.pi / 2
        size = (1 - config.scale) ** (2 * zoom - 1)
        cos, sin = math.cos(turn) * size, math.sin(turn) * size
        x = -1 if config.flip and mirror_x < 0.5 else 1
        y = -1 if config.flip and mirror_y < 0.5 else 1
        matrices.append([[cos * x, -sin * y], [sin * x, cos * y]])
        gains.append([1 + config.contrast * (2 * gain - 1)])
        per_band = rng.uniform(-1, 1, bands)
        shifts.append(config.brightness * (2 * bright - 1) + config.band_shift * per_band)
        noise_seeds.append(noise_seed)
    return Draws(
        torch.tensor(matrices, dtype=torch.float32),
        torch.tensor(gains, dtype=torch.float32),
        torch.tensor(np.array(shifts), dtype=torch.float32),
        noise_seeds,
    )


def augment(
    config: AugmentConfig, draws: Draws, image_NCHW: Tensor, mask_NHW: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Apply the drawn changes to images and labels.

    The image is resampled bilinearly, the mask by nearest neighbour. Pixels from outside get the edge's value in the
    image, and ignore_index in the mask.

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
    if config.flip or config.rotate90 or config.rotate or config.scale:
        matrix = draws.matrix.to(device)
        if H != W and config.rotate90:
            raise ValueError(f"augment.rotate90 needs square crops; these are {H} x {W}")
        centre = torch.tensor([(W - 1) / 2, (H - 1) / 2], device=device)
        shift = centre - matrix @ centre
        affine = torch.cat([matrix, shift[..., None]], dim=2)
        # Import it only if it is needed: without rotation, flips and scaling a machine can train without kornia.
        import kornia

        warp = kornia.geometry.transform.warp_affine
        image_NCHW = warp(image_NCHW, affine, (H, W), mode="bilinear", padding_mode="border", align_corners=True)
        # Labels are shifted by one, so that zeros from outside differ from label 0.
        labels = warp(
            (mask_NHW[:, None] + 1).float(), affine, (H, W), mode="nearest", padding_mode="zeros", align_corners=True
        )
        labels = labels[:, 0].round().to(mask_NHW.dtype)
        mask_NHW = torch.where(labels == 0, ignore_index, labels - 1)
    if config.contrast or config.brightness or config.band_shift:
        image_NCHW = image_NCHW * draws.gain.to(device)[..., None, None] + draws.shift.to(device)[..., None, None]
    if config.noise:
        noise = [torch.randn(C, H, W, generator=torch.Generator().manual_seed(s)) for s in draws.noise_seed]
        image_NCHW = image_NCHW + config.noise * torch.stack(noise).to(device)
    return image_NCHW, mask_NHW
