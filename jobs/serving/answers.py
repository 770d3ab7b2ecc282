"""The answer to a request: a mask, an overlay or polygons, or the reason why there is none."""

import io
import json
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from deepskip.figures import overlay
from deepskip.inference import to_labels, without_values
from deepskip.jobs import polygons
from deepskip.predictor import enlarged_to

PNG = "image/png"
# The formats of an answer, with their content types.
FORMATS = {"mask": PNG, "overlay": PNG, "polygons": "application/geo+json"}


@dataclass
class Answer:
    """The answer to a request: a body, or the reason why there is none, with measurements.

    Attributes:
        status: HTTP status.
        body: the encoded mask, overlay or polygons; empty unless the status is 200.
        reason: why there is no body; empty if the status is 200.
        objects: number of objects in the image.
        coverage: share of the image's pixels that the objects cover, 0 to 1.
        batch: number of images that went through the network together, this one included.
        seconds: time of each stage ("decode", "network", "encode"), s.
        model: sha256 of the published model that answered; empty if it is not a published one.
        fault: why the replica could not take over the model that it was told; empty if it could.
    """

    status: int
    body: bytes = b""
    reason: str = ""
    objects: int = 0
    coverage: float = 0.0
    batch: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    model: str = ""
    fault: str = ""


def encode(image_HWC: np.ndarray, p_VHW: np.ndarray, answer: str) -> Answer:
    """Encode the answer to a request, from an image and its probabilities.

    Args:
        image_HWC: the image as it was sent, (H, W, bands).
        p_VHW: probabilities (V, h, w), fp32; V = 1 is binary. They are enlarged to (H, W) if the image was shrunk.
        answer: format of the answer, a key of FORMATS.

    Returns:
        The answer with its body, `objects` and `coverage`; with status 422 if the outlines are too long for polygons.
    """
    p_NVHW = enlarged_to(torch.from_numpy(p_VHW)[None], *image_HWC.shape[:2])
    if image_HWC.dtype.kind == "f" and (nowhere := np.isnan(image_HWC).all(-1)).any():
        # Enlarging lets objects spread into what has no value.
        p_NVHW = without_values(p_NVHW, torch.from_numpy(nowhere)[None])
    p_VHW = p_NVHW[0].numpy()
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
        made.body = png(overlay(image_HWC, labels))
    else:
        # A mask of 0 and 1 would look black in every viewer.
        made.body = png(labels * 255 if len(p_VHW) == 1 else labels)
    return made


def png(picture: np.ndarray) -> bytes:
    """Encode a picture, (H, W) or (H, W, 3) of uint8, as PNG, in a third of the time that the smallest file takes."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()
