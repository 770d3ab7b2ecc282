"""Pack a folder of images and masks, train on it, and report IoU by object size; `make_images.py` writes such a folder."""

import sys
from pathlib import Path

import deepskip
from deepskip.data_shards.sources.folder import pack_folder


def main(steps: int = 300) -> float:
    """Train on images/ and masks/ for the given number of steps and return the validation IoU."""
    counts = pack_folder(Path("images"), Path("masks"), Path("data/own"), val_share=0.2, say=print)
    print(f"packed {counts}")
    config = deepskip.Config()
    config.data.path, config.optim.steps, config.run.name, config.run.tracking_uri = "data/own", steps, "own", "none"
    iou = deepskip.train(config)["val"]["iou"]
    print(f"validation IoU {iou:.3f}; by size: deepskip evaluate --model runs/own --data data/own/val")
    return iou


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
