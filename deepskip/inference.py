"""What stands around a network that predicts: normalisation, large images in tiles, probabilities and labels."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from deepskip import networks
from deepskip.tiling import logits_in_tiles, overlap_of

# an image of more pixels than this is cut into overlapping tiles
WHOLE_IMAGE_PIXELS = 2048 * 2048
TILE = 1536


def image_statistics(image_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Gives each band's mean and standard deviation over one image: two tensors (N, bands)."""
    image_NCHW = image_NCHW.float()
    # rows first: runtimes of exported models add fp32 up plainly, and a quarter of a million numbers cost them four digits
    mean_NC = image_NCHW.mean(3).mean(2)
    variance_NC = (image_NCHW - mean_NC[..., None, None]).square().mean(3).mean(2)
    return mean_NC, variance_NC.sqrt()


def normalize(image_NCHW: Tensor, mean_NC: Tensor, std_NC: Tensor) -> Tensor:
    """Brings each band to mean 0 and deviation 1, in fp32; a constant band becomes 0."""
    std_NC = torch.where(std_NC > 0, std_NC, 1.0)
    return (image_NCHW.float() - mean_NC[..., None, None]) / std_NC[..., None, None]


def missing_statistics(image_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Gives each band's mean and deviation over the pixels that have a value, that are not nan: two tensors (N, bands)."""
    wide = image_NCHW.double()
    seen = ~wide.isnan()
    counts = seen.sum((2, 3)).clamp(min=1)
    mean_NC = torch.where(seen, wide, 0).sum((2, 3)) / counts
    squares = torch.where(seen, wide - mean_NC[..., None, None], 0).square().sum((2, 3))
    return mean_NC.float(), (squares / counts).sqrt().float()


def filled(image_NCHW: Tensor, mean_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Puts a band's mean where it has no value (nan); gives the image, and where (N, H, W) no band has one."""
    missing = image_NCHW.isnan()
    return torch.where(missing, mean_NC[..., None, None].to(image_NCHW.dtype), image_NCHW), missing.all(1)


def without_values(p_NVHW: Tensor, nowhere_NHW: Tensor | None) -> Tensor:
    """Makes all background, with certainty, where an image has no value."""
    if nowhere_NHW is None:
        return p_NVHW
    nowhere = nowhere_NHW.to(p_NVHW.device)[:, None].expand_as(p_NVHW)
    background = torch.zeros_like(p_NVHW)
    if p_NVHW.shape[1] > 1:
        background[:, 0] = 1
    return torch.where(nowhere, background, p_NVHW)


def to_probabilities(logits: Tensor) -> Tensor:
    """Turns logits (N, V, H, W) into probabilities: sigmoid for V = 1, else softmax over the classes."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def to_labels(scores: Any, threshold: float) -> Any:
    """Turns scores ([N,] V, H, W), a tensor or an array, into labels ([N,] H, W): over a threshold for V = 1, else the highest.

    threshold: of probabilities, by custom 0.5, or of logits, 0. Labels of V = 1 are bool, else int64.
    """
    return scores[..., 0, :, :] > threshold if scores.shape[-3] == 1 else scores.argmax(-3)


def predict_logits(network: nn.Module, image_NCHW: Tensor, tile: int = TILE) -> Tensor:
    """Computes the logits of normalised images of any size.

    Images of more than WHOLE_IMAGE_PIXELS go through in tiles of `tile` pixels a side, that overlap by so much that the
    result is that of the whole image (deepskip.tiling). Both are as the network enlarges them.
    """
    H, W = image_NCHW.shape[-2:]
    if most_pixels(network) >= H * W:
        return network(image_NCHW)
    if (times := enlarged_by(network)) > 1:
        tile = max(tile // times, overlap_of(network).smallest_tile)
    return logits_in_tiles(network, image_NCHW, tile)


def enlarged_by(network: nn.Module) -> int:
    """Says how many times a network enlarges its images; one that is not ours does not."""
    times = getattr(network, "enlarge", 1)
    return times if isinstance(times, int) else 1


def most_pixels(network: nn.Module) -> int:
    """Says how many pixels of images go through a network at once, before it enlarges them."""
    return WHOLE_IMAGE_PIXELS // enlarged_by(network) ** 2


class Segmenter(nn.Module):
    """A trained network that takes raw images.

    forward: raw image (N, bands, H, W) in the training data's own units -> probabilities (N, V, H, W).
    bands, num_classes: of the network.
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
        """Normalises raw images that are nan where they have no value; gives them, and where (N, H, W) no band has one."""
        if not image_NCHW.is_floating_point() or not bool(image_NCHW.isnan().any()):
            return self.normalized(image_NCHW), None
        mean, std = missing_statistics(image_NCHW) if self.how == "image" else (self.mean, self.std)
        image_NCHW, nowhere_NHW = filled(image_NCHW, mean)
        return image_NCHW.float() if self.how == "none" else normalize(image_NCHW, mean, std), nowhere_NHW

    def normalized(self, image_NCHW: Tensor) -> Tensor:
        """Normalises raw images in the way the network was trained on."""
        if self.how == "none":
            return image_NCHW.float()
        if self.how == "image":
            return normalize(image_NCHW, *image_statistics(image_NCHW))
        return normalize(image_NCHW, self.mean, self.std)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        return to_probabilities(self.network(self.normalized(image_NCHW)))


def build_segmenter(state: dict[str, Any]) -> Segmenter:
    """Builds the network that a checkpoint's state describes, ready for inference."""
    settings, data = state["config"]["model"], state["data"]
    network = networks.build(settings, data["in_channels"], data["num_classes"])
    network.load_state_dict(state["ema"] or state["model"])
    segmenter = Segmenter(network, data["num_classes"], state["config"]["data"]["normalize"], data["mean"], data["std"])
    return convert_conv2d_weight_memory_format(segmenter.eval(), torch.channels_last)
