"""What a sample is, and how it is encoded; decoding is in `decoding`."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from deepskip.data_shards.decoding import EXTENSIONS, IMAGE_KEYS, MASK_KEYS, decode_image, decode_mask
from deepskip.data_shards.preparation import band_statistics

__all__ = [
    "EXTENSIONS", "IMAGE_KEYS", "LAYOUTS", "MASK_KEYS", "ON_BAD_SAMPLE", "BadSample", "Sample", "band_statistics",
    "decode_image", "decode_mask", "encode_image", "encode_mask",
]  # fmt: skip
# How a sample that cannot be used is handled.
ON_BAD_SAMPLE = ("error", "skip")
# Axes of arrays of images.
LAYOUTS = ("NHWC", "NCHW", "NHW")


@dataclass(frozen=True)
class Sample:
    """One image with its mask, to be written into a shard.

    Attributes:
        key: Key of the sample.
        image_HWC: Image (height, width, bands) of any real dtype.
        mask_HW: Integer labels (height, width).
        stored_image: Extension and contents of the image's own file, if it can go into the shard unchanged.
    """

    key: str
    image_HWC: np.ndarray
    mask_HW: np.ndarray
    stored_image: tuple[str, bytes] | None = None


class BadSample(ValueError):
    """A sample that cannot be used; the message says which one and why.

    Attributes:
        shard: Shard of the sample.
        key: Key of the sample.
        reason: Why it cannot be used.
    """

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        # Loader processes pickle their errors.
        return type(self), (self.shard, self.key, self.reason)


def encode_image(image_HWC: np.ndarray) -> tuple[str, bytes]:
    """Encode an image without loss: PNG for uint8 with 1 or 3 bands, else .npy.

    Args:
        image_HWC: Image (H, W, bands).

    Returns:
        File extension and contents.
    """
    if image_HWC.dtype == np.uint8 and image_HWC.shape[2] in (1, 3):
        return "png", _png(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)
    return "npy", _npy(image_HWC)


def encode_mask(mask_HW: np.ndarray) -> tuple[str, bytes]:
    """Encode labels 0 to 255 as PNG.

    Args:
        mask_HW: Integer labels (H, W).

    Returns:
        File extension and contents.

    Raises:
        ValueError: If a label is out of range.
    """
    if mask_HW.min() < 0 or mask_HW.max() > 255:
        raise ValueError(f"labels {mask_HW.min()} to {mask_HW.max()} do not fit 0 to 255")
    return "png", _png(mask_HW.astype(np.uint8))


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
