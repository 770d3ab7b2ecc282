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

# In a checkout the other packages are next to this folder; installed they are subpackages of it.
_ROOT = Path(__file__).parents[1]
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels" / "__init__.py").is_file():
    __path__.append(str(_ROOT))

# Importing torch takes a second, so the names that need it are imported on first use.
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
    """Train in this process, without Ray, with the stream, steps and checkpoints of `deepskip train --local`.

    An interrupted training of the same settings is resumed. Under torchrun every rank must call this function. MLflow
    tracks the run if it is installed.

    Args:
        config: `Config()` with the settings that differ from the defaults, such as `config.data.path`. It is copied.

    Returns:
        The run's summary, as in its summary.json: its name, "val" with the metrics of the best validation, sizes and
        times. On ranks other than 0 it is empty.

    Raises:
        ValueError: for settings or data that cannot be trained on, a loss that is not finite, or a full disk.
    """
    import copy

    from deepskip.config import check_values

    # The only import from a layer above: this package knows nothing of shards, and jobs connects the two.
    from deepskip.jobs.train import train_here

    config = copy.deepcopy(config)
    for section in vars(config).values():
        for name, value in vars(section).items():
            if isinstance(value, Path):
                setattr(section, name, str(value))
    check_values(config)
    try:
        return train_here(config, "train")
    except SystemExit as ended:
        if notes := getattr(ended, "__notes__", None):
            raise ValueError("\n".join(notes)) from None
        raise
