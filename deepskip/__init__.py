"""DeepSkip: small-object segmentation with a deep-skip U-Net on images of 2 to 300 bands."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepskip.config import Config
    from deepskip.loss import BCEDiceLoss
    from deepskip.network import DeepSkipUNet
    from deepskip.predictor import Predictor, load

__version__ = "0.1.0"
__all__ = ["BCEDiceLoss", "Config", "DeepSkipUNet", "Predictor", "load", "train"]

# in a checkout the other rooms lie beside this folder; installed they lie in it
_ROOT = Path(__file__).parents[1]
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels" / "__init__.py").is_file():
    __path__.append(str(_ROOT))

# torch takes a second to import: what needs it comes when it is asked for
_HOMES = {
    "BCEDiceLoss": "deepskip.loss",
    "Config": "deepskip.config",
    "DeepSkipUNet": "deepskip.network",
    "Predictor": "deepskip.predictor",
    "load": "deepskip.predictor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'deepskip' has no attribute {name!r}")


def train(config: Config) -> dict[str, Any]:
    """Train in this process, without Ray, as `deepskip train --local` does: the same stream, steps and checkpoints.

    config: `Config()` and what differs, such as `config.data.path`. A training of the same settings that was cut off goes on.
    Under torchrun every rank calls. MLflow tracks it where it is installed.

    Returns:
        The run's summary, as its summary.json: its name, "val" with the metrics of the best validation, sizes and times. On
        other ranks than 0 it is empty.

    Raises:
        ValueError: for settings or data that cannot be trained on, a loss that is no number, a disk that is full.
    """
    import copy

    from deepskip.config import check_values

    # the one look up: jobs joins this package, which knows nothing of shards, with the shards
    from deepskip.jobs.train import train_here

    check_values(config)
    try:
        return train_here(copy.deepcopy(config), "train")
    except SystemExit as ended:
        if notes := getattr(ended, "__notes__", None):
            raise ValueError("\n".join(notes)) from None
        raise
