"""A trained model as scikit-learn has them: an image in, labels or probabilities out, in the layout that it was given."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip import checkpoint, inference
from deepskip.flips import Flipped
from deepskip.inference import build_segmenter, predict_logits, to_probabilities

Image = np.ndarray | Tensor


class Model:
    """A trained network that takes raw images, in the training data's own units, of any size.

    An image is a numpy array (H, W, bands), or (H, W) where there is one band, or a torch tensor (bands, H, W); several of one
    size are (N, H, W, bands) or (N, bands, H, W). What comes back is of the same kind, a tensor on the tensor's device.
    `model(image)` is `model.predict(image)`.
    Raises TypeError for what is no image of real numbers, ValueError for other bands than the model's, no pixels, or values
    that are nan or infinite.
    bands, num_classes: of the network; 1 class is binary. preparation: what was done to the training images, and is done to
    new ones here: an image with a side over "longest_side" is shrunk, and its probabilities are enlarged again.
    """

    def __init__(self, state: checkpoint.State, device: str | torch.device = "cpu") -> None:
        self.state: dict[str, Any] = {
            name: state.get(name) for name in ("config", "data", "step", "best", "mlflow_run_id")
        }
        self.segmenter = build_segmenter(state).to(device)
        data = state["data"]
        self.bands, self.num_classes = data["in_channels"], data["num_classes"]
        self.preparation: dict[str, int | None] = data.get("preparation") or {}

    @property
    def network(self) -> nn.Module:
        """The network itself, from normalised images to logits."""
        return self.segmenter.network

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.segmenter.mean.device

    def to(self, device: str | torch.device) -> "Model":
        """Moves the model to a device."""
        self.segmenter.to(device)
        return self

    def __call__(self, image: Image) -> Any:
        return self.predict(image)

    def predict(self, image: Image, threshold: float = 0.5, flips: bool = False) -> Any:
        """Segments into labels uint8 (H, W), or (N, H, W) of several: 0 is background.

        threshold: probability above which a pixel is foreground; with classes the likeliest is taken. flips: averages the
        probabilities of the image and its mirrorings, which takes four times as long.
        """
        p_NVHW = self._probabilities(self._batch(image), image, flips)
        labels = p_NVHW[:, 0] > threshold if self.num_classes == 1 else p_NVHW.argmax(1)
        return self._as_given(labels.to(torch.uint8), image)

    def predict_proba(self, image: Image, flips: bool = False) -> Any:
        """Gives probabilities fp32 in the image's layout: (H, W, V) for numpy, (V, H, W) for torch, V = num_classes.

        flips: as in `predict`.
        """
        p_NVHW = self._probabilities(self._batch(image), image, flips)
        return self._as_given(p_NVHW.permute(0, 2, 3, 1) if isinstance(image, np.ndarray) else p_NVHW, image)

    def probabilities(self, image_HWC: np.ndarray) -> np.ndarray:
        """Gives the probabilities (V, H, W) of one image as it is, without its preparation; see `Segmenter.probabilities`."""
        return self.segmenter.probabilities(image_HWC)

    def _batch(self, image: Image) -> Tensor:
        """Checks what was given and makes fp32 (N, bands, H, W) of it, on the model's device."""
        if isinstance(image, np.ndarray):
            if image.dtype.kind not in "biuf":
                raise TypeError(f"the image has dtype {image.dtype}; it must be of integers or real numbers")
            shown, layout = image.shape, f"(height, width, {self.bands}) or (N, height, width, {self.bands})"
            if image.ndim == 2 and self.bands == 1:
                image = image[..., None]
            if image.ndim not in (3, 4) or image.shape[-1] != self.bands:
                raise ValueError(f"the image has shape {tuple(shown)}; the model takes arrays {layout}{self._hint()}")
            batch = image if image.ndim == 4 else image[None]
            # what is beyond fp32 becomes infinite, and is told of below
            with np.errstate(over="ignore"):
                x = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32))
        elif isinstance(image, Tensor):
            if image.is_complex() or image.is_quantized:
                raise TypeError(f"the image has dtype {image.dtype}; it must be of integers or real numbers")
            layout = f"({self.bands}, height, width) or (N, {self.bands}, height, width)"
            if image.ndim not in (3, 4) or image.shape[-3] != self.bands:
                raise ValueError(
                    f"the image has shape {tuple(image.shape)}; the model takes tensors {layout}{self._hint()}"
                )
            x = (image if image.ndim == 4 else image[None]).detach().float()
        else:
            raise TypeError(f"the image is a {type(image).__name__}; it must be a numpy array or a torch tensor")
        if 0 in x.shape:
            raise ValueError(f"the image has shape {tuple(image.shape)}: no pixels")
        bad = x.numel() - int(torch.isfinite(x).sum())
        if bad:
            raise ValueError(f"the image has {bad} values that are nan, infinite or beyond fp32; fill them in first")
        return x.to(self.device)

    def _hint(self) -> str:
        """Says in a message what was done to bring the training images to these bands."""
        if self.preparation.get("bands") is None:
            return ""
        return (
            "; its training images were brought to these bands (pack --bands), and jobs.predict does so with new ones"
        )

    @torch.inference_mode()
    def _probabilities(self, image_NCHW: Tensor, given: Image, flips: bool) -> Tensor:
        network = Flipped(self.network) if flips else self.network
        H, W = image_NCHW.shape[-2:]
        whole_numbers = not given.dtype.is_floating_point if isinstance(given, Tensor) else given.dtype.kind != "f"
        # as many at a time as one large image would have pixels
        few = max(1, inference.most_pixels(self.network) // (H * W))
        parts = []
        for part in image_NCHW.split(few):
            x = self.segmenter.normalized(shrink(part, self.preparation.get("longest_side"), whole_numbers))
            p = to_probabilities(predict_logits(network, x.contiguous(memory_format=torch.channels_last)).float())
            if p.shape[-2:] != (H, W):
                p = F.interpolate(p, size=(H, W), mode="bilinear", align_corners=False)
            parts.append(p)
        return torch.cat(parts)

    def _as_given(self, result: Tensor, image: Image) -> Any:
        if isinstance(image, Tensor):
            return (result if image.ndim == 4 else result[0]).to(image.device)
        return np.ascontiguousarray((result if image.ndim == 4 else result[0]).cpu().numpy())


def shrink(image_NCHW: Tensor, longest_side: int | None, whole_numbers: bool) -> Tensor:
    """Shrinks images so that the longer side has at most so many pixels, as packing does; never enlarges.

    By an antialiased triangle filter. whole_numbers: rounds, as images of integers stay integers in shards.
    """
    H, W = image_NCHW.shape[-2:]
    if longest_side is None or max(H, W) <= longest_side:
        return image_NCHW
    share = longest_side / max(H, W)
    size = max(1, round(H * share)), max(1, round(W * share))
    small = F.interpolate(image_NCHW, size=size, mode="bilinear", align_corners=False, antialias=True)
    return small.round() if whole_numbers else small


def load(run_or_path: str | Path, device: str | torch.device = "cpu") -> Model:
    """Loads a trained model from a run's folder or URL (its best checkpoint) or from a checkpoint file.

    MLflow's runs and registered models: `jobs.models.load`. Raises checkpoint.CheckpointError when there is none, or none
    that is whole.
    """
    return Model(checkpoint.load_for_inference(run_or_path), device)
