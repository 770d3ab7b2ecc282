"""Small networks of random weights, saved as checkpoints of runs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepskip
from deepskip import checkpoint
from deepskip.config import Config


def save_model(
    run: Path,
    bands: int,
    num_classes: int = 1,
    normalize: str = "image",
    seed: int = 0,
    longest_side: int | None = None,
    **preparation: Any,
) -> Path:
    """Write the best checkpoint of a run."""
    torch.manual_seed(seed)
    config = Config()
    config.model.base_channels, config.model.levels = 2, 3
    config.data.normalize = normalize  # type: ignore[assignment]
    network = deepskip.DeepSkipUNet(bands, num_classes, 2, 3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(std=0.3)
    # Probabilities lie on both sides of 0.5, and far from it, so that a wrong pixel is seen.
    network.head.weight.data.normal_(std=2)
    smooth = nn.functional.interpolate(torch.randn(1, bands, 16, 16), size=(128, 128), mode="bilinear")
    with torch.inference_mode():
        logits = network.eval()(smooth / smooth.std())[0].flatten(1)
    assert network.head.bias is not None
    network.head.bias.data -= logits.mean(1)
    data: dict[str, Any] = {
        "in_channels": bands,
        "num_classes": num_classes,
        "mean": [100.0] * bands,
        "std": [60.0] * bands,
        # Images with other numbers of bands are resampled if they are also to be shrunk.
        "preparation": {"bands": bands if longest_side and not preparation else None, "longest_side": longest_side}
        | preparation,
    }
    if num_classes == 3:
        data["classes"] = ["rust", "dust"]
    state = {"config": asdict(config), "data": data, "model": network.state_dict(), "ema": None}
    checkpoint.save(state, run / checkpoint.FOLDER / checkpoint.BEST)
    return run
