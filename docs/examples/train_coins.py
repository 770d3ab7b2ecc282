"""Train on the built-in coins in this process, without Ray, and segment a photograph that is no part of them."""

import sys
from typing import Any

import skimage.data

import deepskip


def main(steps: int = 300) -> dict[str, Any]:
    """Train for the given number of steps and return the run's summary."""
    config = deepskip.Config()
    config.data.path, config.data.builtin = "data/coins", "coins"
    config.optim.steps, config.run.name, config.run.tracking_uri = steps, "coins-by-script", "none"
    summary = deepskip.train(config)
    # (height, width, bands), every third pixel: the model learns coins of 9 to 19 pixels.
    photograph = skimage.data.coins()[::3, ::3, None].repeat(3, axis=2)
    mask = deepskip.load("runs/coins-by-script").predict(photograph)
    print(f"validation IoU {summary['val']['iou']:.3f}; {mask.mean():.1%} of the photograph are coins")
    return summary


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
