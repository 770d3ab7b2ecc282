"""DeepSkip: small-object segmentation with a deep-skip U-Net on images of 2 to 300 bands."""

import kernels

# PyPI has another package called kernels; where that one comes first on the path nothing below would work
if getattr(kernels, "PROJECT", None) != "deepskip":
    raise ImportError(
        f"`import kernels` finds {kernels.__file__}, not DeepSkip's own package of that name. "
        "Uninstall the other one (pip uninstall kernels) or put DeepSkip's folder first on PYTHONPATH."
    )

from kernels import torchvision_ops

# torchmetrics imports torchvision where it is installed, which fails beside a torch of another build
torchvision_ops.declare()

from deepskip.loss import BCEDiceLoss  # noqa: E402
from deepskip.model import Model, load  # noqa: E402
from deepskip.network import DeepSkipUNet  # noqa: E402

__all__ = ["BCEDiceLoss", "DeepSkipUNet", "Model", "load"]
