"""What a request gets: a mask, an overlay or polygons, or the reason why not."""

import io
import json
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from deepskip.figures import overlay
from deepskip.inference import to_labels
from deepskip.jobs import polygons
from deepskip.predictor import enlarged_to

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


def encode(image_HWC: np.ndarray, p_VHW: np.ndarray, answer: str) -> Answer:
    """Makes the answer from an image and the probabilities of what was made of it, enlarged where it was shrunk."""
    p_VHW = enlarged_to(torch.from_numpy(p_VHW)[None], *image_HWC.shape[:2])[0].numpy()
    labels = to_labels(p_VHW, 0.5).astype(np.uint8)
    objects, classes = polygons.find_objects(labels)
    made = Answer(200, objects=len(classes), coverage=float((labels > 0).mean()))
    if answer == "polygons":
        try:
            found = polygons.feature_collection(objects, classes, p_VHW.max(0))
        except polygons.TooLong as error:
            return Answer(422, reason=f"{error}; ask for format=mask")
        made.body = json.dumps(found, separators=(",", ":")).encode()
    elif answer == "overlay":
        made.body = png(overlay(np.nan_to_num(image_HWC), labels))
    else:
        # a mask of 0 and 1 looks black in every viewer
        made.body = png(labels * 255 if len(p_VHW) == 1 else labels)
    return made


def png(picture: np.ndarray) -> bytes:
    """Encodes a picture as PNG, at a third of the time that the smallest file takes."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()
