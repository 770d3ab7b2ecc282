"""Report the results of a comparison: a CSV with a row per cell, Markdown tables, and two figures.

They are made again from the CSV of a comparison, without its trainings, into the folder of `--out`:

    python -m deepskip.jobs.comparison.table CSV --config GRID.yaml --out FOLDER
"""

import ast
import csv
import io
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from deepskip.data_shards import storage
from deepskip.figures import CLASS_COLOURS
from deepskip.jobs import evaluate, runs
from deepskip.jobs.comparison.grid import TEST, Grid, cells, read_grid
from deepskip.jobs.settings import stop

METRICS = ("iou", "dice", "precision", "recall", "object_recall", "false_alarms_per_image")
# columns of the table, means over the categories: metric, its name, and its factor
COLUMNS = (
    ("iou", "mean IoU", 100), ("precision", "precision", 100), ("recall", "recall", 100), ("dice", "F1", 100),
    ("object_recall", "object recall", 100), ("false_alarms_per_image", "false alarms an image", 1),
    ("milliseconds_per_image", "ms an image", 1),
)  # fmt: skip
Result = dict[str, Any]


def collect(grid: Grid) -> list[Result]:
    """Read the results of the finished cells, one flat record each."""
    results = []
    for cell in cells(grid):
        report = runs.read_json(cell.folder / TEST / evaluate.REPORT)
        summary = runs.read_json(cell.folder / runs.SUMMARY)
        if not report or not summary:
            continue
        metrics = {name: report["metrics"][name] for name in METRICS}
        place = {"category": cell.category, "network": cell.network, "seed": cell.seed, "steps": summary["steps"]}
        model = {"best_step": report["model"]["step"], "parameters": summary["parameters"]}
        tested = {"validation_iou": summary["val"]["iou"], "threshold": report["threshold"], "flips": report["flips"]}
        times = {f"training_{name}": summary[name] for name in ("seconds", "images_per_second")}
        metrics["milliseconds_per_image"] = 1000 / report["images_per_second"]
        smallest = report["by_size"][0]
        metrics |= {f"{what}_under_{smallest['to']}_pixels": smallest[what] for what in ("objects", "found")}
        results.append(place | model | tested | {"images": report["data"]["images"]} | metrics | times)
    return results


def read(path: Path) -> list[Result]:
    """Read the results of the cells of a CSV that `write` wrote.

    Raises:
        OSError, ValueError: if it cannot be read, or is no such CSV.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"category", "network", "seed", *METRICS} <= rows[0].keys():
        raise ValueError(f"{path} is not the cells.csv of a comparison")
    texts = ("category", "network")
    # An undefined value is written as an empty text.
    return [
        {key: text if key in texts else ast.literal_eval(text or "None") for key, text in row.items()} for row in rows
    ]


def write(grid: Grid, results: Sequence[Result]) -> list[Path]:
    """Write cells.csv, table.md, categories.svg and parameters.svg into the grid's folder, and return their paths.

    Args:
        grid: The comparison.
        results: Results of the finished cells; at least one.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(results[0]))
    writer.writeheader()
    writer.writerows(results)
    content = {"cells.csv": text.getvalue().encode(), "table.md": markdown(grid, results).encode()}
    for name, draw in (("categories.svg", draw_categories), ("parameters.svg", draw_parameters)):
        picture = io.BytesIO()
        draw(grid, results).savefig(picture, format="svg")
        content[name] = picture.getvalue()
    for name, data in content.items():
        storage.write_bytes(Path(grid.out, name), data)
    return [Path(grid.out, name) for name in content]


def markdown(grid: Grid, results: Sequence[Result]) -> str:
    """Return the Markdown table, with a row per network, and for several categories one of the IoU of each.

    The second table also has how many of the smallest test objects are found, over all finished cells.

    Ratios are in percent. Means are over categories, for the seeds with all categories done; ± is the standard deviation
    over these seeds. The time of an image is that of the test on its machine, with decoding. The last column is the
    difference of the mean IoU to the first network's, in percentage points, over the seeds that both have. Two or more
    such seeds give a 95 % interval (Student's t).

    Args:
        grid: The comparison.
        results: Results of the finished cells.
    """
    first = next(iter(grid.networks))
    own = {name: [one for one in results if one["network"] == name] for name in grid.networks}
    overall, each = [], []
    for name in filter(own.__getitem__, grid.networks):
        means = {metric: by_seed(grid, results, name, metric) for metric, _, _ in COLUMNS}
        row = [label(grid, name), millions(own[name])]
        row += [spread([factor * mean for mean in means[metric].values()]) for metric, _, factor in COLUMNS]
        against = "" if name == first else difference(by_seed(grid, results, first, "iou"), means["iou"])
        overall.append([*row, str(len(means["iou"])), against])
        ious = [[percent(one["iou"]) for one in own[name] if one["category"] == place] for place in grid.categories]
        each.append([label(grid, name), *map(spread, ious), smallest(own[name])])
    head = [
        "network",
        "parameters",
        *(column for _, column, _ in COLUMNS),
        "seeds",
        f"mean IoU to {label(grid, first)}",
    ]
    tables = [lines_of(head, overall)]
    if len(grid.categories) > 1:
        places = [name.replace("_", " ") for name in grid.categories]
        tables.append(lines_of(["IoU", *places, "smallest objects found"], each))
    return "\n".join(tables)


