"""Build any network by its name: DeepSkip, the networks that it is compared with, and those of installed packages.

A network takes (N, bands, H, W) float and returns logits (N, classes, H, W) of the input's size. Bands, classes, H and W
may be any. It is trained from scratch: no weights are ever downloaded. A network with its own loss has a method
`training_loss(image, target, sample_weight) -> scalar`.

A name in a config or a checkpoint selects among what is installed: the registry, segmentation_models_pytorch, and the
entry point group `deepskip.networks`. It is never imported as a path, which would run untrusted code.
"""

import copy
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from deepskip.config import ModelConfig
from deepskip.network import PRIOR_LOGIT, DeepSkipUNet
from deepskip.networks.acm import build_acm
from deepskip.networks.enlarged import Enlarged
from deepskip.networks.fcn import build_fcn
from deepskip.networks.h_dense_unet import build_h_dense_unet
from deepskip.networks.mask_rcnn import build_mask_rcnn
from deepskip.networks.nnunet import build_nnunet
from deepskip.networks.pspnet import build_pspnet
from deepskip.networks.smp import build_smp
from deepskip.networks.unet import build_unet
from deepskip.networks.unet3plus import build_unet3plus

DEFAULT = "deepskip"
# DeepSkipUNet with its deep skips, and without them, the paper's baseline.
OURS = {DEFAULT: True, "plain_unet": False}
SMP = "smp"
ENTRY_POINTS = "deepskip.networks"
# The settings of the config's model section that DeepSkipUNet alone takes.
OWN_SETTINGS = ("base_channels", "levels", "encoder", "norm", "upsample")
SIZES = ("default", "paper")
# The largest width of a layer. The network of an untrusted checkpoint is built as an outline, to check its weights.
MAX_WIDTH = 8192
# Side in pixels of the image on which a network of a package is tried.
TRIED = 128


@dataclass(frozen=True)
class Network:
    """A network of the registry, its widths in two sizes, and the number of parameters that the paper reports.

    Attributes:
        make: function of the bands, the classes and the widths that builds the network.
        default: the widths that the network's authors or their library use.
        paper: widths that give the paper's number of parameters for 3 bands and 1 class. If the paper has no such
            network, they give DeepSkip's own number.
        paper_parameters: that number.
    """

    make: Callable[..., nn.Module]
    default: dict[str, Any]
    paper: dict[str, Any]
    paper_parameters: int


# The anchors, in pixels, fit small objects in images that are not enlarged.
ANCHORS = (4, 8, 16, 32, 64)

