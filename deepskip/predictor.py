"""A trained network from image to labels, as scikit-learn has them: the one way for Python, files and HTTP."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip import checkpoint, inference
from deepskip.data_shards.preparation import resample_bands, resize_longest_side
from deepskip.flips import Flipped
from deepskip.inference import build_segmenter, predict_logits, to_labels, to_probabilities, without_values

Image = np.ndarray | Tensor


class Predictor:
    """A trained network that takes raw images, in the training data's own units, of any size.

    An image is a numpy array (H, W, bands), or (H, W) where there is one band, or a torch tensor (bands, H, W); several of one
    size are (N, H, W, bands) or (N, bands, H, W). What comes back is of the same kind, a tensor on the tensor's device.
    `predictor(image)` is `predictor.predict(image)`. Images are prepared as the training images were (`pack --bands`,
    `--longest_side`): brought to the network's bands, and shrunk where a side is longer; probabilities are enlarged again.

    bands, num_classes: of the network; 1 class is binary. preparation: "bands" and "longest_side" of the training images, or
    None each. flips: average the probabilities of an image and its mirrorings, in all that follows.

    Raises TypeError for what is no image of real numbers, ValueError for bands that cannot be brought to the network's, no
    pixels, or values that are nan or infinite.
    """

    def __init__(
        self,
        state: checkpoint.State,
        device: str | torch.device = "cpu",
        flips: bool = False,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.state: dict[str, Any] = {
            name: state.get(name) for name in ("config", "data", "step", "best", "mlflow_run_id")
        }
        self.segmenter = build_segmenter(state).to(device)
        data = state["data"]
        self.bands, self.num_classes = data["in_channels"], data["num_classes"]
        self.preparation: dict[str, Any] = {"bands": None, "longest_side": None} | (data.get("preparation") or {})
        told = self.preparation.get("nodata")
        self.nodata = None if told is None else float(told)
        self.flips, self.precision = flips, precision

    @property
    def network(self) -> nn.Module:
        """The network itself, from normalised images to logits."""
        return self.segmenter.network

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.segmenter.mean.device

    def to(self, device: str | torch.device) -> "Predictor":
        """Moves it to a device."""
        self.segmenter.to(device)
        return self

    def __call__(self, image: Image) -> Any:
        return self.predict(image)

    def predict(
        self, image: Image, threshold: float = 0.5, flips: bool | None = None, nodata: float | None = None
    ) -> Any:
        """Segments into labels uint8 (H, W), or (N, H, W) of several: 0 is background.

        threshold: probability above which a pixel is foreground; with classes the likeliest is taken. flips: averages the
        probabilities of the image and its mirrorings, which takes four times as long; null does as the predictor's own.
        nodata: value that stands for none, nan too: left out of statistics, and background; null takes the training data's.
        """
        labels = to_labels(self._of_images(image, flips, nodata), threshold)
        return self._as_given(labels.to(torch.uint8), image)

    def predict_proba(self, image: Image, flips: bool | None = None, nodata: float | None = None) -> Any:
        """Gives probabilities fp32 in the image's layout: (H, W, V) for numpy, (V, H, W) for torch, V = num_classes.

        flips, nodata: as in `predict`.
        """
        p_NVHW = self._of_images(image, flips, nodata)
        return self._as_given(p_NVHW.permute(0, 2, 3, 1) if isinstance(image, np.ndarray) else p_NVHW, image)

    def prepared(self, image_HWC: np.ndarray) -> np.ndarray:
        """Brings an image to the network's bands and the training images' size; raises ValueError for other bands."""
        bands, longest_side = self.preparation["bands"], self.preparation["longest_side"]
        if bands is not None:
            image_HWC = resample_bands(image_HWC, bands)
        if image_HWC.shape[2] != self.bands:
            raise ValueError(f"has {image_HWC.shape[2]} bands; the model takes {self.bands}")
        return image_HWC if longest_side is None else resize_longest_side(image_HWC, None, longest_side)[0]

    @torch.inference_mode()
    def probabilities(self, raw_NCHW: Tensor, flips: bool | None = None) -> Tensor:
        """Computes the probabilities (N, V, H, W) fp32, on the device, of prepared images; large ones go through in tiles.

        Where all bands of an image are nan it has no value, and all is background.
        """
        normalized, nowhere_NHW = self.segmenter.normalized_where_seen(raw_NCHW.to(self.device))
        return without_values(to_probabilities(self.logits(normalized, flips)), nowhere_NHW)

    @torch.inference_mode()
    def logits(self, normalized_NCHW: Tensor, flips: bool | None = None, in_tiles: bool = True) -> Tensor:
        """Computes the logits (N, V, H, W) fp32 of normalised images; in_tiles: cuts large ones (inference.predict_logits)."""
        network = Flipped(self.network) if (self.flips if flips is None else flips) else self.network
        x = normalized_NCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return (predict_logits(network, x) if in_tiles else network(x)).float()

    def _checked(self, image: Image, nodata: float | None) -> Tensor:
        """Checks what was given and makes (N, C, H, W) fp32 of it, where it is, nan where it has no value."""
        C = f"{self.bands}" if self.preparation["bands"] is None else "bands"
        if isinstance(image, np.ndarray):
            if image.dtype.kind not in "biuf":
                raise TypeError(f"the image has dtype {image.dtype}; it must be of integers or real numbers")
            shown, layout, place = image.shape, f"arrays (height, width, {C}) or (N, height, width, {C})", -1
            if image.ndim == 2 and (self.bands == 1 or C == "bands"):
                image = image[..., None]
        elif isinstance(image, Tensor):
            if image.is_complex() or image.is_quantized:
                raise TypeError(f"the image has dtype {image.dtype}; it must be of integers or real numbers")
            shown, layout, place = tuple(image.shape), f"tensors ({C}, height, width) or (N, {C}, height, width)", -3
        else:
            raise TypeError(f"the image is a {type(image).__name__}; it must be a numpy array or a torch tensor")
        if image.ndim not in (3, 4) or (C != "bands" and image.shape[place] != self.bands):
            raise ValueError(f"the image has shape {tuple(shown)}; the model takes {layout}")
        if 0 in image.shape:
            raise ValueError(f"the image has shape {tuple(shown)}: no pixels")
        if isinstance(image, np.ndarray):
            batch = image if image.ndim == 4 else image[None]
            # what is beyond fp32 becomes infinite, and is told of below
            with np.errstate(over="ignore"):
                x = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32))
        else:
            x = (image if image.ndim == 4 else image[None]).detach().float()
        missing = torch.zeros((), dtype=torch.bool, device=x.device)
        if nodata is not None:
            missing = x.isnan() if math.isnan(nodata) else x == float(np.float32(nodata))
        bad = x.numel() - int((torch.isfinite(x) | missing).sum())
        if bad:
            raise ValueError(
                f"the image has {bad} values that are nan, infinite or beyond fp32; fill them in, or name the value that "
                "stands for none: nodata=math.nan"
            )
        return torch.where(missing, math.nan, x) if bool(missing.any()) else x

    def _of_images(self, image: Image, flips: bool | None, nodata: float | None) -> Tensor:
        """Gives the probabilities (N, V, H, W) of what was given, in its own size."""
        x = self._checked(image, self.nodata if nodata is None else nodata)
        H, W = x.shape[-2:]
        bands, longest_side = self.preparation["bands"], self.preparation["longest_side"]
        if (bands or x.shape[1]) != x.shape[1] or max(H, W) > (longest_side or max(H, W)):
            # in its own dtype: integers stay integers, as in packed images
            given = as_arrays(image) if not bool(x.isnan().any()) else as_arrays(x.permute(0, 2, 3, 1).cpu().numpy())
            images = [self.prepared(one) for one in given]
            x = torch.from_numpy(np.stack([np.moveaxis(one, 2, 0).astype(np.float32) for one in images]))
        # as many at a time as one large image would have pixels
        few = max(1, inference.most_pixels(self.network) // (x.shape[2] * x.shape[3]))
        return torch.cat([enlarged_to(self.probabilities(part, flips), H, W) for part in x.split(few)])

    def _as_given(self, result: Tensor, image: Image) -> Any:
        if isinstance(image, Tensor):
            return (result if image.ndim == 4 else result[0]).to(image.device)
        return np.ascontiguousarray((result if image.ndim == 4 else result[0]).cpu().numpy())


def as_arrays(image: Image) -> np.ndarray:
    """Gives one image or several as an array (N, H, W, C) of their own dtype; bool as uint8, short floats as fp32."""
    if isinstance(image, Tensor):
        # numpy has no bfloat16
        array = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        array = np.moveaxis(array, -3, -1)
    else:
        array = image[..., None] if image.ndim == 2 else image
    array = array.astype(np.uint8) if array.dtype == bool else array
    return array if array.ndim == 4 else array[None]


def enlarged_to(p_NVHW: Tensor, height: int, width: int) -> Tensor:
    """Enlarges probabilities bilinearly to an image's own size: outlines come out smoother than of labels."""
    if p_NVHW.shape[-2:] == (height, width):
        return p_NVHW
    return F.interpolate(p_NVHW, size=(height, width), mode="bilinear", align_corners=False)


def load(run_or_path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Loads a trained model from a run's folder or URL (its best checkpoint) or from a checkpoint file.

    MLflow's runs and registered models: `jobs.models.load`. Raises checkpoint.CheckpointError when there is none, or none
    that is whole.
    """
    return Predictor(checkpoint.load_for_inference(run_or_path), device)
