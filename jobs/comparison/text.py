"""The words of the comparison's page: what was run, what came out, what became of the claims; Markdown."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from jobs.comparison.claims import (
    CONTRADICTIONS,
    HELD,
    NOT_HELD,
    UNKNOWN,
    ablation_rows,
    best,
    chosen_form,
    million,
    parameters_text,
    reach_text,
    rivals_rows,
    sizes_rows,
    spread,
    tally,
    the_five,
    tuning_rows,
    verdict_of,
    widths_text,
)
from jobs.comparison.results import OURS, Results, family, over_categories, shortened, shown
from jobs.comparison.tables import grid

ABLATION = "ablation-both"
LOSSES = {"bce_dice": "BCE + Dice", "cross_entropy": "cross-entropy", "own": "its own"}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
TALLIES = {HELD: "It is ahead of", NOT_HELD: "It is behind", UNKNOWN: "Which is ahead cannot be told for"}
RIVAL_HEADINGS = (
    "against",
    "ahead of it",
    "difference, points",
    "ahead in pairs",
    "MIoU, %",
    "its MIoU, %",
    "object recall, points",
    "by category, from ... to",
    "its parameters",
)


def cost_text(results: Results) -> str:
    """Says what the numbers of the table of costs are of."""
    sides = listed(values_of(results, "image_size"))
    machines = listed(dict.fromkeys(v["hardware"] for v in results.networks.values() if v.get("hardware")))
    return (
        f"GFLOPs and time of one image of 3 bands and {sides} pixels a side, by itself; memory of a training step of the "
        f"grid's batch{f'; on {machines}' if machines else ''}."
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
    machines = Counter(
        ", ".join(cell[key] for key in ("hardware", "precision") if cell.get(key))
        for cell in results.cells.values()
        if cell.get("hardware")
    )
    if len(machines) == 1:
        return listed(machines)
    return "; ".join(f"{name}: {counted_as(cells, 'cell', 'cells')}" for name, cells in machines.most_common())


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
        ["time of all cells, added up", f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"],
    ]
    text = grid(["what", ""], [row for row in rows if row[1]], words=2)
    commands = "\n".join(str(command) for command in values_of(results, "command"))
    if commands:
        text += f"\n```\n{commands}\n```\n"
    return text + "\n" + rates_text(results) + last_text(results) + failed_text(results)


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
    return f"{' '.join(ways)} These are the config's; what suits one network may not suit another.\n\n"


def last_text(results: Results) -> str:
    """Says in how many cells validation was still rising at the end."""
    last, known = 0, 0
    for cell in results.cells.values():
        points = cell.get("curves", {}).get("validation", [])
        if points and cell.get("best_step") is not None:
            known += 1
            last += cell["best_step"] >= max(point["step"] for point in points)
    if not known:
        return ""
    return (
        "Tested are the weights of the best validation IoU, with the threshold that is best on validation. In "
        f"{last:,} of {known:,} cells that was the last validation: more steps might take those further. The test split "
        "was read once a cell.\n"
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


def short_text(results: Results) -> str:
    """Says what came out, in a few lines."""
    lines = []
    rival = best(results, results.group("rival"), "iou")
    objects = best(results, results.group("rival"), "object_recall")
    ours = over_categories(results, OURS, "iou"), over_categories(results, OURS, "object_recall")
    count = million(results.networks[OURS].get("parameters"))
    lines.append(
        f"* {results.label(OURS)} ({count}): MIoU {spread(ours[0])} %, object recall {spread(ours[1])} % over "
        f"{counted_as(len(results.categories), 'category', 'categories')}."
    )
    for name, metric, words in ((rival, "iou", "MIoU"), (objects, "object_recall", "object recall")):
        if name:
            value = spread(over_categories(results, name, metric))
            size = million(results.networks[name].get("parameters"))
            lines.append(f"* The rival with the highest {words}: {results.label(name)} ({size}), {value} %.")
    five = the_five(results)
    for name in claimants(results) if five else []:
        found, whole = tally(results, name, five), tally(results, name, results.group("rival"))
        lines.append(
            f'* "Beats the paper\'s {len(five)} rivals in MIoU", {named(results, name)}: **{verdict_of(found)}**; '
            f"{counted(found)}. Of all {len(results.group('rival'))} forms of rivals: {counted(whole)}."
        )
    for size, verdict, objects, own, other, rival in sizes_rows(results)[:1]:
        lines.append(
            f'* "Finds more of the smallest objects" ({size} pixels, {objects} objects): {verdict}; {own} % against '
            f"{other} % of {rival}."
        )
    for claim, verdict, *_ in ablation_rows(results)[:3]:
        lines.append(f'* "{claim[0].upper()}{claim[1:]}": {verdict}.')
    lines.append(f"* {parameters_text(results)}")
    return "\n".join(lines) + "\n"


def counted(tallied: dict[str, list[str]]) -> str:
    """Counts what is behind, ahead and undecided."""
    return f"ahead of {len(tallied[HELD])}, behind {len(tallied[NOT_HELD])}, cannot be told for {len(tallied[UNKNOWN])}"


def named(results: Results, network: str) -> str:
    """Names a form of ours so that it is known for one."""
    label = results.label(network)
    return f'the ablation\'s "{label}"' if results.networks[network]["group"] == "ablation" else label


def claimants(results: Results) -> list[str]:
    """Lists the forms of ours that the paper's claim is put to: as we train it, and as the ablation does."""
    return [name for name in (OURS, ABLATION) if name in results.networks and results.has(name)]


