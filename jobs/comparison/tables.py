"""The comparison's tables, in the shape of the paper's: Markdown to read and CSV to go on with."""

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.comparison.results import (
    Mean,
    Results,
    by_size,
    machine_of,
    number,
    of_category,
    over_categories,
    shown,
    size_bins,
)

# how a column prints its numbers: factor and decimals
FORMS = {
    "percent": (100.0, 1),
    "alarms": (1.0, 2),
    "million": (1e-6, 2),
    "gflops": (1.0, 1),
    "milliseconds": (1e3, 1),
    "GiB": (2.0**-30, 2),
}
SCORES = (
    ("PA", "pixel_accuracy", "percent", max),
    ("P", "precision", "percent", max),
    ("R", "recall", "percent", max),
    ("F1", "f1", "percent", max),
    ("IoU with background", "miou", "percent", max),
    ("object recall", "object_recall", "percent", max),
    ("IoU of an object", "object_iou", "percent", max),
    ("false alarms an image", "false_alarms_per_image", "alarms", min),
)
# what a cell measures on a split; an object's IoU is worked out from its objects by size, which are of the test split
METRICS = ("iou", *(metric for _, metric, _, _ in SCORES if metric != "object_iou"))
CELL_KEYS = (
    "steps",
    "batch_size",
    "train_samples_seen",
    "best_step",
    "threshold",
    "thresholds",
    "seconds",
    "parameters",
    "hardware",
    "precision",
)


@dataclass(frozen=True)
class Column:
    """A column of numbers: its heading, its form (a key of FORMS), and which of its numbers is best (max, min or none)."""

    heading: str
    form: str
    best: Any = None


@dataclass(frozen=True)
class Table:
    """A table of means: a label and a Mean a column for each row. name: the stem of its CSV file."""

    name: str
    title: str
    columns: list[Column]
    rows: list[tuple[str, list[Mean]]]


def blocks(results: Results) -> list[tuple[str, str, list[str]]]:
    """Lists the sets of networks that stand in one table: (stem, heading, networks)."""
    ours = results.group("ours")
    rivals = results.group("rival")
    sets = (
        ("paper", "rivals at the paper's widths", [n for n in rivals if results.networks[n].get("form") == "paper"]),
        ("default", "rivals at default widths", [n for n in rivals if results.networks[n].get("form") == "default"]),
    )
    found = [(stem, heading, ours + networks) for stem, heading, networks in sets if networks]
    if ablation := results.group("ablation"):
        found.append(("ablation", "the paper's ablation", ablation))
    return found


def category_table(results: Results, networks: Sequence[str], metric: str, name: str, title: str) -> Table:
    """Makes a table of a metric by category, with its mean over categories, and the parameters."""
    mean = "MIoU" if metric == "iou" else "mean"
    columns = [Column(shown(category), "percent", max) for category in results.categories]
    columns += [Column(mean, "percent", max), Column("parameters, M", "million")]
    rows = []
    for network in networks:
        values = [of_category(results, category, network, metric) for category in results.categories]
        values += [over_categories(results, network, metric), known(results, network, "parameters")]
        rows.append((results.label(network), values))
    return Table(name, title, columns, rows)


def scores_table(results: Results, networks: Sequence[str], name: str, title: str) -> Table:
    """Makes the table of pixel and object scores, means over categories."""
    columns = [Column(heading, form, best) for heading, _, form, best in SCORES]
    rows = [(results.label(n), [over_categories(results, n, metric) for _, metric, _, _ in SCORES]) for n in networks]
    return Table(name, title, columns, rows)


def cost_table(results: Results) -> Table:
    """Makes the table of what each network costs, beside the paper's count of parameters."""
    columns = [
        Column("parameters, M", "million"),
        Column("the paper's, M", "million"),
        Column("deviation, %", "percent"),
        Column("GFLOPs", "gflops"),
        Column("ms an image", "milliseconds"),
        Column("peak memory, GiB", "GiB"),
        Column("MIoU", "percent", max),
    ]
    keys = ("parameters", "paper_parameters", "gflops", "seconds_per_image", "peak_memory_bytes")
    rows = []
    networks = [*results.group("ours"), *results.group("ablation"), *results.group("rival")]
    machines = Counter(machine for name in networks if (machine := machine_of(results.networks[name])))
    usual = machines.most_common(1)[0][0] if machines else None
    for network in networks:
        count, paper, gflops, *times = (known(results, network, key) for key in keys)
        if (machine := machine_of(results.networks[network])) not in ("", usual):
            # no time or memory to be compared with the others'
            times = [replace(mean, notes=(f"on {machine}",)) for mean in times]
        rest = [gflops, *times]
        deviation = Mean(count.value / paper.value - 1)
        rows.append(
            (results.label(network), [count, paper, deviation, *rest, over_categories(results, network, "iou")])
        )
    return Table("table-4-cost", "Table 4: parameters, time, memory", columns, rows)


def known(results: Results, network: str, key: str) -> Mean:
    """Gives a number of networks.json as a table's cell."""
    return Mean(number(results.networks[network].get(key)))


def all_tables(results: Results) -> list[Table]:
    """Makes every table of means, in the page's order."""
    sets = blocks(results)
    tables = []
    for stem, heading, networks in sets:
        which = "table-2-ablation" if stem == "ablation" else f"table-1-iou-{stem}"
        title = f"Table {2 if stem == 'ablation' else 1}: IoU, %: {heading}"
        tables.append(category_table(results, networks, "iou", which, title))
    for stem, heading, networks in sets:
        title = f"Table 3: means over categories, %: {heading}"
        tables.append(scores_table(results, networks, f"table-3-scores-{stem}", title))
    tables.append(cost_table(results))
    for stem, heading, networks in sets:
        title = f"Table 5: object recall, %: {heading}"
        tables.append(category_table(results, networks, "object_recall", f"table-5-objects-{stem}", title))
    return tables


