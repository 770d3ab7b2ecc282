"""Build any architecture with any encoder of segmentation_models_pytorch (Iakubovskii 2019).

Its weights are random.
"""

import difflib
import inspect
from typing import Any

from torch import nn

from deepskip.kernels import torchvision_ops
from deepskip.networks.padded import Padded
from deepskip.networks.pooling import with_exportable_pooling

# Arguments that DeepSkip sets itself, or that would change the output to probabilities or to two outputs.
NOT_OPTIONS = {
    "self", "kwargs", "encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params",
}  # fmt: skip
# The lowest maps of its encoders are at 1/32 of the input's size.
MULTIPLE = 32


def build_smp(in_channels: int, num_classes: int, *, arch: str, encoder: str, **options: Any) -> nn.Module:
    """Build an architecture with an encoder of segmentation_models_pytorch, without downloads, for images of any size.

    Args:
        in_channels: bands.
        num_classes: channels of the logits.
        arch: architecture, such as Unet.
        encoder: such as resnet18, or tu-NAME for timm's.
        **options: arguments of the architecture's class.

    Raises:
        ValueError: for an unknown architecture, encoder or option, or if the library cannot build the combination.
    """
    torchvision_ops.load_torchvision()
    import segmentation_models_pytorch as smp

    # Only encoders in timm's list: other names that timm accepts could be a file or a model hub.
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
    # Only the class's own arguments: those passed to timm could name a file, whose pickle would be run, or a model hub.
    known = set(inspect.signature(kind).parameters) - NOT_OPTIONS
    if unknown := sorted(set(options) - known):
        raise ValueError(f"model.options has {', '.join(unknown)}; smp:{arch} has {', '.join(sorted(known))}")
    try:
        network = kind(encoder, encoder_weights=None, in_channels=in_channels, classes=num_classes, **options)
    # The library raises errors of many types for combinations that it does not support.
    except (ValueError, KeyError, TypeError, AssertionError, NotImplementedError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"smp:{arch}:{encoder} with model.options {options} cannot be built: {reason}") from error
    return Padded(with_exportable_pooling(network), MULTIPLE)
