"""Puts the images into prediction panels that were made with `pictures: false`: python -m jobs.comparison.pictures --help."""

from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser

from jobs.comparison.grid import write_panel
from jobs.comparison.samples import load
from jobs.comparison.scores import with_pictures
from jobs.settings import stop


def main(argv: list[str] | None = None) -> None:
    """Adds what is missing, category by category."""
    parser = ArgumentParser(prog="python -m jobs.comparison.pictures", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that jobs.comparison.data made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison's results")
    given = parser.parse_args(argv)
    for folder in sorted(path for path in (given.out / "cells").iterdir() if path.is_dir()):
        try:
            test = load(given.data / f"{folder.name}.npz", torch.device("cpu")).splits["test"]
        except ValueError as error:
            stop(str(error))
        panels = sorted(folder.glob("*/*.npz"))
        for path in panels:
            with np.load(path, allow_pickle=False) as stored:
                panel = {name: stored[name] for name in stored.files}
            write_panel(path, with_pictures(panel, test))
        print(f"{folder.name}: {len(panels)} panels")


if __name__ == "__main__":
    main()
