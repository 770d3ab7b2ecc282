"""Any architecture with any encoder of segmentation_models_pytorch (Iakubovskii 2019), from random weights."""

import difflib
from typing import Any

from torch import nn

from deepskip.networks.padded import Padded
from deepskip.networks.pooling import with_exportable_pooling
from kernels import torchvision_ops

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
    for what, value, known in (
        ("architecture", arch.lower(), sorted(architectures)),
        ("encoder", encoder, sorted(encoders)),
    ):
        if value not in known:
            close = difflib.get_close_matches(value, known, n=3, cutoff=0.4)
            raise ValueError(
                f"model.network is smp:{arch}:{encoder}; segmentation_models_pytorch has no {what} {value!r} "
                f"(did you mean {', '.join(close or known[:5])}?)"
            )
    network = smp.create_model(
        arch, encoder_name=encoder, encoder_weights=None, in_channels=in_channels, classes=num_classes, **options
    )
    return Padded(with_exportable_pooling(network), MULTIPLE)
