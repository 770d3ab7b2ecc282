"""What a sample is, and how one is encoded; decoding stands beside."""

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
# what becomes of a sample that cannot be used
ON_BAD_SAMPLE = ("error", "skip")
# axes of arrays of images
LAYOUTS = ("NHWC", "NCHW", "NHW")


@dataclass(frozen=True)
class Sample:
    """One image with its mask, on its way into a shard.

    image_HWC: (height, width, bands), any real dtype. mask_HW: integer labels. stored_image: (extension, bytes) of the
    image where its file can go into the shard as it is.
    """

    key: str
    image_HWC: np.ndarray
    mask_HW: np.ndarray
    stored_image: tuple[str, bytes] | None = None


class BadSample(ValueError):
    """A sample that cannot be used; says which one and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str, str]]:
        # loader processes send their errors pickled
        return type(self), (self.shard, self.key, self.reason)


def encode_image(image_HWC: np.ndarray) -> tuple[str, bytes]:
    """Encodes an image without loss: PNG for 8 bits and 1 or 3 bands, else .npy; gives (extension, bytes)."""
    if image_HWC.dtype == np.uint8 and image_HWC.shape[2] in (1, 3):
        return "png", _png(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC)
    return "npy", _npy(image_HWC)


def encode_mask(mask_HW: np.ndarray) -> tuple[str, bytes]:
    """Encodes labels 0 to 255 as PNG; gives (extension, bytes)."""
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
