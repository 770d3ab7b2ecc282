"""Draw docs/prediction.png, README's picture: `python -m tests.picture RUN SPLIT`, after README's three commands.

SPLIT is a split that the run never saw, such as data/coins/test. The samples are spread evenly over it, not chosen.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

import deepskip
from deepskip.data_shards.dataset import Shards
from deepskip.figures import FALSE_ALARM, FOUND, MISSED, SKY, comparison, outline, to_rgb

PICTURE = Path(__file__).parents[1] / "docs" / "prediction.png"
COLUMNS = 6


def main(run: str, split: str) -> None:
    """Draw the picture of a run's predictions on a split."""
    predictor, shards = deepskip.load(run), Shards(split)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(3, COLUMNS)
    for column in range(COLUMNS):
        entry = shards.index.entries([column * len(shards) // COLUMNS])[0]
        image, mask, *_ = shards.whole(entry)
        outlined = to_rgb(image)
        edge = outline(mask != 0)
        outlined[edge] = SKY
        found = comparison(image, predictor.predict(image), mask, shards.index.ignore_index)
        for axis, picture in zip(axes[:, column], (to_rgb(image), outlined, found), strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", "true outlines", "prediction"), strict=True):
        axis.set_ylabel(name, fontsize=13)
    legend = [Patch(color=c, label=n) for c, n in ((FOUND, "found"), (MISSED, "missed"), (FALSE_ALARM, "false alarm"))]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=13, frameon=False)
    figure.savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
