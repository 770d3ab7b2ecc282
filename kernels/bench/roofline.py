"""Draw docs/kernels.svg: what each launch issues and moves, and which of the two binds it.

`python -m deepskip.kernels.bench.roofline` reads the counts that `builds --json kernels/bench/results/counts.json` wrote.
No GPU is needed. The roofline is that of instructions (Ding and Williams 2019): above the ridge a launch is bound by the rate
at which warp instructions are issued, below it by memory.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from deepskip.kernels.bench.counts import CARDS, NEXT, SCHEDULERS

COUNTS, PICTURE = Path("kernels/bench/results/counts.json"), Path("docs/kernels.svg")
# The loss of its sums is one program, whatever the image's size.
SMALLEST = 0.01
ARCHITECTURE, CARD = "sm_90", "H100"
# Two colours of deepskip.figures, which kernels may not import.
BLUE, VERMILION = (0.0, 0.45, 0.7), (0.84, 0.37, 0.0)


class Work(NamedTuple):
    """Work of the launches of one name, a pixel.

    Attributes:
        instructions: warp instructions.
        moved: bytes.
    """

    instructions: float
    moved: float


def works(rows: list[dict[str, Any]]) -> dict[str, tuple[Work, Work]]:
    """Return the work of the established and of the new launches, for each name that has both and that is seen.

    Args:
        rows: rows of `counts`.
    """
    found: dict[str, Work] = {}
    for row in rows:
        if row["arch"] == ARCHITECTURE:
            before = found.get(row["launch"], Work(0, 0))
            found[row["launch"]] = Work(
                before.instructions + row["warp_instructions_per_pixel"], before.moved + row["bytes_per_pixel"]
            )
    seen = {name: work for name, work in found.items() if work.instructions > SMALLEST}
    return {name: (work, found[name + NEXT]) for name, work in seen.items() if name + NEXT in found}


def draw(pairs: dict[str, tuple[Work, Work]]) -> Figure:
    """Draw bars of instructions and bytes, and the roofline with each launch's number, established and new.

    Args:
        pairs: work of the established and of the new launches, by name.
    """
    card = CARDS[CARD]
    issue, ridge = card.sms * SCHEDULERS * card.clock, card.sms * SCHEDULERS * card.clock / card.bandwidth
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.25))
    places = np.arange(len(pairs))
    for row, (field, label) in enumerate((("instructions", "warp instructions a pixel"), ("moved", "bytes a pixel"))):
        axis = figure.add_subplot(grid[row, 0])
        for shift, which, colour, name in ((-0.2, 0, VERMILION, "auto"), (0.2, 1, BLUE, "next")):
            values = [getattr(pair[which], field) for pair in pairs.values()]
            bars = axis.barh(places + shift, values, 0.4, color=colour, label=name)
            axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=8)
        axis.set_yticks(places, [f"{name}  {number}" for number, name in enumerate(pairs, 1)])
        axis.set(xscale="log", xlabel=label)
        axis.margins(x=0.2)
        axis.invert_yaxis()
        axis.legend(fontsize=8)
    axis = figure.add_subplot(grid[:, 1])
    intensities = np.geomspace(0.03, 3, 100)
    axis.plot(intensities, np.minimum(issue, intensities * card.bandwidth) / 1e9, color="0.4")
    axis.axvline(ridge, color="0.4", linestyle=":")
    for number, pair in enumerate(pairs.values(), 1):
        (x, y), (to_x, to_y) = ((one.instructions / one.moved, 0.0) for one in pair)
        y, to_y = (min(issue, each * card.bandwidth) / 1e9 for each in (x, to_x))
        axis.plot(x, y, "o", color=VERMILION)
        axis.plot(to_x, to_y, "s", color=BLUE)
        # Points lie together, so their numbers go out to the side, one after another.
        away = 8 + 9 * (number - 1)
        for place, offset in (((x, y), (-away - 4, 2)), ((to_x, to_y), (away, -7))):
            axis.annotate(
                str(number), place, xytext=offset, textcoords="offset points", fontsize=9,
                arrowprops={"arrowstyle": "-", "color": "0.7", "shrinkA": 0, "shrinkB": 2},
            )  # fmt: skip
    axis.text(0.035, issue / 1.2e9, "bound by memory", fontsize=9, color="0.3")
    axis.text(ridge * 1.1, issue / 1.2e9, "bound by instruction issue", fontsize=9, color="0.3")
    axis.set(
        xscale="log", yscale="log", xlabel="warp instructions a byte", ylabel="10⁹ warp instructions a second, at most",
        title=f"Roofline of an {CARD}: {card.bandwidth / 1e12:.1f} TB/s, {issue / 1e9:.0f}·10⁹ warp instructions/s",
    )  # fmt: skip
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3, which="both")
    return figure


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.kernels.bench.roofline", description=__doc__)
    parser.add_argument("--counts", type=Path, default=COUNTS)
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    draw(works(json.loads(arguments.counts.read_text()))).savefig(arguments.out)


if __name__ == "__main__":
    main()