def smallest(own: Sequence[Result]) -> str:
    """Return the text of how many objects of the report's smallest sizes a network found, and how many there are."""
    found, objects = (
        sum(value for one in own for key, value in one.items() if key.startswith(prefix))
        for prefix in ("found_under_", "objects_under_")
    )
    return f"{found} of {objects}"


def lines_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left and all others to the right."""
    rule = "|".join(["", "---", *["---:"] * (len(head) - 1), ""])
    first, *others = (" | ".join(["", *row, ""]).strip() for row in (head, *rows))
    return "\n".join([first, rule, *others, ""])


def by_seed(grid: Grid, results: Sequence[Result], network: str, metric: str) -> dict[int, float]:
    """Return a metric's mean over categories by seed, for the seeds with all categories done; undefined values count as 0.

    Args:
        grid: The comparison.
        results: Results of the finished cells.
        network: Name of the network.
        metric: Name of the metric.
    """
    found: dict[int, float] = {}
    for seed in grid.seeds:
        values = [one[metric] or 0.0 for one in results if (one["network"], one["seed"]) == (network, seed)]
        if len(values) == len(grid.categories):
            found[seed] = statistics.fmean(values)
    return found


def difference(first: dict[int, float], other: dict[int, float]) -> str:
    """Return the text of a mean difference in percentage points, with a 95 % interval (Student's t) for two or more seeds.

    Args:
        first: Metric of the first network by seed, 0 to 1.
        other: Metric of the other network by seed, 0 to 1.

    Returns:
        Text over the seeds that both have; empty if there are none.
    """
    pairs = [100 * (other[seed] - first[seed]) for seed in first.keys() & other.keys()]
    if not pairs:
        return ""
    mean = statistics.fmean(pairs)
    if len(pairs) == 1:
        return f"{mean:+.1f}"
    from scipy.stats import t

    half = float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def spread(values: Sequence[float]) -> str:
    """Return the text of a mean, with the standard deviation for two or more values."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def percent(ratio: float | None) -> float:
    """Return a ratio in percent; an undefined one (None, such as 0 / 0) counts as 0."""
    return 100 * (ratio or 0.0)


def millions(own: Sequence[Result]) -> str:
    """Return the text of a network's parameters in millions, a range if they differ with the bands of the categories."""
    counts = sorted({round(one["parameters"] / 1e6, 2) for one in own})
    return f"{counts[0]} M" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} M"


def label(grid: Grid, name: str) -> str:
    """Return a network's name in the table."""
    return grid.networks[name].label or name


def look(number: int) -> tuple[Any, str]:
    """Return the colour and the marker of the network or category of a number; when colours begin again, markers change."""
    return CLASS_COLOURS[number % len(CLASS_COLOURS)], "os^D"[number // len(CLASS_COLOURS) % 4]


def draw_parameters(grid: Grid, results: Sequence[Result]) -> Figure:
    """Draw each network's mean IoU over its parameters, for the seeds with all categories done.

    Args:
        grid: The comparison.
        results: Results of the finished cells.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(grid.networks):
        means = [100 * mean for mean in by_seed(grid, results, name, "iou").values()]
        if means:
            parameters = statistics.fmean(one["parameters"] for one in results if one["network"] == name) / 1e6
            colour, marker = look(number)
            error = statistics.stdev(means) if len(means) > 1 else 0.0
            axis.errorbar(parameters, statistics.fmean(means), error, fmt=marker, color=colour, label=label(grid, name))
    axis.set(xlabel="parameters, millions", ylabel="mean test IoU, %", xscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_categories(grid: Grid, results: Sequence[Result]) -> Figure:
    """Draw the IoU of every cell, with a line per network and a colour per category, and each network's mean.

    Args:
        grid: The comparison.
        results: Results of the finished cells.
    """
    names = [name for name in grid.networks if any(one["network"] == name for one in results)]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    for number, category in enumerate(grid.categories):
        points = [(percent(one["iou"]), names.index(one["network"])) for one in results if one["category"] == category]
        places = np.array(points).reshape(-1, 2)
        shift = 0.5 * ((number + 0.5) / len(grid.categories) - 0.5)
        colour, marker = look(number)
        axis.plot(places[:, 0], places[:, 1] + shift, marker, color=colour, markersize=4, alpha=0.7, label=category)
    means = [statistics.fmean(percent(one["iou"]) for one in results if one["network"] == name) for name in names]
    axis.plot(means, range(len(names)), "|", color="black", markersize=22, markeredgewidth=2, label="mean of all cells")
    axis.set_yticks(range(len(names)), [label(grid, name) for name in names])
    axis.invert_yaxis()
    axis.set(xlabel="test IoU, %", xlim=(0, 100))
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    """Write the tables and figures of a CSV."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        stop("usage: python -m deepskip.jobs.comparison.table CSV --config GRID.yaml --out FOLDER")
    grid = read_grid(sys.argv[2:])
    try:
        results = read(Path(sys.argv[1]))
        if strange := {one["network"] for one in results} - set(grid.networks):
            raise ValueError(f"{sys.argv[1]} has networks that are not in the grid: {', '.join(sorted(strange))}")
        paths = write(grid, results)
    except (OSError, ValueError) as error:
        stop(str(error))
    print(f"{markdown(grid, results)}\n{', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
