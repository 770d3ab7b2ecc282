"""What a request gets: a mask, an overlay or polygons, or the reason why not."""

import io
import json
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data_shards.sample import resample_bands, resize_longest_side
from deepskip.figures import overlay
from jobs import polygons

PNG = "image/png"
# what an answer may be, and its content type
FORMATS = {"mask": PNG, "overlay": PNG, "polygons": "application/geo+json"}


@dataclass
class Answer:
    """What a request gets: a body, or the reason why not; and what it took."""

    status: int
    body: bytes = b""
    reason: str = ""
    # number of objects and share of the image that they cover
    objects: int = 0
    coverage: float = 0.0
    # images that went through the network together
    batch: int = 0
    # seconds of each stage
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(image_HWC: np.ndarray, preparation: dict[str, int | None]) -> np.ndarray:
    """Brings an image to the bands and the size that the training data was brought to."""
    bands, longest_side = preparation["bands"], preparation["longest_side"]
    if bands is not None:
        image_HWC = resample_bands(image_HWC, bands)
    if longest_side is not None:
        image_HWC, _ = resize_longest_side(image_HWC, None, longest_side)
    return image_HWC


def encode(image_HWC: np.ndarray, p_VHW: np.ndarray, answer: str) -> Answer:
    """Makes the answer from an image and the probabilities of what was made of it, enlarged where it was shrunk."""
    size = image_HWC.shape[:2]
    if p_VHW.shape[1:] != size:
        # as in jobs.predict: outlines come out smoother than of labels
        small = torch.from_numpy(p_VHW)[None]
        p_VHW = F.interpolate(small, size=size, mode="bilinear", align_corners=False)[0].numpy()
    binary = len(p_VHW) == 1
    labels = (p_VHW[0] > 0.5 if binary else p_VHW.argmax(0)).astype(np.uint8)
    objects, classes = polygons.find_objects(labels)
    made = Answer(200, objects=len(classes), coverage=float((labels > 0).mean()))
    if answer == "polygons":
        try:
            found = polygons.feature_collection(objects, classes, p_VHW[0] if binary else p_VHW.max(0))
        except polygons.TooLong as error:
            return Answer(422, reason=f"{error}; ask for format=mask")
        made.body = json.dumps(found, separators=(",", ":")).encode()
    elif answer == "overlay":
        made.body = png(overlay(image_HWC, labels))
    else:
        # a mask of 0 and 1 looks black in every viewer
        made.body = png(labels * 255 if binary else labels)
    return made


def png(picture: np.ndarray) -> bytes:
    """Encodes a picture as PNG, at a third of the time that the smallest file takes."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()
