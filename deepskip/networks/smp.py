"""Any architecture with any encoder of segmentation_models_pytorch (Iakubovskii 2019), from random weights."""

import difflib
import inspect
from typing import Any

from torch import nn

from deepskip.kernels import torchvision_ops
from deepskip.networks.padded import Padded
from deepskip.networks.pooling import with_exportable_pooling

# arguments of its classes that are DeepSkip's to give, or would change what comes out: probabilities, or a second output
NOT_OPTIONS = {
    "self", "kwargs", "encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params",
}  # fmt: skip
# the lowest maps of its encoders are at 1/32 of the input's size
MULTIPLE = 32


def build_smp(in_channels: int, num_classes: int, *, arch: str, encoder: str, **options: Any) -> nn.Module:
    """Build an architecture, such as Unet, with an encoder, such as resnet18, or tu-NAME of timm's; nothing is downloaded.

    Raises ValueError for an unknown architecture or encoder.
    """
    torchvision_ops.load_torchvision()
    import segmentation_models_pytorch as smp

    # which encoder timm builds is its list's matter: its own names could also name a file or a model hub
    if encoder.startswith("tu-"):
        import timm

        encoders = {f"tu-{name}" for name in timm.list_models()}
    else:
        encoders = set(smp.encoders.get_encoder_names())
    architectures = {name.lower(): name for name in smp.MODEL_ARCHITECTURES_MAPPING}
    for what, value, there in (
        ("architecture", arch.lower(), sorted(architectures)),
        ("encoder", encoder, sorted(encoders)),
    ):
        if value not in there:
            close = difflib.get_close_matches(value, there, n=3, cutoff=0.4)
            raise ValueError(
                f"model.network is smp:{arch}:{encoder}; segmentation_models_pytorch has no {what} {value!r} "
                f"(did you mean {', '.join(close or there[:5])}?)"
            )
    kind = smp.MODEL_ARCHITECTURES_MAPPING[arch.lower()]
    # its own arguments alone: what it hands on to timm could name a file, whose pickle would be run, or a model hub
    known = set(inspect.signature(kind).parameters) - NOT_OPTIONS
    if unknown := sorted(set(options) - known):
        raise ValueError(f"model.options has {', '.join(unknown)}; smp:{arch} has {', '.join(sorted(known))}")
    try:
        network = kind(encoder, encoder_weights=None, in_channels=in_channels, classes=num_classes, **options)
    # a shape, an encoder or a value that the library does not put together
    except (ValueError, KeyError, TypeError, AssertionError, NotImplementedError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"smp:{arch}:{encoder} with model.options {options} cannot be built: {reason}") from error
    return Padded(with_exportable_pooling(network), MULTIPLE)
