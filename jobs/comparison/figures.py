"""The comparison's figures as SVG: bars by category, curves, object sizes, parameters."""

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.comparison.results import (
    OURS,
    Mean,
    Results,
    bin_names,
    block,
    by_size,
    of_category,
    over_categories,
    shown,
)

# the same file from the same numbers, and letters as letters: they are found by a search, and the file is small
STYLE = {"svg.hashsalt": "comparison", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False}
# ours stand out; rivals keep their colour at every width
OURS_COLOURS = ("#d62728", "#f4a08a", "#7f0000")
COLOURS = (
    "#332288",
    "#88ccee",
    "#44aa99",
    "#117733",
    "#999933",
    "#ddcc77",
    "#aa4499",
    "#882255",
    "#bbbbbb",
    "#555555",
    "#0077bb",
    "#ee7733",
    "#009988",
    "#661100",
)


def to_svg(figure: Figure) -> bytes:
    """Writes a figure as SVG without a date."""
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at the ends of lines
    return b"\n".join(line.rstrip() for line in file.getvalue().splitlines()) + b"\n"


def colours(results: Results) -> dict[str, str]:
    """Gives every network its colour: a rival the same at all widths, and another with another loss."""
    found = {name: OURS_COLOURS[i % len(OURS_COLOURS)] for i, name in enumerate(results.group("ours"))}
    others = [*results.group("rival"), *results.group("ablation"), *results.group("tuning")]
    kinds = list(dict.fromkeys(name.removesuffix("-paper") for name in others))
    return found | {name: COLOURS[kinds.index(name.removesuffix("-paper")) % len(COLOURS)] for name in others}


def drawn(results: Results, networks: Sequence[str]) -> list[str]:
    """Keeps the networks that have any whole cell."""
    return [name for name in networks if results.has(name)]


def bars(results: Results, sets: Sequence[tuple[str, list[str]]]) -> Figure:
    """Draws IoU by category and its mean as bars with their spread, a plot for each (heading, networks): Figure 4."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4 * len(sets)), layout="constrained")
        palette = colours(results)
        groups = [*map(shown, results.categories), "mean"]
        for axis, (heading, networks) in zip(figure.subplots(len(sets), 1, squeeze=False)[:, 0], sets, strict=True):
            networks = drawn(results, networks)
            width = 0.86 / max(len(networks), 1)
            for i, name in enumerate(networks):
                means = [of_category(results, category, name, "iou") for category in results.categories]
                means.append(over_categories(results, name, "iou"))
                # a mean of fewer categories is no bar beside the others
                heights = [math.nan if mean.partial else 100 * mean.value for mean in means]
                errors = [0 if math.isnan(mean.deviation) else 100 * mean.deviation for mean in means]
                places = np.arange(len(groups)) + (i - (len(networks) - 1) / 2) * width
                axis.bar(places, heights, width, color=palette[name], label=results.label(name))
                spreads = axis.errorbar(places, heights, errors, fmt="none", ecolor="#222222", elinewidth=0.8)
                spreads.set_label("_")
            axis.axvline(len(groups) - 1.5, color="#888888", linewidth=0.6)
            axis.set_xticks(range(len(groups)), groups)
            axis.set(ylabel="IoU, %", title=heading, ylim=(0, None))
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
            axis.legend(fontsize=7.5, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def mean_curve(
    results: Results, categories: Sequence[str], network: str, split: str, key: str
) -> tuple[list[int], list[float]]:
    """Averages a curve over categories and seeds at the steps that all of its cells have; empty where one has no cell."""
    cells = {
        category: [s for s in results.seeds if "curves" in results.cells.get((category, network, s), {})]
        for category in categories
    }
    kept, seeds = block(cells)
    if len(kept) < len(categories):
        return [], []
    found = []
    for category in categories:
        for seed in seeds:
            points = results.cells[category, network, seed]["curves"].get(split, [])
            found.append({point["step"]: point[key] for point in points if point.get(key) is not None})
    steps = sorted(set(found[0]).intersection(*found[1:])) if found else []
    return steps, [statistics.fmean(curve[step] for curve in found) for step in steps]


def training_curves(results: Results, network: str) -> Figure:
    """Draws a network's loss, Dice and IoU over steps, training above and validation below, a line a category: Figure 5."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6), layout="constrained")
        axes = figure.subplots(2, 3, sharex=True)
        for row, split in enumerate(("train", "validation")):
            for axis, (key, title) in zip(axes[row], (("loss", "loss"), ("dice", "Dice"), ("iou", "IoU")), strict=True):
                for i, category in enumerate(results.categories):
                    steps, values = mean_curve(results, [category], network, split, key)
                    axis.plot(steps, values, color=COLOURS[i % len(COLOURS)], label=shown(category), linewidth=1.4)
                axis.set_title(f"{'training' if split == 'train' else split}: {title}")
                axis.grid(alpha=0.3)
                axis.set_ylim(0, None if key == "loss" else 1)
        for axis in axes[1]:
            axis.set_xlabel("step")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def convergence(results: Results, sets: Sequence[tuple[str, list[str]]]) -> Figure:
    """Draws the validation IoU over steps, the mean over categories, a line a network and a plot a set."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(sets) + 0.4, 4.6), layout="constrained")
        palette = colours(results)
        for axis, (heading, networks) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
            for name in drawn(results, networks):
                steps, values = mean_curve(results, results.categories, name, "validation", "iou")
                if steps:
                    axis.plot(steps, values, color=palette[name], label=results.label(name), **emphasis(name))
            finish(axis, "step", "validation IoU", heading)
    return figure


def emphasis(network: str) -> dict[str, Any]:
    """Makes ours a thick line above the others."""
    return {"linewidth": 2.4, "zorder": 3} if network == OURS else {"linewidth": 1.2}


def finish(axis: Axes, across: str, up: str, title: str) -> None:
    """Labels a plot of fractions."""
    axis.set(xlabel=across, ylabel=up, title=title, ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def sizes(results: Results, sets: Sequence[tuple[str, list[str]]]) -> Figure:
    """Draws object recall above and IoU of objects below by object size, over the objects of all categories."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(sets) + 0.4, 7.2), layout="constrained")
        axes = figure.subplots(2, len(sets), squeeze=False)
        palette, names = colours(results), bin_names(results)
        for column, (heading, networks) in enumerate(sets):
            counts = [0] * len(names)
            for name in drawn(results, networks):
                rows = by_size(results, name, results.categories)
                counts = [max(count, row[0]) for count, row in zip(counts, rows, strict=True)]
                for axis, means in zip(axes[:, column], list(zip(*rows, strict=True))[1:], strict=True):
                    line(means, axis, palette[name], results.label(name), name)
            for axis, up in zip(axes[:, column], ("object recall", "IoU of an object"), strict=True):
                labels = [f"{label}\n{count:,}" for label, count in zip(names, counts, strict=True)]
                axis.set_xticks(range(len(names)), labels)
                axis.set(ylim=(0, 1), ylabel=up, title=heading if up == "object recall" else "")
                axis.grid(alpha=0.3)
            finish(axes[1, column], "object's area in pixels, and how many there are", "IoU of an object", "")
            axes[1, column].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, frameon=False)
    return figure


