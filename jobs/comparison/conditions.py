"""The words on how a comparison was run: the grid, its budget, machines, trainings and thresholds; Markdown."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from deepskip.flips import MIRRORINGS
from jobs.comparison.results import Results, head_as_drawn, machine_of, shortened, shown, thresholds_of
from jobs.comparison.rows import TRAINING, Row
from jobs.comparison.tables import grid

LOSSES = {"bce_dice": "BCE + Dice", "cross_entropy": "cross-entropy", "own": "its own"}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
# what networks.json does not state was so
USUAL = Row("", "rival")


def cost_text(results: Results) -> str:
    """Says what the numbers of the table of costs are of."""
    sides = listed(dict.fromkeys(v["image_size"] for v in results.networks.values() if v.get("image_size")))
    machines = "; ".join(dict.fromkeys(filter(None, map(machine_of, results.networks.values()))))
    size = f" and {sides} pixels a side" if sides else ""
    flipped = [
        results.label(name)
        for name, values in results.networks.items()
        if values.get("test_flips") and results.has(name)
    ]
    passes = f"{', '.join(flipped)} took {len(MIRRORINGS)} in test, of the image's mirrorings"
    return (
        f"GFLOPs and time of one image of 3 bands{size}, by itself; memory of a training step of the grid's batch, where "
        f"it is a GPU's{f'; on {machines}' if machines else ''}. They are measured once and briefly, memory beside other work: "
        f"small differences say nothing.{f' Operations and time are of one pass; {passes}.' if flipped else ''}"
    )


def counted_as(number: int, one: str, many: str) -> str:
    """Puts a number before what it counts."""
    return f"{number:,} {one if number == 1 else many}"


def values_of(results: Results, key: str) -> list[Any]:
    """Lists the different values of something that every whole cell states, commonest first."""
    return [value for value, _ in Counter(cell.get(key) for cell in results.cells.values()).most_common() if value]


def listed(values: Iterable[Any]) -> str:
    """Joins values with commas; large whole numbers get theirs too."""
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def machines_text(results: Results) -> str:
    """Lists the machines and precisions that cells ran in, with the number of cells where they are several."""
    machines = Counter(machine_of(cell) for cell in results.cells.values() if cell.get("hardware"))
    if len(machines) == 1:
        return listed(machines)
    return "; ".join(f"{name}: {counted_as(cells, 'cell', 'cells')}" for name, cells in machines.most_common())


def mixed_text(results: Results) -> str:
    """Lists, where cells ran on several machines, whose ran on all but the commonest."""
    found: dict[str, Counter[str]] = {}
    for (_, network, _), cell in results.cells.items():
        found.setdefault(machine_of(cell), Counter())[results.label(network)] += 1
    others = sorted(found, key=lambda name: -found[name].total())[1:]
    lines = [f"{name}: {', '.join(f'{label} {cells}' for label, cells in found[name].items())}." for name in others]
    return f"Cells elsewhere than most: {' '.join(lines)}\n\n" if lines else ""


def run_text(results: Results) -> str:
    """Says what was run: the grid, its budget, the machine, the command, and what is missing from it."""
    total = len(results.networks) * len(results.categories) * len(results.seeds)
    missing = total - len(results.cells) - len(results.errors)
    seconds = sum(float(cell.get("seconds") or 0) for cell in results.cells.values())
    rows = [
        ["cells", f"{len(results.cells):,} whole, {len(results.errors):,} failed, {missing:,} not run, of {total:,}"],
        ["networks", f"{len(results.networks)}"],
        ["categories", listed(map(shown, results.categories))],
        ["seeds", listed(results.seeds)],
        ["steps a cell", listed(values_of(results, "steps"))],
        ["batch", listed(values_of(results, "batch_size"))],
        ["samples seen a cell", listed(values_of(results, "train_samples_seen"))],
        ["image side, pixels", listed(values_of(results, "image_size"))],
        ["hardware", machines_text(results)],
        ["torch", listed(values_of(results, "torch"))],
        [
            "time of all cells, added up, several at once",
            f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min",
        ],
    ]
    text = grid(["what", ""], [row for row in rows if row[1]], words=2)
    commands = "\n".join(str(command) for command in values_of(results, "command"))
    if commands:
        text += f"\n```\n{commands}\n```\n"
    return text + "\n" + mixed_text(results) + rates_text(results) + last_text(results) + failed_text(results)


def apart_link(results: Results, other: Results | None, page: str | None) -> str:
    """Leads to the page of a grid of its own."""
    if other is None or page is None:
        return ""
    return (
        f"\nAnother grid, of {budget_text(other)}, seeds {listed(other.seeds)}, has "
        f"[a page of its own]({page}): {counted_as(len(other.cells), 'cell', 'cells')} of "
        f"{counted_as(len(other.networks), 'network', 'networks')}; {machines_text(other)}."
        f"{''.join(f' {text}' for text in otherwise_texts(results, other))}\n"
    )


def otherwise_texts(results: Results, other: Results) -> list[str]:
    """Says which networks of one name two grids train or test otherwise, of those that both have cells of."""
    found = []
    for name in results.networks:
        if (
            results.has(name)
            and other.has(name)
            and (there := way_text(other, name)) != (here := way_text(results, name))
        ):
            found.append(f"Its {other.label(name)} is of {there}; here of {here}.")
    return found


def rates_text(results: Results) -> str:
    """Says which optimizer at which learning rate trained which networks."""
    found: dict[str, list[str]] = {}
    for name, values in results.networks.items():
        if values.get("optimizer"):
            way = f"{OPTIMIZERS[values['optimizer']]} at {values['learning_rate']:g}"
            found.setdefault(way, []).append(results.label(name))
    if not found:
        return ""
    most, *others = sorted(found, key=lambda way: -len(found[way]))
    ways = [f"{way}: {', '.join(found[way])}." for way in others] + [f"{most}: all others."]
    return (
        f"{' '.join(ways)} These are the config's; what suits one network may not suit another. Whose were looked "
        f"for is in [compare.md](../compare.md). {''.join(heads_texts(results))}".rstrip()
        + "\n\n"
    )


def heads_texts(results: Results) -> list[str]:
    """Names the networks whose heads start as their code draws them."""
    drawn = [results.label(name) for name in results.networks if head_as_drawn(results, name)]
    return drawn and [
        f"Heads start as their code draws them, mostly at a foreground probability of 0.5 and not 0.1, in {', '.join(drawn)}: "
        "in trainings as short as these that costs points; how many, by which loss and optimizer, is in "
        "[compare.md](../compare.md)."
    ]


def last_text(results: Results) -> str:
    """Says in how many cells validation was still rising at the end, and in how many the threshold is at its bound."""
    cells = [cell for cell in results.cells.values() if cell.get("best_step") is not None]
    if not cells:
        return ""
    late = sum(cell["best_step"] > 0.9 * cell["steps"] for cell in cells)
    ends = Counter(map(thresholds_of, cells))
    words = " or ".join(
        f"{low:.2g} to {high:.4g} ({counted_as(n, 'cell', 'cells')})" for (low, high), n in ends.most_common()
    )
    usual = ends.most_common(1)[0][0]
    others = dict.fromkeys(results.label(key[1]) for key, cell in results.cells.items() if thresholds_of(cell) != usual)
    words += f", the latter for {', '.join(others)}" if len(ends) == 2 else ""
    at_end: Counter[str] = Counter()
    for (_, network, _), cell in results.cells.items():
        low, high = thresholds_of(cell)
        at_end[results.label(network)] += not low + 1e-6 < cell["threshold"] < high - 1e-6
    whose = "; ".join(f"{label} {number}" for label, number in at_end.most_common() if number)
    return (
        "Tested are the weights of the best validation IoU, with the threshold that is best on validation. In "
        f"{late:,} of {len(cells):,} cells those are of the last tenth of the steps: more steps might take them further, and "
        f"few steps from random weights favour networks that start fast. Thresholds were tried from {words}. In "
        f"{counted_as(at_end.total(), 'cell', 'cells')} it is the lowest or the highest{f' ({whose})' if whose else ''}: with "
        "others these might reach more, and a recall that comes of marking all that is over the lowest is no merit. The test "
        "split was read once a cell.\n"
    )


def failed_text(results: Results) -> str:
    """Lists the cells that failed."""
    if not results.errors:
        return ""
    lines = [
        f"* {shown(category)}, {results.label(network)}, seed {seed}: `{shortened(error)}`"
        for (category, network, seed), error in sorted(results.errors.items())
    ]
    more = [f"* and {len(lines) - 20} more, in [cells.csv](cells.csv)"] if len(lines) > 20 else []
    return "\nCells that failed:\n\n" + "\n".join([*lines[:20], *more]) + "\n"


def budget_text(results: Results) -> str:
    """Says how large images were and how long cells trained; most of the images, as some scenes are no larger than they are."""
    sides, steps = values_of(results, "image_size"), listed(values_of(results, "steps"))
    return f"{max(sides)} pixels and {steps} steps" if sides else f"{steps} steps"


def way_of(results: Results, network: str) -> tuple[Any, ...]:
    """Gives what makes two trainings alike."""
    usual = asdict(USUAL)
    return head_as_drawn(results, network), *(results.networks[network].get(key, usual[key]) for key in TRAINING)


def way_text(results: Results, network: str) -> str:
    """Says how a network was trained and tested: loss, optimizer with its rate, augmentation, images' size, flips, head."""
    values = results.networks[network]
    words = [LOSSES.get(values.get("loss", "")), OPTIMIZERS.get(values.get("optimizer", ""))]
    if words[1] and values.get("learning_rate"):
        words[1] += f" at {values['learning_rate']:g}"
    if values.get("momentum", USUAL.momentum) != USUAL.momentum and values.get("optimizer") == "muon":
        words.append(f"momentum {values['momentum']:g}")
    if values.get("copy_paste"):
        words.append("copy-paste")
    times = values.get("enlarge", USUAL.enlarge)
    own = {
        shown(c): v["enlarge"] for c, v in (values.get("by_category") or {}).items() if v.get("enlarge", times) != times
    }
    if own or times != USUAL.enlarge:
        exceptions = ", ".join(f"{category} {number}" for category, number in own.items())
        words.append(f"images enlarged {times} times{f' ({exceptions})' if own else ''}")
    if values.get("test_flips"):
        words.append("flips at test")
    if head_as_drawn(results, network):
        words.append("head as drawn")
    return ", ".join(word for word in words if word)
