"""Prepare a network for prediction: normalisation, large images in tiles, probabilities and labels."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from deepskip import networks
from deepskip.checkpoint import NetworkState
from deepskip.tiling import logits_in_tiles, overlap_of

# Images of more pixels than this are cut into overlapping tiles.
WHOLE_IMAGE_PIXELS = 2048 * 2048
TILE = 1536


def normalized_by_itself(image_NCHW: Tensor) -> Tensor:
    """Scale each band of each image to mean 0 and standard deviation 1; a constant band becomes exactly 0.

    The lowest value is subtracted first. It leaves no error where values are close to each other, while a mean in fp32
    of values near 60,000 is off by up to 0.002, and each runtime of exported models rounds it in its own way.

    Args:
        image_NCHW: images (N, bands, H, W) of any real dtype.

    Returns:
        The scaled images (N, bands, H, W), fp32.
    """
    image_NCHW = image_NCHW.float()
    image_NCHW = image_NCHW - image_NCHW.amin((2, 3), keepdim=True)
    # Rows first: runtimes of exported models sum fp32 naively, and a quarter of a million numbers cost them four digits.
    mean_NC = image_NCHW.mean(3).mean(2)
    variance_NC = (image_NCHW - mean_NC[..., None, None]).square().mean(3).mean(2)
    return normalize(image_NCHW, mean_NC, variance_NC.sqrt())


def normalize(image_NCHW: Tensor, mean_NC: Tensor, std_NC: Tensor) -> Tensor:
    """Scale each band to mean 0 and standard deviation 1, in fp32; a constant band becomes 0.

    Args:
        image_NCHW: images (N, bands, H, W) of any real dtype.
        mean_NC: means, (N, bands) or (1, bands).
        std_NC: standard deviations, (N, bands) or (1, bands); 0 is taken as 1.
    """
    std_NC = torch.where(std_NC > 0, std_NC, 1.0)
    return (image_NCHW.float() - mean_NC[..., None, None]) / std_NC[..., None, None]


def missing_statistics(image_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return each band's mean and standard deviation over the pixels whose value is not nan.

    Args:
        image_NCHW: images (N, bands, H, W), nan where a value is missing.

    Returns:
        Means and deviations, each (N, bands) fp32; 0 for a band without any value.
    """
    wide = image_NCHW.double()
    seen = ~wide.isnan()
    counts = seen.sum((2, 3)).clamp(min=1)
    mean_NC = torch.where(seen, wide, 0).sum((2, 3)) / counts
    squares = torch.where(seen, wide - mean_NC[..., None, None], 0).square().sum((2, 3))
    return mean_NC.float(), (squares / counts).sqrt().float()