def line(means: Sequence[Mean], axis: Axes, colour: str, label: str, network: str) -> None:
    """Draws means with their spread as a line; a network without any is left out."""
    values = [mean.value for mean in means]
    if any(math.isfinite(value) for value in values):
        errors = [0 if math.isnan(mean.deviation) else mean.deviation for mean in means]
        axis.errorbar(
            range(len(means)), values, errors, fmt="o-", color=colour, label=label, markersize=3, **emphasis(network)
        )


def sizes_of_categories(results: Results, networks: Sequence[str]) -> Figure:
    """Draws object recall by object size, a small plot a category."""
    with matplotlib.rc_context(STYLE):
        columns = min(4, len(results.categories))
        rows = math.ceil(len(results.categories) / columns)
        figure = Figure(figsize=(2.8 * columns, 2.6 * rows + 0.5), layout="constrained")
        palette, names = colours(results), bin_names(results)
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axis, category in zip(axes.flat, results.categories, strict=False):
            for name in drawn(results, networks):
                found = by_size(results, name, [category])
                line([recall for _, recall, _ in found], axis, palette[name], results.label(name), name)
            axis.set_title(shown(category))
            axis.set_xticks(range(len(names)), names, fontsize=6, rotation=30)
            axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(results.categories) :]:
            axis.set_axis_off()
        handles: dict[str, Any] = {}
        for axis in axes.flat:
            handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
        figure.supylabel("object recall", fontsize=9)
        figure.supxlabel("area of an object, pixels", fontsize=9)
    return figure


def parameters(results: Results) -> Figure:
    """Draws MIoU by parameters on a logarithmic axis: ours, rivals, ablation and tuned forms."""
    with matplotlib.rc_context(STYLE):
        columns = math.ceil(len(results.networks) / 20)
        figure = Figure(figsize=(6.5 + 2.2 * columns, 4.6), layout="constrained")
        axis = figure.subplots()
        palette = colours(results)
        markers = {"ours": "*", "rival": "o", "ablation": "s", "tuning": "^"}
        for name, values in results.networks.items():
            mean = over_categories(results, name, "iou")
            if math.isnan(mean.value) or mean.partial or not values.get("parameters"):
                continue
            size = 12 if values["group"] == "ours" else 5
            error = 0 if math.isnan(mean.deviation) else 100 * mean.deviation
            marker = markers.get(values["group"], "o")
            place = (values["parameters"] / 1e6, 100 * mean.value)
            label = results.label(name)
            hollow: dict[str, Any] = {"markerfacecolor": "none"} if values.get("form") == "paper" else {}
            axis.errorbar(*place, error, fmt=marker, color=palette[name], markersize=size, label=label, **hollow)
        axis.set(xscale="log", xlabel="parameters, millions", ylabel="MIoU, %")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, ncols=columns)
    return figure
