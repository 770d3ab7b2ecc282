"""Train on cubes of 200 bands, normalised by the training set's statistics; `make_cubes.py` writes them."""

import sys
from pathlib import Path

import numpy as np

import deepskip
from deepskip.data_shards.sources.folder import pack_folder


def main(steps: int = 150) -> float:
    """Train on cubes/ for the given number of steps and return the validation IoU."""
    pack_folder(Path("cubes"), Path("cubes"), Path("data/cubes-by-script"), val_share=0.25, say=print)
    config = deepskip.Config()
    config.data.path, config.data.crop, config.data.normalize = "data/cubes-by-script", 64, "dataset"
    config.model.base_channels, config.optim.steps = 16, steps
    config.run.name, config.run.tracking_uri = "cubes-by-script", "none"
    iou = deepskip.train(config)["val"]["iou"]
    with np.load("cubes/000.npz") as file:
        probability = deepskip.load("runs/cubes-by-script").predict_proba(file["cube"])  # (height, width, 1)
        print(f"mean probability: targets {probability[file['mask'] == 1].mean():.3f}, background "
              f"{probability[file['mask'] == 0].mean():.3f}")  # fmt: skip
    return iou


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
