"""Predict labels and probabilities with a trained network, with methods named as in scikit-learn.

Python, the command line and HTTP all use this class.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepskip import checkpoint, inference
from deepskip.data_shards.preparation import LARGEST, resample_bands, resize_longest_side
from deepskip.flips import Flipped
from deepskip.inference import build_segmenter, predict_logits, to_labels, to_probabilities, without_values

Image = np.ndarray | Tensor


class Predictor:
    """A trained network that takes raw images of any size, in the training data's own units.

    An image is a numpy array (H, W, bands), or (H, W) if it has one band, or a torch tensor (bands, H, W). Several
    images of one size are (N, H, W, bands) or (N, bands, H, W). Results are of the same kind; a tensor is on the
    image's device. `predictor(image)` is `predictor.predict(image)`.

    Images are prepared as the training images were (`pack --bands`, `--longest_side`). They are resampled to the
    network's bands, and shrunk if a side is longer. Probabilities are then enlarged to the image's own size.

    Methods that take images raise TypeError for anything that is not an image of real numbers. They raise ValueError
    for bands that cannot be resampled, images without pixels, and values that are nan or infinite.

    Args:
        state: state of a checkpoint, checked.
        device: device on which the network computes.
        flips: average the probabilities of an image and its mirrorings by default.
        precision: torch.bfloat16 computes in bf16 autocast; all else in the network's own precision.

    Attributes:
        bands: number of bands of the network's input.
        chosen: numbers of the bands that the network sees (`data.bands`), or None if it sees all.
        image_bands: number of bands of an image before any are chosen.
        num_classes: 1 for binary, else exclusive classes.
        classes: names of the classes 1, 2, ...; [] for a binary task, or if they are not known.
        class_names: a name for each class but background, in any case.
        preparation: "bands" and "longest_side" of the training images, or None each.
        nodata: value that marks missing values in the training images, or None.
        flips: average the probabilities of an image and its mirrorings by default.
    """

    def __init__(
        self,
        state: checkpoint.NetworkState,
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
        self.classes: list[str] = list(data.get("classes") or [])
        self.class_names = class_names(data)
        self.preparation: dict[str, Any] = {"bands": None, "longest_side": None} | (data.get("preparation") or {})
        self.chosen: list[int] | None = self.preparation.get("chosen")
        self.image_bands: int = self.bands if self.chosen is None else self.preparation["of"]
        told = self.preparation.get("nodata")
        self.nodata = None if told is None else float(told)
        self.flips, self.precision = flips, precision

    @property
    def network(self) -> nn.Module:
        """The network itself, from normalised images to logits."""
        return self.segmenter.network

    @property
    def device(self) -> torch.device:
        """The device on which the network computes."""
        return self.segmenter.mean.device

    def to(self, device: str | torch.device) -> "Predictor":
        """Move the network to a device, and return the predictor."""
        self.segmenter.to(device)
        return self

    def __call__(self, image: Image) -> Any:
        """Segment an image (H, W, bands), or several, into labels, as `predict` does."""
        return self.predict(image)

    def predict(
        self, image: Image, threshold: float = 0.5, flips: bool | None = None, nodata: float | None = None
    ) -> Any:
        """Segment an image, or several of one size, into labels.

        Args:
            image: array (H, W, bands), (H, W) or (N, H, W, bands), or tensor (bands, H, W) or (N, bands, H, W). What a
                masked array masks is missing.
            threshold: probability above which a pixel is foreground; with several classes the most likely one is taken.
            flips: average the probabilities of the image and its mirrorings, which takes four times as long. None takes
                the predictor's own setting.
            nodata: value that marks missing values, nan too. They are excluded from statistics; a pixel without any
                value is background. None takes the training data's.

        Returns:
            Labels uint8 (H, W), or (N, H, W) for several images; 0 is background.

        Raises:
            TypeError: if the image is not an array or tensor of real numbers.
            ValueError: for other bands than the network's, no pixels, or values that are nan, infinite or beyond 1e15.
        """
        labels = to_labels(self._of_images(image, flips, nodata), threshold)
        return self._as_given(labels.to(torch.uint8), image)

    def predict_proba(
        self, image: Image, flips: bool | None = None, nodata: float | None = None, chosen: bool = False
    ) -> Any:
        """Compute the probabilities of an image, or of several of one size.

        Args:
            image: see `predict`.
            flips: see `predict`.
            nodata: see `predict`.
            chosen: the image holds only the bands that the network sees, in their order.

        Returns:
            Probabilities fp32 in the image's layout: (H, W, V) for numpy, (V, H, W) for torch, V = num_classes. Several
            images have N in front.

        Raises:
            TypeError: as in `predict`.
            ValueError: as in `predict`.
        """
        p_NVHW = self._of_images(image, flips, nodata, chosen)
        return self._as_given(p_NVHW.permute(0, 2, 3, 1) if isinstance(image, np.ndarray) else p_NVHW, image)

    def prepared(self, image_HWC: np.ndarray) -> np.ndarray:
        """Resample an image to the network's bands and shrink it to the training images' size.

        Args:
            image_HWC: image (H, W, bands).

        Returns:
            The image (h, w, bands).

        Raises:
            ValueError: if the bands are not the network's afterwards.
        """
        longest_side = self.preparation["longest_side"]
        image_HWC = self.of_network_bands(image_HWC)
        return image_HWC if longest_side is None else resize_longest_side(image_HWC, None, longest_side)[0]

    def of_network_bands(self, image_HWC: np.ndarray) -> np.ndarray:
        """Resample an image as the training images were, and take the bands that the network sees.

        Args:
            image_HWC: image (H, W, bands).

        Returns:
            The image (H, W, network's bands).

        Raises:
            ValueError: if the image has another number of bands than the training images.
        """
        if self.preparation["bands"] is not None:
            image_HWC = resample_bands(image_HWC, self.preparation["bands"])
        if image_HWC.shape[2] != self.image_bands:
            raise ValueError(f"has {image_HWC.shape[2]} bands; the model takes {self.image_bands}")
        return image_HWC if self.chosen is None else np.take(image_HWC, self.chosen, axis=2)

    @torch.inference_mode()
    def probabilities(self, raw_NCHW: Tensor, flips: bool | None = None) -> Tensor:
        """Compute the probabilities of prepared images; large ones are computed in tiles.

        A pixel whose bands are all nan has no value, and is background.

        Args:
            raw_NCHW: images (N, bands, H, W).
            flips: see `predict`.

        Returns:
            Probabilities (N, V, H, W) fp32, on the predictor's device.
        """
        normalized, nowhere_NHW = self.segmenter.normalized_where_seen(raw_NCHW.to(self.device))
        return without_values(to_probabilities(self.logits(normalized, flips)), nowhere_NHW)

    @torch.inference_mode()
    def logits(self, normalized_NCHW: Tensor, flips: bool | None = None, in_tiles: bool = True) -> Tensor:
        """Compute the logits of normalised images.

        Args:
            normalized_NCHW: images (N, bands, H, W), on the predictor's device.
            flips: see `predict`.
            in_tiles: cut large images into tiles (inference.predict_logits).

        Returns:
            Logits (N, V, H, W) fp32.
        """
        network = Flipped(self.network) if (self.flips if flips is None else flips) else self.network
        x = normalized_NCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return (predict_logits(network, x) if in_tiles else network(x)).float()

    def _taken(self, image: Image, chosen: bool) -> Image:
        """Check the type and shape of an image, and take the network's bands unless it must be resampled first."""
        wanted = self.bands if chosen else self.image_bands
        C = f"{wanted}" if chosen or self.preparation["bands"] is None else "bands"
        if isinstance(image, np.ndarray):
            if image.dtype.kind not in "biuf":
                raise TypeError(f"the image has dtype {image.dtype}; it must be of integers or real numbers")
            shown, layout, place = image.shape, f"arrays (height, width, {C}) or (N, height, width, {C})", -1
            if image.ndim == 2 and (wanted == 1 or C == "bands"):
                image = image[..., None]
        elif isinstance(image, Tensor):
            if image.is_complex() or image.is_quantized:
                raise TypeError(f"the image has dtype {image.dtype}; it must be of integers or real numbers")
            shown, layout, place = tuple(image.shape), f"tensors ({C}, height, width) or (N, {C}, height, width)", -3
        else:
            raise TypeError(f"the image is a {type(image).__name__}; it must be a numpy array or a torch tensor")
        if image.ndim not in (3, 4) or (C != "bands" and image.shape[place] != wanted):
            raise ValueError(f"the image has shape {tuple(shown)}; the model takes {layout}")
        if 0 in image.shape:
            raise ValueError(f"the image has shape {tuple(shown)}: no pixels")
        if chosen or self.chosen is None or C == "bands":
            return image
        if isinstance(image, np.ndarray):
            return np.take(image, self.chosen, axis=place)
        return image.index_select(image.ndim + place, torch.tensor(self.chosen, device=image.device))

    def _checked(self, image: Image, nodata: float | None) -> Tensor:
        """Convert an image to (N, C, H, W) fp32 on its own device, with nan for missing values, and check the values."""
        if isinstance(image, np.ndarray):
            batch = image if image.ndim == 4 else image[None]
            # Values beyond fp32 become infinite, which is reported below.
            with np.errstate(over="ignore"):
                x = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32))
        else:
            x = (image if image.ndim == 4 else image[None]).detach().float()
        missing = torch.zeros((), dtype=torch.bool, device=x.device)
        if nodata is not None:
            missing = x.isnan() if math.isnan(nodata) else x == float(np.float32(nodata))
        bad = x.numel() - int(((x.abs() <= LARGEST) | missing).sum())
        if bad:
            raise ValueError(
                f"the image has {bad} values that are nan, infinite or beyond {LARGEST:g}; fill them in, or pass the value "
                "that marks missing values, such as nodata=math.nan"
            )
        return torch.where(missing, math.nan, x) if bool(missing.any()) else x

    def _of_images(self, image: Image, flips: bool | None, nodata: float | None, chosen: bool = False) -> Tensor:
        """Return the probabilities (N, V, H, W) of one image or several, in their own size."""
        image, nodata = without_mask(image, self.nodata if nodata is None else nodata)
        image = self._taken(image, chosen)
        x = self._checked(image, nodata)
        H, W = x.shape[-2:]
        nowhere = x.isnan().all(1)
        longest_side = self.preparation["longest_side"]
        # Of an image that is not resampled, the bands have been taken.
        resampled = not chosen and self.preparation["bands"] is not None
        unready = resampled and (self.chosen is not None or x.shape[1] != self.bands)
        if unready or max(H, W) > (longest_side or max(H, W)):
            # Prepare it in its own dtype: integers stay integers, as in packed images.
            given = as_arrays(image) if not bool(x.isnan().any()) else as_arrays(x.permute(0, 2, 3, 1).cpu().numpy())
            images = [self.of_network_bands(one) if resampled else one for one in given]
            if longest_side is not None:
                images = [resize_longest_side(one, None, longest_side)[0] for one in images]
            x = torch.from_numpy(np.stack([np.moveaxis(one, 2, 0).astype(np.float32) for one in images]))
        # As many images at a time as together have the pixels of one large image.
        few = max(1, inference.most_pixels(self.network) // (x.shape[2] * x.shape[3]))
        found = torch.cat([enlarged_to(self.probabilities(part, flips), H, W) for part in x.split(few)])
        return inference.without_values(found, nowhere if bool(nowhere.any()) else None)

    def _as_given(self, result: Tensor, image: Image) -> Any:
        if isinstance(image, Tensor):
            return (result if image.ndim == 4 else result[0]).to(image.device)
        return np.ascontiguousarray((result if image.ndim == 4 else result[0]).cpu().numpy())


def class_names(data: checkpoint.DataState) -> list[str]:
    """Return a name for each class but background: "foreground", those of the training data, or "class 1", "class 2", ...

    Args:
        data: what a checkpoint says of its training data.
    """
    if data["num_classes"] == 1:
        return ["foreground"]
    return list(data.get("classes") or []) or [f"class {label}" for label in range(1, data["num_classes"])]


def without_mask(image: Image, nodata: float | None) -> tuple[Image, float | None]:
    """Replace the masked values of a masked array by `nodata`.

    Args:
        image: array (H, W), (H, W, C) or (N, H, W, C), masked or not, or tensor (C, H, W) or (N, C, H, W).
        nodata: value that marks missing values; None takes nan if there are masked ones.

    Returns:
        The image, unchanged without masked values, and the value that marks missing ones.
    """
    if not isinstance(image, np.ma.MaskedArray) or image.dtype.kind not in "biuf":
        return image, nodata
    if not np.ma.is_masked(image):
        return image.data, nodata
    nodata = math.nan if nodata is None else nodata
    return np.ma.filled(image.astype(np.promote_types(image.dtype, np.float32)), nodata), nodata


def as_arrays(image: Image) -> np.ndarray:
    """Return one image or several as an array (N, H, W, C), in their own dtype.

    Args:
        image: array (H, W), (H, W, C) or (N, H, W, C), or tensor (C, H, W) or (N, C, H, W). Booleans become uint8, and
            floating-point tensors fp32.
    """
    if isinstance(image, Tensor):
        # NumPy has no bfloat16.
        array = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        array = np.moveaxis(array, -3, -1)
    else:
        array = image[..., None] if image.ndim == 2 else image
    array = array.astype(np.uint8) if array.dtype == bool else array
    return array if array.ndim == 4 else array[None]


def enlarged_to(p_NVHW: Tensor, height: int, width: int) -> Tensor:
    """Enlarge probabilities bilinearly to an image's own size; outlines are smoother than those of enlarged labels.

    Args:
        p_NVHW: probabilities (N, V, h, w).
        height: H, in pixels.
        width: W, in pixels.

    Returns:
        Probabilities (N, V, H, W).
    """
    if p_NVHW.shape[-2:] == (height, width):
        return p_NVHW
    return F.interpolate(p_NVHW, size=(height, width), mode="bilinear", align_corners=False)


def load(run_or_path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Load a trained model from a run's folder or URL (its best checkpoint) or from a checkpoint file.

    `jobs.models.load` also loads MLflow's runs and registered models.

    Args:
        run_or_path: folder or URL of a run, or a checkpoint file.
        device: device on which the network computes.

    Raises:
        checkpoint.CheckpointError: if there is no checkpoint, or none that is complete and usable.
        ImportError: if its network is from a package that is not installed.
        OSError: if the storage cannot be read.
    """
    return Predictor(checkpoint.load_for_inference(run_or_path), device)