def to_markdown(table: Table) -> str:
    """Writes a table as Markdown: mean ± standard deviation, a column's best of several seeds in bold, footnotes below."""
    notes: dict[str, str] = {}
    best = [best_text([row[1][i] for row in table.rows], column) for i, column in enumerate(table.columns)]
    rows = []
    for label, means in table.rows:
        cells = [label]
        for i, (mean, column, top) in enumerate(zip(means, table.columns, best, strict=True)):
            text = with_deviation(mean, column)
            lucky = mean.seeds == 1 and any(row[1][i].seeds > 1 for row in table.rows)
            if top is not None and compared(mean) and not lucky and printed(mean.value, column) == top:
                text = f"**{text}**"
            cells.append(text + marks(mean.notes, notes))
        rows.append(cells)
    below = "\n".join(f"<sup>{mark}</sup> {note}  " for note, mark in notes.items())
    return grid(["network", *(column.heading for column in table.columns)], rows) + (f"\n{below}\n" if below else "")


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Writes a Markdown table; the first `words` columns hold words, the others numbers, which stand to the right."""
    rule = ["---"] * words + ["---:"] * (len(headings) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rule, *rows)) + "\n"


def marks(found: Sequence[str], notes: dict[str, str]) -> str:
    """Gives the marks of a cell's notes; the same note has the same letter in a table."""
    for note in found:
        notes.setdefault(note, letters(len(notes)))
    return f"<sup>{' '.join(notes[note] for note in found)}</sup>" if found else ""


def letters(index: int) -> str:
    """Names footnotes a, b, ... z, aa, ab, ..."""
    first, last = divmod(index, 26)
    return (letters(first - 1) if first else "") + "abcdefghijklmnopqrstuvwxyz"[last]


def printed(value: float, column: Column) -> str:
    """Gives a number as the column prints it."""
    factor, decimals = FORMS[column.form]
    return minus(f"{factor * value:.{decimals}f}")


def minus(text: str) -> str:
    """Writes a number's minus as wide as its plus."""
    return text.replace("-", "−")


def with_deviation(mean: Mean, column: Column) -> str:
    """Gives a cell's text: mean ± deviation, the mean alone where one seed has no spread, or a dash."""
    if math.isnan(mean.value):
        return "–"
    text = printed(mean.value, column)
    return text if math.isnan(mean.deviation) else f"{text} ± {printed(mean.deviation, column)}"


def best_text(means: Sequence[Mean], column: Column) -> str | None:
    """Gives the best number of a column as printed, None where nothing is compared.

    One seed's luck is no best beside means of several, unless all have one.
    """
    several = any(mean.seeds > 1 for mean in means)
    values = [mean.value for mean in means if compared(mean) and (not several or mean.seeds > 1)]
    return printed(column.best(values), column) if column.best and len(values) > 1 else None


def compared(mean: Mean) -> bool:
    """Says whether a mean stands beside others: it has a value, and of all categories."""
    return not mean.partial and not math.isnan(mean.value)


def to_csv(table: Table) -> str:
    """Writes a table as CSV, in the printed units: for each column its mean, and its deviation where it has one."""
    spread = [any(not math.isnan(row[1][i].deviation) for row in table.rows) for i in range(len(table.columns))]
    heading = ["network"]
    for column, has in zip(table.columns, spread, strict=True):
        heading += [column.heading, f"{column.heading} ±"] if has else [column.heading]
    rows = []
    for label, means in table.rows:
        cells = [label]
        for mean, column, has in zip(means, table.columns, spread, strict=True):
            factor = FORMS[column.form][0]
            cells += [exact(factor * value) for value in (mean.value, mean.deviation)[: 1 + has]]
        rows.append(cells)
    return csv_text(heading, rows)


def exact(value: float) -> str:
    """Gives a number for CSV; nothing for nan."""
    return "" if math.isnan(value) else f"{value:.6g}"


def csv_text(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Writes CSV with line feeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([heading, *rows])
    return text.getvalue()


def cells_csv(results: Results) -> str:
    """Writes every cell of the grid: whole, failed and missing ones, fractions as they were measured."""
    splits = [(split, metric) for split in ("validation", "test") for metric in METRICS]
    splits.append(("test", "object_iou"))
    heading = ["category", "network", "seed", "state", *CELL_KEYS, *(f"{split} {metric}" for split, metric in splits)]
    rows = []
    for category in results.categories:
        for network in results.networks:
            for seed in results.seeds:
                key = (category, network, seed)
                cell = results.cells.get(key, {})
                state = "whole" if cell else results.errors.get(key, "not run")
                values = [number(cell.get(split, {}).get(metric)) for split, metric in splits]
                known_values = [cell.get(name, "") for name in CELL_KEYS]
                rows.append([*key, state, *known_values, *map(exact, values)])
    return csv_text(heading, rows)


def sizes_csv(results: Results) -> str:
    """Writes object recall and IoU by object size, for every network, category and for all categories together."""
    heading = ["category", "network", "area from", "area to", "objects", "recall", "recall ±", "IoU", "IoU ±"]
    rows = []
    sets = [(category, [category]) for category in results.categories] + [("all", results.categories)]
    for name, categories in sets:
        for network in results.networks:
            found = by_size(results, network, categories)
            for (start, end), (objects, recall, iou) in zip(size_bins(results), found, strict=True):
                if objects:
                    numbers = map(exact, (recall.value, recall.deviation, iou.value, iou.deviation))
                    rows.append([name, network, start, "" if end is None else end, objects, *numbers])
    return csv_text(heading, rows)