def claims_text(results: Results) -> str:
    """Says claim by claim which of the paper's held."""
    seeds = len(results.seeds)
    parts = [
        "Two networks are compared on the cells that both have, paired by category and seed; a difference is a mean over "
        "categories, ± its standard deviation over seeds. A claim **held** or **did not hold** where the two means "
        "± their standard deviations do not overlap; else it **cannot be told**. "
        + ("With one seed there is no spread, and nothing can be told." if seeds < 2 else f"There are {seeds} seeds: ")
        + ("" if seeds < 2 else "small differences need more."),
    ]
    for name in claimants(results):
        loss = results.networks[name].get("loss")
        words = f" (loss: {LOSSES.get(loss, loss)})" if loss else ""
        parts.append(f"### Does it beat the rivals? {named(results, name)}{words}")
        parts.append(grid(RIVAL_HEADINGS, rivals_rows(results, name), words=2))
        found = tally(results, name, results.group("rival"))
        parts.append(" ".join(f"{TALLIES[verdict]} {', '.join(of)}." for verdict, of in found.items() if of))
    if rows := ablation_rows(results):
        parts.append("### Do deep skips help, does the loss, do both?")
        headings = (
            "claim",
            "verdict",
            "difference, points",
            "object recall, points",
            "ahead in pairs",
            "with, MIoU %",
            "without, MIoU %",
        )
        parts.append(grid(headings, rows, words=2))
    if rows := sizes_rows(results):
        parts.append("### Does it find more of the small objects?")
        parts.append(
            "The share found of the objects of all categories together, by their area. The rival is the one that finds most of "
            "that size, of any width."
        )
        columns = ("pixels", "finds more", "objects", f"{results.label(OURS)}, %", "the rival, %", "which")
        parts.append(grid(columns, rows, words=2))
    parts.append("### Is it the smallest?")
    parts.append(parameters_text(results))
    if text := widths_text(results):
        parts.append(text)
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def contradictions_text() -> str:
    """Lists where the paper's printed numbers contradict each other."""
    return "\n".join(f"* {line}" for line in CONTRADICTIONS) + "\n"


def apart_text(changes: Results) -> str:
    """Says of a grid of its own what was run, with the command."""
    sides, steps = listed(values_of(changes, "image_size")), listed(values_of(changes, "steps"))
    commands = "\n".join(str(command) for command in values_of(changes, "command"))
    return (
        f"The rows below are of a grid of their own, {sides} pixels a side, {steps} steps a cell, seeds "
        f"{listed(changes.seeds)}; {machines_text(changes)}:\n\n```\n{commands}\n```"
    )


def winning_text(results: Results, changes: Results | None = None) -> str:
    """Says what each change to ours does, and whether ours reaches the best rival; changes: the grid that has the former."""
    parts = [] if changes is None else [apart_text(changes)]
    tuned = results if changes is None else changes
    if tuned.group("tuning"):
        headings = (
            "form",
            "MIoU is",
            "MIoU, points",
            "object recall, points",
            "validation MIoU, %",
            "MIoU, %",
            "object recall, %",
            "parameters",
        )
        parts.append(
            f"Each row changes one thing in {tuned.label(OURS)}; the effect is paired by category and seed, and its verdict "
            "as above. The form is chosen on validation, test is only reported."
        )
        parts.append(grid(headings, tuning_rows(tuned), words=2))
    parts.append(
        "The bar: at least the mean IoU and the mean object recall of the best rival of any size. The rival is chosen on test, "
        "the harder bar."
    )
    forms = dict.fromkeys([OURS, chosen_form(results)])
    lines = []
    for form in forms:
        for metric, words in (("iou", "Mean IoU"), ("object_recall", "Mean object recall")):
            lines.append("* " + reach_text(results, form, metric, words))
    parts.append("\n".join(lines))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def readme_table(results: Results) -> str:
    """Makes the README's short form: at most 12 lines, ours and each rival at its better width, by MIoU."""
    better: dict[str, str] = {}
    for name in results.group("rival"):
        value = over_categories(results, name, "iou")
        if not math.isnan(value.value) and not value.partial:
            known = better.get(family(name))
            if known is None or value.value > over_categories(results, known, "iou").value:
                better[family(name)] = name
    names = sorted([OURS, *better.values()], key=lambda name: -over_categories(results, name, "iou").value)
    # ours stays, whatever it reached
    kept = [OURS, *[name for name in names if name != OURS][:7]]
    rows = [
        [
            f"**{results.label(name)}**" if name == OURS else results.label(name),
            million(results.networks[name].get("parameters")),
            spread(over_categories(results, name, "iou")),
            spread(over_categories(results, name, "object_recall")),
            str(over_categories(results, name, "iou").seeds),
        ]
        for name in names
        if name in kept
    ]
    steps = listed(values_of(results, "steps"))
    caption = (
        f"{counted_as(len(results.categories), 'category', 'categories')}, "
        f"{steps} steps a cell, {machines_text(results)}; mean ± standard "
        "deviation over seeds, each rival at its better width: "
        "[docs/comparison](docs/comparison/README.md)"
    )
    return grid(["network", "parameters", "MIoU, %", "object recall, %", "seeds"], rows) + "\n" + caption + "\n"
