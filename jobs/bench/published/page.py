"""Draw the results of the published benchmarks: a table, and a figure of IoU by parameters."""

import csv
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deepskip.jobs.bench.published.runs import METRICS, RECIPES, Row, read_rows

ROOT = Path(__file__).parents[3]
PAGE, FOLDER = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"
RUNS, PUBLISHED, FIGURE = FOLDER / "runs.csv", FOLDER / "published.csv", FOLDER / "iou.svg"
SET_NAMES = {"nudt_sirst": "NUDT-SIRST, 663 / 664", "sirst_v1": "SIRST-v1, 213 / 214"}
LABELS = {
    "deepskip": "DeepSkip",
    "plain_unet": "DeepSkip without deep skips",
    "unet": "MONAI's U-Net",
    "acm": "ACM, trained here",
    "branched": "DeepSkip with branches that fold",
    "distilled": "DeepSkip distilled from MONAI's U-Net",
}
# by what is shown of our runs: the parts of the data, and how they are named
SHOWN_PARTS = {"official": "", "distinct": ", no near-duplicates"}


def groups(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Return the runs that the page shows, by label and training part and by set.

    Of several recipes for the same set, part and network, the one of the last row counts.

    Args:
        rows: rows of the CSV, oldest first.
    """
    latest: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        place = (row["set"], row["part"], row["network"], row["model"])
        before = latest.get(place, [])
        latest[place] = [*(each for each in before if each["recipe"] == row["recipe"]), row]
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for (name, part, network, model), members in latest.items():
        if part in SHOWN_PARTS:
            settings = "" if model == "{}" else f" {model}"
            label = f"{LABELS.get(network, network)}{settings}{SHOWN_PARTS[part]}"
            found.setdefault((label, members[0]["parameters"]), {})[name] = members
    return found


def results(rows: Sequence[Row]) -> str:
    """Return the table as Markdown: our runs, then the published ones, each by parameters.

    Args:
        rows: rows of the CSV of our runs.
    """
    names = [f"{name}: IoU / nIoU / Pd / Fa" for name in SET_NAMES.values()]
    lines = [
        f"| network | parameters | runs on each set | {' | '.join(names)} | protocol |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for (label, parameters), by_set in sorted(groups(rows).items(), key=lambda item: int(item[0][1])):
        cells = [ours(by_set.get(name, [])) for name in SET_NAMES]
        seeds = " / ".join(str(len(by_set.get(name, []))) for name in SET_NAMES)
        protocol = "A" if label == LABELS["acm"] else "ours"
        lines.append(f"| **{label}** | {int(parameters) / 1e6:.2f} M | {seeds} | {' | '.join(cells)} | {protocol} |")
    published = read_published()
    for network in dict.fromkeys(row["network"] for row in published):
        own = {row["set"]: row for row in published if row["network"] == network}
        first = next(iter(own.values()))
        cells = [theirs(own.get(name)) for name in SET_NAMES]
        size = f"{int(first['parameters']) / 1e6:.2f} M" if first["parameters"] else "-"
        lines.append(f"| {network} | {size} | - | {' | '.join(cells)} | {first['protocol']} |")
    return "\n".join(lines)


def trials(rows: Iterable[Row], recipes: Path) -> str:
    """Return the trials of recipes as Markdown, the mean over seeds of each, with what differs from the set's first one.

    Args:
        rows: rows of the CSV of our runs.
        recipes: folder of their recipes.
    """
    lines = ["| set | differs in | steps | seeds | IoU / nIoU / Pd / Fa |", "|---|---|---:|---:|---:|"]
    first: dict[str, dict[str, Any]] = {}
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["part"] == "search":
            found.setdefault(tuple(row[name] for name in ("set", "network", "recipe", "steps")), []).append(row)
    for row, *others in found.values():
        own = json.loads((recipes / f"{row['recipe']}.json").read_text())
        base = first.setdefault(row["set"], own)
        changed = [
            f"`{key}: {own.get(key, 'off')}`" for key in sorted(own.keys() | base) if own.get(key) != base.get(key)
        ]
        differs = ", ".join(changed) or "-"
        network = "" if row["network"] == "deepskip" else f"{LABELS.get(row['network'], row['network'])}: "
        lines.append(
            f"| {SET_NAMES[row['set']].partition(',')[0]} | {network}{differs} | {row['steps']} "
            f"| {1 + len(others)} | {ours([row, *others])} |"
        )
    return "\n".join(lines)


def ours(members: Sequence[Row]) -> str:
    """Return the mean of each metric over seeds, with the standard deviation of the IoU.

    Args:
        members: runs of one network on one set.
    """
    if not members:
        return "-"
    iou, niou, pd, fa = (mean(members, name) for name in METRICS)
    spread = f" ± {100 * deviation(members):.1f}" if len(members) > 1 else ""
    return f"{100 * iou:.1f}{spread} / {100 * niou:.1f} / {100 * pd:.1f} / {1e6 * fa:.1f}"


def theirs(row: Row | None) -> str:
    """Return the metrics of a published row; nIoU is not among them."""
    return "-" if row is None else f"{row['iou']} / - / {row['pd']} / {row['fa']}"


def mean(members: Sequence[Row], metric: str) -> float:
    """Return the mean of a metric over runs."""
    return statistics.fmean(float(row[metric]) for row in members)


def deviation(members: Sequence[Row]) -> float:
    """Return the standard deviation of the IoU over two or more runs."""
    return statistics.stdev(float(row["iou"]) for row in members)


def read_published() -> list[Row]:
    """Return the published rows; IoU and Pd are in percent, Fa in millionths."""
    with PUBLISHED.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw IoU by parameters, with published points and our means and standard deviations.

    Args:
        rows: rows of the CSV of our runs.
        path: SVG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    published = read_published()
    # A fixed salt, so that the same numbers make the same file.
    with mpl.rc_context({"svg.hashsalt": "published", "font.size": 8}):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for axis, (name, title) in zip(axes, SET_NAMES.items(), strict=True):
            for row in published:
                if row["set"] == name and row["parameters"]:
                    point(axis, int(row["parameters"]), float(row["iou"]), 0.0, row["network"], "0.45")
            # The part without near-duplicates is a check, in the table alone: its point would cover that of the other.
            shown = [row for row in rows if row["part"] == "official"]
            for (label, parameters), by_set in groups(shown).items():
                if members := by_set.get(name):
                    error = 100 * deviation(members) if len(members) > 1 else 0.0
                    point(axis, int(parameters), 100 * mean(members, "iou"), error, label, "#d55e00")
            axis.set(xscale="log", xlabel="parameters", ylabel="IoU, %", title=title)
            axis.margins(x=0.25, y=0.12)
            axis.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def point(axis: Any, parameters: int, iou: float, error: float, label: str, colour: str) -> None:
    """Draw a point with its error bar and its name.

    Args:
        axis: matplotlib's axes.
        parameters: number of parameters.
        iou: IoU in percent.
        error: standard deviation in percentage points; 0 draws no bar.
        label: name of the network.
        colour: of the point.
    """
    axis.errorbar(parameters, iou, error or None, fmt="o", color=colour, markersize=4, capsize=3)
    axis.annotate(label, (parameters, iou), xytext=(4, 4), textcoords="offset points", fontsize=6, color=colour)


def filled(page: str, rows: Sequence[Row]) -> str:
    """Return the page with its tables replaced: what is between <!-- results --> or <!-- trials --> and <!-- end -->.

    Raises:
        ValueError: if the page does not have one place for each.
    """
    for name, table in (("results", results(rows)), ("trials", trials(rows, FOLDER / RECIPES))):
        text = table.replace("\\", r"\\")
        page, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\1\n{text}\n\n\2", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for the {name}; it must have one")
    return page


def write(table: Path, out: Path | None) -> list[Path]:
    """Write the table and the figure, and return their paths.

    Args:
        table: CSV of our runs.
        out: folder for results.md and iou.svg; None puts the table into PAGE and the figure at FIGURE.
    """
    rows = read_rows(table)
    if out is None:
        PAGE.write_text(filled(PAGE.read_text(), rows))
        draw(rows, FIGURE)
        return [PAGE, FIGURE]
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(f"{results(rows)}\n")
    draw(rows, out / "iou.svg")
    return [out / "results.md", out / "iou.svg"]
