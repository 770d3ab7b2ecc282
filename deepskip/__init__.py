"""DeepSkip: small-object segmentation with a deep-skip U-Net on images of 2 to 300 bands."""

import copy
from typing import Any

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

from deepskip.config import Config, check_values  # noqa: E402
from deepskip.loss import BCEDiceLoss  # noqa: E402
from deepskip.network import DeepSkipUNet  # noqa: E402
from deepskip.predictor import Predictor, load  # noqa: E402

__all__ = ["BCEDiceLoss", "Config", "DeepSkipUNet", "Predictor", "load", "train"]


def train(config: Config) -> dict[str, Any]:
    """Train in this process, without Ray, as `python -m jobs.train --local` does: the same stream, steps and checkpoints.

    config: `Config()` and what differs, such as `config.data.path`. A training of the same settings that was cut off goes on.
    Under torchrun every rank calls. MLflow tracks it where it is installed.

    Returns:
        The run's summary, as its summary.json: its name, "val" with the metrics of the best validation, sizes and times. On
        other ranks than 0 it is empty.

    Raises:
        ValueError: for settings or data that cannot be trained on, a loss that is no number, a disk that is full.
    """
    # the one look up: jobs joins this package, which knows nothing of shards, with the shards
    from jobs.train import train_here

    check_values(config)
    try:
        return train_here(copy.deepcopy(config), "train")
    except SystemExit as ended:
        if notes := getattr(ended, "__notes__", None):
            raise ValueError("\n".join(notes)) from None
        raise