def filled(image_NCHW: Tensor, mean_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Replace missing values (nan) by their band's mean.

    Args:
        image_NCHW: images (N, bands, H, W), nan where a value is missing.
        mean_NC: means, (N, bands) or (1, bands).

    Returns:
        The filled images, and a boolean mask (N, H, W) of the pixels where no band has a value.
    """
    missing = image_NCHW.isnan()
    return torch.where(missing, mean_NC[..., None, None].to(image_NCHW.dtype), image_NCHW), missing.all(1)


def without_values(p_NVHW: Tensor, nowhere_NHW: Tensor | None) -> Tensor:
    """Set pixels without a value to background, with certainty.

    Args:
        p_NVHW: probabilities (N, V, H, W).
        nowhere_NHW: mask (N, H, W) of the pixels where no band has a value; None if there are none.
    """
    if nowhere_NHW is None:
        return p_NVHW
    nowhere = nowhere_NHW.to(p_NVHW.device)[:, None].expand_as(p_NVHW)
    background = torch.zeros_like(p_NVHW)
    if p_NVHW.shape[1] > 1:
        background[:, 0] = 1
    return torch.where(nowhere, background, p_NVHW)


def to_probabilities(logits: Tensor) -> Tensor:
    """Convert logits (N, V, H, W) to probabilities: sigmoid for V = 1, else softmax over the classes."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def to_labels(scores: Any, threshold: float) -> Any:
    """Convert scores to labels: over a threshold for V = 1, else the class of the highest score.

    Args:
        scores: tensor or array ([N,] V, H, W) of probabilities or logits.
        threshold: threshold for V = 1, usually 0.5 for probabilities or 0 for logits.

    Returns:
        Labels ([N,] H, W): bool for V = 1, else int64.
    """
    return scores[..., 0, :, :] > threshold if scores.shape[-3] == 1 else scores.argmax(-3)


def predict_logits(network: nn.Module, image_NCHW: Tensor, tile: int = TILE) -> Tensor:
    """Compute the logits of normalised images of any size.

    Images of more than WHOLE_IMAGE_PIXELS are computed in overlapping tiles. The overlap is large enough that the
    result is that of the whole image (deepskip.tiling). Both sizes are those after the network's own enlargement.

    Args:
        network: maps images (N, bands, H, W) to logits (N, V, H, W).
        image_NCHW: normalised images (N, bands, H, W).
        tile: height and width of tiles, in pixels.

    Returns:
        Logits (N, V, H, W).
    """
    H, W = image_NCHW.shape[-2:]
    if most_pixels(network) >= H * W:
        logits: Tensor = network(image_NCHW)
        return logits
    if (times := enlarged_by(network)) > 1:
        tile = max(tile // times, overlap_of(network).smallest_tile)
    return logits_in_tiles(network, image_NCHW, tile)


def enlarged_by(network: nn.Module) -> int:
    """Return the factor by which a network enlarges its images: 1 for networks without such a setting."""
    times = getattr(network, "enlarge", 1)
    return times if isinstance(times, int) else 1


def most_pixels(network: nn.Module) -> int:
    """Return the number of image pixels that a network takes at once, before it enlarges them."""
    return WHOLE_IMAGE_PIXELS // enlarged_by(network) ** 2


class Segmenter(nn.Module):
    """A trained network that takes raw images.

    Args:
        network: maps normalised images (N, bands, H, W) to logits (N, V, H, W).
        num_classes: 1 for binary, else exclusive classes.
        how: kind of normalisation, "image", "dataset", "robust" or "none".
        mean: mean of each band over the training set, or its median for "robust".
        std: standard deviation of each band over the training set, or its range of percentiles for "robust".

    Attributes:
        bands: number of bands of the images.
        num_classes: 1 for binary, else exclusive classes.
        mean: means of the training set, (1, bands).
        std: standard deviations of the training set, (1, bands).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, num_classes: int, how: str, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network, self.how = network, how
        self.bands, self.num_classes = len(mean), num_classes
        self.register_buffer("mean", torch.tensor([mean]))
        self.register_buffer("std", torch.tensor([std]))

    def normalized_where_seen(self, image_NCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalise raw images with missing values.

        Args:
            image_NCHW: raw images (N, bands, H, W), nan where a value is missing.

        Returns:
            The normalised images (N, bands, H, W), and a mask (N, H, W) of the pixels where no band has a value. The
            mask is None if no value is missing.
        """
        if not image_NCHW.is_floating_point() or not bool(image_NCHW.isnan().any()):
            return self.normalized(image_NCHW), None
        mean, std = missing_statistics(image_NCHW) if self.how == "image" else (self.mean, self.std)
        image_NCHW, nowhere_NHW = filled(image_NCHW, mean)
        return image_NCHW.float() if self.how == "none" else normalize(image_NCHW, mean, std), nowhere_NHW

    def normalized(self, image_NCHW: Tensor) -> Tensor:
        """Normalise raw images (N, bands, H, W) in the way that the network was trained on."""
        if self.how == "none":
            return image_NCHW.float()
        if self.how == "image":
            return normalized_by_itself(image_NCHW)
        return normalize(image_NCHW, self.mean, self.std)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Compute the probabilities (N, V, H, W) of raw images.

        Args:
            image_NCHW: images (N, bands, H, W) in the training data's own units.
        """
        return to_probabilities(self.network(self.normalized(image_NCHW)))


def build_segmenter(state: NetworkState) -> Segmenter:
    """Build the network that a checkpoint's state describes, with its averaged weights if it has them, in evaluation mode.

    Args:
        state: state of a checkpoint, checked.
    """
    settings, data = state["config"]["model"], state["data"]
    network = networks.build(settings, data["in_channels"], data["num_classes"])
    network.load_state_dict(state["ema"] or state["model"])
    segmenter = Segmenter(network, data["num_classes"], state["config"]["data"]["normalize"], data["mean"], data["std"])
    return convert_conv2d_weight_memory_format(segmenter.eval(), torch.channels_last)
