"""The networks that DeepSkip is compared with, each behind one interface.

A network takes (N, bands, H, W) float and gives logits (N, classes, H, W) of the input's size, for any bands, classes, H
and W. It is trained from scratch: no weights are ever downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from deepskip.networks.fcn import build_fcn
from deepskip.networks.h_dense_unet import build_h_dense_unet
from deepskip.networks.mask_rcnn import build_mask_rcnn
from deepskip.networks.nnunet import build_nnunet
from deepskip.networks.pspnet import build_pspnet
from deepskip.networks.unet import build_plain_unet, build_unet
from deepskip.networks.unet3plus import build_unet3plus

Size = Literal["default", "paper"]


@dataclass(frozen=True)
class Rival:
    """A network that can be built, its widths in two sizes, and what the paper counts.

    default: the widths that the network's authors or its library use. paper: widths that give the paper's number of
    parameters for 3 bands and 1 class, or, where the paper has no such network, DeepSkip's own number.
    paper_parameters: that number.
    """

    make: Callable[..., nn.Module]
    default: dict[str, Any]
    paper: dict[str, Any]
    paper_parameters: int


# anchors, in pixels, fit small objects in images that are not enlarged
ANCHORS = (4, 8, 16, 32, 64)

RIVALS: dict[str, Rival] = {
    "plain_unet": Rival(
        build_plain_unet,
        default={"base_channels": 32, "levels": 5},
        paper={"base_channels": 8, "levels": 5},
        paper_parameters=589_793,
    ),
    "unet": Rival(
        build_unet,
        default={"features": (32, 32, 64, 128, 256, 32)},
        paper={"features": (9, 18, 36, 74, 149, 9)},
        paper_parameters=645_665,
    ),
    "fcn": Rival(
        build_fcn,
        default={"backbone": "resnet50", "channels": (64, 128, 256, 512)},
        paper={"backbone": "resnet50", "channels": (28, 56, 112, 224)},
        paper_parameters=6_320_000,
    ),
    "mask_rcnn": Rival(
        build_mask_rcnn,
        default={
            "backbone": "resnet50",
            "channels": (64, 128, 256, 512),
            "pyramid_channels": 256,
            "box_features": 1024,
            "mask_channels": 256,
            "anchors": ANCHORS,
        },
        paper={
            "backbone": "resnet18",
            "channels": (26, 52, 104, 208),
            "pyramid_channels": 64,
            "box_features": 256,
            "mask_channels": 64,
            "anchors": ANCHORS,
        },
        paper_parameters=3_150_000,
    ),
    "h_dense_unet": Rival(
        build_h_dense_unet,
        default={
            "stem": 96,
            "growth": 48,
            "blocks": (6, 12, 36, 24),
            "growth_3d": 32,
            "blocks_3d": (3, 4, 12, 8),
            "features": 64,
        },
        paper={
            "stem": 36,
            "growth": 18,
            "blocks": (6, 12, 36, 24),
            "growth_3d": 12,
            "blocks_3d": (3, 4, 12, 8),
            "features": 64,
        },
        paper_parameters=8_260_000,
    ),
    "pspnet": Rival(
        build_pspnet,
        default={"backbone": "resnet34", "channels": (64, 128, 256, 512), "pyramid_channels": 512},
        paper={"backbone": "resnet34", "channels": (72, 144, 256, 512), "pyramid_channels": 512},
        paper_parameters=1_890_000,
    ),
    "unet3plus": Rival(
        build_unet3plus,
        default={"base_channels": 64},
        paper={"base_channels": 10},
        paper_parameters=645_665,
    ),
    "nnunet": Rival(
        build_nnunet,
        default={"features": (32, 64, 128, 256, 512, 512, 512)},
        paper={"features": (6, 12, 24, 48, 72, 64, 64)},
        paper_parameters=645_665,
    ),
}


def build(name: str, in_channels: int, num_classes: int, size: Size = "default", **widths: Any) -> nn.Module:
    """Builds a network by its name in RIVALS; `widths` replace single ones of the size's.

    Raises ValueError for an unknown name, size or width, or a width out of range; ImportError, which says how to
    install it, where the network's library is missing.
    """
    if name not in RIVALS:
        raise ValueError(f"the network is {name!r}; it must be one of {', '.join(RIVALS)}")
    if size not in ("default", "paper"):
        raise ValueError(f'size is {size!r}; it must be "default" or "paper"')
    for argument, value in (("in_channels", in_channels), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"{argument} is {value}; it must be 1 or more")
    rival = RIVALS[name]
    known: dict[str, Any] = getattr(rival, size)
    for width, value in widths.items():
        if width not in known:
            raise ValueError(f"{name} has no width {width!r}; it has {', '.join(known)}")
        check_width(f"{name}'s {width}", value, known[width])
    try:
        return rival.make(in_channels, num_classes, **known | widths)
    except ImportError as error:
        raise ImportError(
            f"{name} needs a package that is not installed ({error}): pip install .[baselines]"
        ) from error


def check_width(what: str, value: Any, like: Any) -> None:
    """Raises ValueError unless the value is of the kind of a known one, and its numbers are 1 or more."""
    if isinstance(like, str):
        right, allowed = isinstance(value, str), "a name"
    elif isinstance(like, tuple):
        right = isinstance(value, (list, tuple)) and len(value) == len(like) and all(map(is_positive, value))
        allowed = f"{len(like)} whole numbers, each 1 or more"
    else:
        right, allowed = is_positive(value), "a whole number, 1 or more"
    if not right:
        raise ValueError(f"{what} is {value!r}; it must be {allowed}")


def is_positive(value: Any) -> bool:
    """Tells whether a value is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def training_loss(
    network: nn.Module,
    criterion: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    image: Tensor,
    target: Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Computes a batch's loss: the network's own where it has one (Mask R-CNN), else criterion(logits, target, weight).

    image: (N, bands, H, W). target: (N, H, W) labels. sample_weight: (N,); a sample of weight 0 takes no part.
    """
    own = getattr(network, "training_loss", None)
    return criterion(network(image), target, sample_weight) if own is None else own(image, target, sample_weight)
