"""Reads what a comparison left (cells/CATEGORY/NETWORK/SEED.json, networks.json) and averages it over seeds and categories."""

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

OURS = "deepskip"
# ours with what was chosen on validation
BEST = "deepskip-best"
# the tuned form on larger images
ENLARGED = "deepskip-enlarged"
Key = tuple[str, str, int]
# from where to where thresholds were tried before cells said so
FIRST_ENDS = (0.05, 0.95)


@dataclass(frozen=True)
class Results:
    """A comparison's cells by (category, network, seed): the whole ones, and the errors of those that failed.

    networks: what networks.json says of each, in its order. categories and seeds: those with any cell.
    """

    folder: Path
    networks: dict[str, dict[str, Any]]
    categories: list[str]
    seeds: list[int]
    cells: dict[Key, dict[str, Any]]
    errors: dict[Key, str]

    def group(self, name: str, form: str | None = None) -> list[str]:
        """Lists the networks of a group, of one form ("paper", "default") where it is given."""
        return [n for n, v in self.networks.items() if v["group"] == name and form in (None, v.get("form"))]

    def label(self, network: str) -> str:
        """Gives a network's name as people read it."""
        return self.networks[network].get("label") or network

    def has(self, network: str) -> bool:
        """Says whether any cell of a network is whole."""
        return any(name == network for _, name, _ in self.cells)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its sample standard deviation (nan for fewer than two seeds); nan where there is no value.

    notes: what is missing from it. partial: it is of fewer categories than were run, so it is not compared with others.
    """

    value: float
    deviation: float = math.nan
    seeds: int = 0
    notes: tuple[str, ...] = ()
    partial: bool = False


def read(folder: Path) -> Results:
    """Reads a comparison's folder; raises ValueError that names the file where one is missing or not what it should be."""
    networks = read_json(folder / "networks.json")
    for name, values in networks.items():
        if "group" not in values:
            raise ValueError(f"{folder / 'networks.json'}: {name} has no group (ours, ablation, rival or tuning)")
    cells: dict[Key, dict[str, Any]] = {}
    errors: dict[Key, str] = {}
    for path in sorted(folder.glob("cells/*/*/*.json")):
        cell = read_json(path)
        category, network = path.parts[-3:-1]
        if network not in networks:
            raise ValueError(f"{path}: {network} is not in {folder / 'networks.json'}")
        if not path.stem.isdigit():
            raise ValueError(f"{path}: its name must be the cell's seed, a number")
        key = (category, network, int(path.stem))
        if cell.get("error"):
            errors[key] = str(cell["error"])
        elif "test" not in cell:
            raise ValueError(f"{path} has neither an error nor test metrics; remove it and run the comparison again")
        else:
            cell["test"]["object_iou"] = object_iou(cell)
            cells[key] = cell
    if not cells:
        raise ValueError(f"{folder / 'cells'} holds no whole cell; run python -m jobs.compare first")
    keys = [*cells, *errors]
    categories, seeds = sorted({key[0] for key in keys}), sorted({key[2] for key in keys})
    return Results(folder, networks, categories, seeds, cells, errors)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises ValueError that names the file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; --cells names the folder that python -m jobs.compare wrote") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def thresholds_of(cell: Mapping[str, Any]) -> tuple[float, float]:
    """Gives the lowest and the highest threshold that a cell chose among; the first cells do not state them."""
    low, high = cell.get("thresholds", FIRST_ENDS)
    return low, high


def object_iou(cell: Mapping[str, Any]) -> float | None:
    """Averages over a cell's objects the IoU of each with the component that overlaps it most; None where there is none."""
    rows = [row for row in cell.get("by_size", []) if row["objects"]]
    objects = sum(row["objects"] for row in rows)
    return sum(row["objects"] * row["iou"] for row in rows) / objects if objects else None


def machine_of(values: Mapping[str, Any]) -> str:
    """Names the machine and precision of a cell, or of a network's costs; nothing where they are not known."""
    return ", ".join(values[key] for key in ("hardware", "precision") if values.get(key))


def number(value: Any) -> float:
    """Gives a JSON number as a float; null is nan, a ratio of nothing to nothing."""
    return math.nan if value is None else float(value)


def by_seed(results: Results, category: str, network: str, metric: str, split: str = "test") -> dict[int, float]:
    """Gives a metric of a category's cells by seed, where it is defined."""
    found = {}
    for seed in results.seeds:
        cell = results.cells.get((category, network, seed))
        if cell and math.isfinite(value := number(cell[split].get(metric))):
            found[seed] = value
    return found


def average(values: Iterable[float]) -> Mean:
    """Gives the mean and the sample standard deviation of values of different seeds."""
    values = list(values)
    if not values:
        return Mean(math.nan)
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def of_category(results: Results, category: str, network: str, metric: str) -> Mean:
    """Averages a test metric of one category over its seeds, with a note for each that is missing."""
    values = by_seed(results, category, network, metric)
    absent = [gap(results, (category, network, seed)) for seed in results.seeds if seed not in values]
    if len(absent) < len(results.seeds):
        gone = [seed for seed in results.seeds if seed not in values]
        notes = tuple(f"without seed {seed}: {why}" for seed, why in zip(gone, absent, strict=True))
    else:
        notes = tuple(dict.fromkeys(absent))
    return replace(average(values.values()), notes=notes)