REGISTRY: dict[str, Network] = {
    "unet": Network(
        build_unet,
        default={"features": (32, 32, 64, 128, 256, 32)},
        paper={"features": (9, 18, 36, 74, 149, 9)},
        paper_parameters=645_665,
    ),
    "fcn": Network(
        build_fcn,
        default={"backbone": "resnet50", "channels": (64, 128, 256, 512)},
        paper={"backbone": "resnet50", "channels": (28, 56, 112, 224)},
        paper_parameters=6_320_000,
    ),
    "mask_rcnn": Network(
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
    "h_dense_unet": Network(
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
    "pspnet": Network(
        build_pspnet,
        default={"backbone": "resnet34", "channels": (64, 128, 256, 512), "pyramid_channels": 512},
        paper={"backbone": "resnet34", "channels": (72, 144, 256, 512), "pyramid_channels": 512},
        paper_parameters=1_890_000,
    ),
    "unet3plus": Network(
        build_unet3plus,
        default={"base_channels": 64},
        paper={"base_channels": 10},
        paper_parameters=645_665,
    ),
    "nnunet": Network(
        build_nnunet,
        default={"features": (32, 64, 128, 256, 512, 512, 512)},
        paper={"features": (6, 12, 24, 48, 72, 64, 64)},
        paper_parameters=645_665,
    ),
    "acm": Network(
        build_acm,
        default={"channels": (8, 16, 32, 64), "blocks": (3, 3, 3)},
        paper={"channels": (10, 20, 41, 82), "blocks": (3, 3, 3)},
        paper_parameters=645_665,
    ),
}


def build(settings: Mapping[str, Any], in_channels: int, num_classes: int) -> nn.Module:
    """Build the network that the model section of a config or of a checkpoint of any age describes, with random weights.

    The head of each network that the registry or smp builds starts near a foreground probability of 0.1, as DeepSkip's
    does.

    Args:
        settings: settings of `deepskip.config.ModelConfig`; a missing one has DeepSkip's default. `options` are for networks
            other than DeepSkip. They are {"size": "paper"} or single widths of a network of the registry, the arguments
            of smp's classes, or those of an installed network's function.
        in_channels: bands, 1 or more.
        num_classes: 1 for binary, else exclusive classes.

    Raises:
        ValueError: for an unknown name or option, or one out of range.
        ImportError: if the network's library is missing; the message says how to install it.
    """
    check(settings)
    for argument, value in (("in_channels", in_channels), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"{argument} is {value}; it must be 1 or more")
    name, options = settings.get("network", DEFAULT), dict(settings.get("options") or {})
    enlarge = settings.get("enlarge", 1)
    if name in OURS:
        own = {key: settings[key] for key in OWN_SETTINGS if key in settings}
        return DeepSkipUNet(in_channels, num_classes, deep_skips=OURS[name], enlarge=enlarge, **own)
    try:
        if name in REGISTRY:
            widths = widths_of(name, options)
            network = REGISTRY[name].make(in_channels, num_classes, **widths)
        elif name.startswith(f"{SMP}:"):
            _, arch, encoder = name.split(":")
            network = build_smp(in_channels, num_classes, arch=arch, encoder=encoder, **options)
        else:
            network = installed()[name].load()(in_channels, num_classes, **options)
    except ImportError as error:
        raise ImportError(
            f"model.network {name} needs a package that is not installed ({error}): pip install '.[networks]'"
        ) from error
    except TypeError as error:
        raise ValueError(f"model.options is {options}; {name} does not take that: {error}") from error
    if enlarge > 1 and brings_loss(network):
        raise ValueError(f"model.enlarge is {enlarge}; {name} computes no logits while it trains, so it must be 1")
    if name not in installed() and not brings_loss(network):
        start_at_prior(network, num_classes)
    return Enlarged(network, enlarge) if enlarge > 1 else network


def outline(settings: Mapping[str, Any], in_channels: int, num_classes: int) -> nn.Module:
    """Build a network on the meta device, without memory for its weights, to check early that it can be built.

    A network of an installed package may not work without weights, so it is built on the CPU.

    Args:
        settings: see `build`.
        in_channels: bands, 1 or more.
        num_classes: 1 for binary, else exclusive classes.

    Raises:
        ValueError: as `build`.
        ImportError: as `build`.
    """
    with torch.device("cpu" if settings.get("network") in installed() else "meta"):
        return build(settings, in_channels, num_classes)


def check_output(network: nn.Module, what: str, in_channels: int, num_classes: int) -> None:
    """Check that a network of an installed package can be copied, and makes logits of an image's size.

    Args:
        network: the network, on the CPU.
        what: how a message begins.
        in_channels: bands.
        num_classes: 1 for binary, else exclusive classes.

    Raises:
        ValueError: if it cannot, or what it returns has another type or shape.
    """
    try:
        # The moving average of the weights is a copy.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = copy.deepcopy(network).eval()(torch.zeros(1, in_channels, TRIED, TRIED))
    except Exception as error:
        raise ValueError(
            f"{what}: it does not work on an image of {in_channels} x {TRIED} x {TRIED}, or cannot be copied: {error}"
        ) from error
    wanted = (1, num_classes, TRIED, TRIED)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.shape != wanted:
        got = " x ".join(map(str, found.shape)) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"{what}: it must return logits of {' x '.join(map(str, wanted))} (images x num_classes x height x width) for an "
            f"image of {in_channels} x {TRIED} x {TRIED}, and returns {got}"
        )


def check(settings: Mapping[str, Any]) -> None:
    """Check that the model section names a known network, and only settings that it has.

    Args:
        settings: see `build`.

    Raises:
        ValueError: for an unknown network, option or size, a width out of range, or a setting that only DeepSkip has.
    """
    name, options = settings.get("network", DEFAULT), settings.get("options") or {}
    if name in OURS:
        if options:
            raise ValueError(f"model.options is {options}; {name} has model.{', model.'.join(OWN_SETTINGS)} instead")
        return
    if name in REGISTRY:
        widths_of(name, options)
    elif name.startswith(f"{SMP}:"):
        if not re.fullmatch(r"smp:\w+:[\w.-]+", name):
            raise ValueError(f"model.network is {name!r}; it must be smp:ARCH:ENCODER, such as smp:Unet:resnet18")
    elif name not in installed():
        known = [*OURS, *REGISTRY, *installed()]
        close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ValueError(
            f"model.network is {name!r}{hint}; it must be one of {', '.join(known)}, or smp:ARCH:ENCODER, or an entry point "
            f"of an installed package in the group {ENTRY_POINTS}"
        )
    changed = [key for key in OWN_SETTINGS if key in settings and settings[key] != getattr(ModelConfig, key)]
    if changed:
        named = ", ".join(f"model.{key}" for key in changed)
        raise ValueError(f"{named} is for DeepSkip, and model.network is {name}: remove it, and see model.options")


def installed() -> dict[str, Any]:
    """Return the entry points of the networks that installed packages add, by name, except names of DeepSkip's own."""
    found = entry_points(group=ENTRY_POINTS)
    return {point.name: point for point in found if point.name not in OURS and point.name not in REGISTRY}


def widths_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all widths of a network of the registry: those of its size, with single ones replaced by options.

    Args:
        name: name of a network of the registry.
        options: "size" ("default" or "paper") and single widths.

    Raises:
        ValueError: for an unknown size or width, or a width out of range.
    """
    size, widths = options.get("size", "default"), {key: value for key, value in options.items() if key != "size"}
    if size not in SIZES:
        raise ValueError(f'model.options.size is {size!r}; it must be "default" or "paper"')
    known: dict[str, Any] = getattr(REGISTRY[name], size)
    for width, value in widths.items():
        if width not in known:
            raise ValueError(f"model.options has {width!r}; {name} has size, {', '.join(known)}")
        check_width(f"model.options.{width}", value, known[width])
    return known | widths


def check_width(what: str, value: Any, like: Any) -> None:
    """Check that a width has the type of a known one, and that its numbers are in range.

    Args:
        what: name of the setting, for the message.
        value: value to check.
        like: the known width: a number, a tuple of numbers, or the name of a backbone.

    Raises:
        ValueError: if it has another type or length, or is out of range.
    """
    if isinstance(like, str):
        # Only names in this list: timm's own names could also be a file or a model hub, from which it would load.
        right, allowed = isinstance(value, str) and value in resnets(), "a ResNet in timm: " + ", ".join(resnets())
    elif isinstance(like, tuple):
        right = isinstance(value, (list, tuple)) and len(value) == len(like) and all(map(is_positive, value))
        allowed = f"{len(like)} whole numbers, each 1 to {MAX_WIDTH}"
    else:
        right, allowed = is_positive(value), f"a whole number, 1 to {MAX_WIDTH}"
    if not right:
        raise ValueError(f"{what} is {value!r}; it must be {allowed}")


def resnets() -> tuple[str, ...]:
    """Return the names of the backbones that fcn, pspnet and mask_rcnn can have."""
    return ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def is_positive(value: Any) -> bool:
    """Return whether a value is an integer from 1 to MAX_WIDTH; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WIDTH


def brings_loss(network: nn.Module) -> bool:
    """Return whether a network is trained with its own loss."""
    return hasattr(network, "training_loss")


def start_at_prior(network: nn.Module, num_classes: int) -> None:
    """Set the bias of a network's last convolution to DeepSkip's initial logits; its weights stay as initialised.

    Libraries initialise heads that predict half of all pixels as foreground, which short trainings by AdamW take long
    to unlearn.

    Args:
        network: network whose last convolution with `num_classes` channels and a bias is the head; without one, nothing
            changes.
        num_classes: 1 for binary, else exclusive classes.
    """
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    heads = [m for m in convolutions if m.out_channels == num_classes and m.bias is not None]
    if heads:
        bias = heads[-1].bias
        assert bias is not None
        nn.init.zeros_(bias)
        nn.init.constant_(bias[0 if num_classes == 1 else slice(1, None)], PRIOR_LOGIT)