def gap(results: Results, key: Key) -> str:
    """Says why a cell gives no value."""
    if key in results.errors:
        return f"failed: `{shortened(results.errors[key])}`"
    return "undefined, nothing to divide by" if key in results.cells else "not run"


def shortened(error: str) -> str:
    """Gives the last line of an error, where Python puts what happened, as a table can hold it."""
    lines = error.strip().splitlines() or ["no message"]
    return lines[-1].replace("`", "'").replace("|", "/")[:160]


def block(present: Mapping[str, Iterable[int]]) -> tuple[list[str], list[int]]:
    """Finds categories and seeds of which every pair is there: as many categories as can be, then as many seeds."""
    seeds = sorted({seed for found in present.values() for seed in found})
    sets = {category: set(found) for category, found in present.items()}
    best: tuple[list[str], list[int]] = ([], [])
    for number_of in range(1, len(seeds) + 1):
        for chosen in itertools.combinations(seeds, number_of):
            categories = [category for category, found in sets.items() if found.issuperset(chosen)]
            if categories and (len(categories), number_of) > (len(best[0]), len(best[1])):
                best = (categories, list(chosen))
    return best


def over_categories(results: Results, network: str, metric: str, split: str = "test") -> Mean:
    """Averages a metric over categories, each counting the same, for every seed, and then over seeds.

    Only seeds of which every category is there count; where there is none, as many categories as can be, noted as partial.
    """
    values = {category: by_seed(results, category, network, metric, split) for category in results.categories}
    categories, seeds = block(values)
    if not categories:
        return Mean(math.nan, notes=tuple(whole_gap(results, network)))
    notes = []
    if lost := [category for category in results.categories if category not in categories]:
        notes.append(f"without {', '.join(map(shown, lost))}, so not to be compared")
    if len(seeds) < len(results.seeds):
        notes.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} only: the others lack a category")
    means = [statistics.fmean(values[category][seed] for category in categories) for seed in seeds]
    return replace(average(means), notes=tuple(notes), partial=bool(lost))


def whole_gap(results: Results, network: str) -> list[str]:
    """Says why a network has no value at all."""
    keys = [(category, network, seed) for category in results.categories for seed in results.seeds]
    return [why for why, _ in Counter(gap(results, key) for key in keys).most_common(1)]


def family(network: str) -> str:
    """Gives a rival's name without its width and training: unet of unet-paper, unet-loss, unet-ours, unet-best ..."""
    return re.sub("-(paper|loss|ours|best|enlarged)$", "", network)


def head_as_drawn(results: Results, network: str) -> bool:
    """Tells whether a network's head starts as its code draws it, and not at DeepSkip's foreground probability.

    Older networks.json do not say it; Mask R-CNN, whose loss is its own, has no such head.
    """
    values = results.networks[network]
    return values.get("loss") != "own" and not values.get("prior", values.get("group") != "rival")


def shown(category: str) -> str:
    """Gives a category's name as people read it."""
    return category.replace("_", " ")


def size_bins(results: Results) -> list[tuple[int, int | None]]:
    """Lists the ranges of object areas [from, to) in pixels that the cells use; the last has no end."""
    found = {(row["from"], row["to"]) for cell in results.cells.values() for row in cell.get("by_size", [])}
    return sorted(found, key=lambda edges: (edges[0], math.inf if edges[1] is None else edges[1]))


def bin_names(results: Results) -> list[str]:
    """Names the ranges of object sizes in pixels: <16, 16–63, ≥64."""
    names = []
    for start, end in size_bins(results):
        names.append(f"≥{start}" if end is None else f"<{end}" if start == 0 else f"{start}–{end - 1}")
    return names


def by_size(results: Results, network: str, categories: Iterable[str]) -> list[tuple[int, Mean, Mean]]:
    """Gives for each of `size_bins` the number of objects, the share found, and the mean IoU of an object.

    Objects of all the categories count alike; a seed of which a category is missing does not count.
    """
    categories = list(categories)
    rows = []
    for edges in size_bins(results):
        found = rows_by_seed(results, network, categories, edges)
        objects = [sum(row["objects"] for row in of_seed) for of_seed in found.values()]
        ious = [
            sum(row["objects"] * number(row["iou"]) for row in of_seed) / count
            for of_seed, count in zip(found.values(), objects, strict=True)
        ]
        recall = average(recalls(results, network, categories, edges).values())
        rows.append((objects[-1] if objects else 0, recall, average(value for value in ious if math.isfinite(value))))
    return rows


def recalls(
    results: Results, network: str, categories: Iterable[str], edges: tuple[int, int | None]
) -> dict[int, float]:
    """Gives by seed the share found of the objects of a range of areas, all the categories together."""
    found = rows_by_seed(results, network, categories, edges)
    return {
        seed: sum(row["found"] for row in rows) / sum(row["objects"] for row in rows) for seed, rows in found.items()
    }


def rows_by_seed(
    results: Results, network: str, categories: Iterable[str], edges: tuple[int, int | None]
) -> dict[int, list[dict[str, Any]]]:
    """Gives by seed the rows of a range of areas that have objects, of the seeds that have every category."""
    found = {}
    for seed in results.seeds:
        cells = [results.cells.get((category, network, seed), {}) for category in categories]
        if all("by_size" in cell for cell in cells):
            rows = [row for cell in cells for row in cell["by_size"] if (row["from"], row["to"]) == edges]
            if kept := [row for row in rows if row["objects"]]:
                found[seed] = kept
    return found
