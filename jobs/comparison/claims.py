"""What became of the paper's claims, computed from the cells, and where its printed numbers contradict each other."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from jobs.comparison.results import (
    OURS,
    Mean,
    Results,
    average,
    bin_names,
    block,
    by_seed,
    by_size,
    family,
    over_categories,
    shown,
)
from jobs.comparison.tables import csv_text, exact, minus

HELD, NOT_HELD, UNKNOWN = "held", "did not hold", "cannot be told"
# with more parameters a form of ours is none of the small network that the paper is about
SMALL = 700_000
# those that the paper compares itself with
THE_FIVE = ("unet", "fcn", "mask-rcnn", "h-dense-unet", "pspnet")

# what the paper prints, and what stands against it
CONTRADICTIONS = (
    "Tables 1 and 2 give the same model a MIoU of 70.13 and of 72.13.",
    "Table 2 says 1.32 M parameters. Its equation 3 (VGG form) gives 0.64 M and its equation 4 (ResNet-34 form) 1.68 M; "
    "neither gives 1.32 M ([paper.md](../paper.md)).",
    "The baseline's row of IoUs averages 49.9; the table prints 51.23.",
    "Equation 7 prints log o in the Dice term, which has no lower bound; Dice is made of o itself.",
    "Equation 3 prints f(Z^1) inside its last sum, where only f(Z^u) counts a network's weights.",
)

ABLATION_PAIRS = (
    ("deep skips alone help", "ablation-skips", "ablation-none"),
    ("BCE + Dice alone helps", "ablation-loss", "ablation-none"),
    ("both together help", "ablation-both", "ablation-none"),
    ("deep skips help beside BCE + Dice", "ablation-both", "ablation-loss"),
    ("BCE + Dice helps beside deep skips", "ablation-both", "ablation-skips"),
)


@dataclass(frozen=True)
class Difference:
    """How far one network is ahead of another, on the categories and seeds that both have.

    one, other: their means over those categories. difference: of pairs of a seed, averaged over categories.
    won: pairs of category and seed in which the one is ahead, of `pairs`. by_category: mean difference of each.
    """

    one: Mean
    other: Mean
    difference: Mean
    won: int
    pairs: int
    by_category: dict[str, float]

    @property
    def verdict(self) -> str:
        """Says whether the one is ahead."""
        return judge(self.one, self.other)


def judge(one: Mean, other: Mean) -> str:
    """Says whether one mean is above another; it cannot be told with one seed, or where means ± deviations overlap."""
    # what rounding leaves of equal means is no lead
    ahead, reach = one.value - other.value, one.deviation + other.deviation + 1e-9
    # a missing mean and a spread of one seed are nan, and nan is in no order
    if not abs(ahead) > reach:
        return UNKNOWN
    return HELD if ahead > 0 else NOT_HELD


def compare(results: Results, one: str, other: str, metric: str) -> Difference:
    """Compares two networks by a test metric, paired by category and seed."""
    values = {
        category: (by_seed(results, category, one, metric), by_seed(results, category, other, metric))
        for category in results.categories
    }
    categories, seeds = block({category: ours.keys() & theirs.keys() for category, (ours, theirs) in values.items()})
    if not categories:
        return Difference(Mean(math.nan), Mean(math.nan), Mean(math.nan), 0, 0, {})
    ahead = {c: {s: values[c][0][s] - values[c][1][s] for s in seeds} for c in categories}
    first, second = (
        average(statistics.fmean(values[c][side][s] for c in categories) for s in seeds) for side in (0, 1)
    )
    return Difference(
        first,
        second,
        average(statistics.fmean(ahead[c][s] for c in categories) for s in seeds),
        sum(value > 0 for found in ahead.values() for value in found.values()),
        len(categories) * len(seeds),
        {c: statistics.fmean(found.values()) for c, found in ahead.items()},
    )


def best(results: Results, networks: list[str], metric: str, split: str = "test") -> str | None:
    """Finds the network with the highest mean over all categories; None where none has all of them."""
    means = {network: over_categories(results, network, metric, split) for network in networks}
    whole = [network for network, mean in means.items() if not mean.partial and not math.isnan(mean.value)]
    return max(whole, key=lambda network: means[network].value, default=None)


def points(value: float) -> str:
    """Gives a difference of fractions in points of percent, with its sign."""
    return "–" if math.isnan(value) else minus(f"{100 * value:+.1f}")


def spread(mean: Mean, signed: bool = False) -> str:
    """Gives a mean ± deviation in percent."""
    if math.isnan(mean.value):
        return "–"
    text = points(mean.value) if signed else f"{100 * mean.value:.1f}"
    return text if math.isnan(mean.deviation) else f"{text} ± {100 * mean.deviation:.1f}"


def million(count: float | None) -> str:
    """Gives a number of parameters in millions."""
    return "–" if count is None else f"{count / 1e6:.2f} M"


def rivals_rows(results: Results, one: str) -> list[list[str]]:
    """Makes the rows of a network against each rival: MIoUs, difference, pairs, extremes, object recall, verdict."""
    rows = []
    baseline = [name for name in ("ablation-none",) if name in results.networks and name != one]
    for other in [*baseline, *results.group("rival")]:
        found, objects = compare(results, one, other, "iou"), compare(results, one, other, "object_recall")
        ends = sorted(found.by_category.items(), key=lambda item: item[1])
        extremes = [f"{points(value)} {shown(category)}" for category, value in dict(ends[:1] + ends[-1:]).items()]
        rows.append(
            [
                results.label(other),
                f"**{found.verdict}**",
                spread(found.difference, signed=True),
                f"{found.won} of {found.pairs}",
                spread(found.one),
                spread(found.other),
                spread(objects.difference, signed=True),
                " to ".join(extremes) or "–",
                million(results.networks[other].get("parameters")),
            ]
        )
    return rows


def the_five(results: Results) -> list[str]:
    """Lists the rivals that the paper names, at its widths where it states them."""
    found = {family(name): name for name in results.group("rival") if family(name) == name}
    found |= {family(name): name for name in results.group("rival", "paper")}
    return [found[name] for name in THE_FIVE if name in found]


def tally(results: Results, one: str, others: Iterable[str]) -> dict[str, list[str]]:
    """Sorts networks by what became of the claim that `one` has a higher MIoU."""
    found: dict[str, list[str]] = {HELD: [], NOT_HELD: [], UNKNOWN: []}
    for other in others:
        found[compare(results, one, other, "iou").verdict].append(results.label(other))
    return found


def verdict_of(tallied: dict[str, list[str]]) -> str:
    """Says what became of the claim to be ahead of all of them."""
    if tallied[NOT_HELD]:
        return NOT_HELD
    return UNKNOWN if tallied[UNKNOWN] or not tallied[HELD] else HELD


def ablation_rows(results: Results) -> list[list[str]]:
    """Makes the rows of what deep skips and loss do, alone and together; those whose networks are there."""
    rows = []
    for claim, one, other in ABLATION_PAIRS:
        if one in results.networks and other in results.networks:
            found, objects = compare(results, one, other, "iou"), compare(results, one, other, "object_recall")
            differences = [spread(each.difference, signed=True) for each in (found, objects)]
            sides = [spread(found.one), spread(found.other)]
            rows.append([claim, f"**{found.verdict}**", *differences, f"{found.won} of {found.pairs}", *sides])
    return rows


def sizes_rows(results: Results) -> list[list[str]]:
    """Makes the rows of object recall by object size: ours beside the rival that finds most of that size."""
    ours = by_size(results, OURS, results.categories)
    rivals = {name: by_size(results, name, results.categories) for name in results.group("rival")}
    rows = []
    for i, (words, (objects, recall, _)) in enumerate(zip(bin_names(results), ours, strict=True)):
        found = {name: rows_of[i][1] for name, rows_of in rivals.items() if not math.isnan(rows_of[i][1].value)}
        if not objects or not found:
            continue
        rival = max(found, key=lambda name: found[name].value)
        verdict = judge(recall, found[rival])
        rows.append(
            [
                words,
                f"**{verdict}**",
                f"{objects:,}",
                spread(recall),
                spread(found[rival]),
                results.label(rival),
            ]
        )
    return rows


def parameters_text(results: Results) -> str:
    """Says what became of the claim that ours is the smallest."""
    ours = results.networks[OURS].get("parameters")
    stated = [n for n in results.group("rival", "paper") if results.networks[n].get("paper_parameters")]
    counts = {n: results.networks[n].get("parameters") for n in stated}
    known = {n: count for n, count in counts.items() if count is not None}
    if ours is None or not known:
        return f"**Fewest parameters: {UNKNOWN}**; they were not counted."
    smaller = [f"{results.label(n)} ({million(count)})" for n, count in known.items() if count < ours]
    smallest = min(known, key=lambda n: known[n])
    text = f"Ours has {million(ours)} where the paper says 1.32 M; "
    if smaller:
        return f"**Fewest parameters: {NOT_HELD}.** {text}fewer have {', '.join(smaller)}."
    return (
        f"**Fewest parameters: {HELD}.** {text}the smallest rival of those whose "
        f"count it states is {results.label(smallest)} with {million(known[smallest])}."
    )


def widths_text(results: Results) -> str:
    """Says how near the rivals' counts are to the paper's."""
    off = []
    for name, values in results.networks.items():
        count, paper = values.get("parameters"), values.get("paper_parameters")
        if count and paper and values["group"] == "rival" and values.get("form") == "paper":
            off.append((abs(count / paper - 1), name, count, paper))
    if not off:
        return ""
    worst, name, count, paper = max(off)
    inside = "all within 3 %" if worst <= 0.03 else f"{sum(each[0] <= 0.03 for each in off)} of {len(off)} within 3 %"
    return (
        f"Of the rivals built to the paper's counts {inside}; farthest is {results.label(name)}: "
        f"{million(count)} for {million(paper)} ({points(count / paper - 1)} %)."
    )


def reach_text(results: Results, one: str, metric: str, words: str) -> str:
    """Says whether a network of ours reaches the best rival of any size by a metric."""
    rival = best(results, results.group("rival"), metric)
    if rival is None:
        return f"{words}: {UNKNOWN}, no rival has every category."
    found = compare(results, one, rival, metric)
    if found.verdict == UNKNOWN:
        why = "one seed has no spread" if found.difference.seeds < 2 else "the spreads overlap"
        outcome = f"{UNKNOWN} ({why})"
    else:
        outcome = "reached and passed" if found.verdict == HELD else "not reached"
    return (
        f"{words}: **{outcome}**. {results.label(one)} {spread(found.one)}, the best rival, {results.label(rival)} "
        f"({million(results.networks[rival].get('parameters'))}), {spread(found.other)}: "
        f"{spread(found.difference, signed=True)} points, ahead in {found.won} of {found.pairs} pairs."
    )


def tuning_rows(results: Results) -> list[list[str]]:
    """Makes the rows of what each change to ours does, beside ours itself; the one chosen on validation is marked."""
    chosen = chosen_form(results)
    rows = []
    for name in [OURS, *results.group("tuning")]:
        iou, objects = compare(results, name, OURS, "iou"), compare(results, name, OURS, "object_recall")
        effect = {HELD: "better", NOT_HELD: "worse", UNKNOWN: UNKNOWN}[iou.verdict] if name != OURS else "–"
        differences = [spread(each.difference, signed=True) if name != OURS else "–" for each in (iou, objects)]
        rows.append(
            [
                results.label(name) + (" (chosen on validation)" if name == chosen else ""),
                effect,
                *differences,
                spread(over_categories(results, name, "iou", "validation")),
                spread(over_categories(results, name, "iou")),
                spread(over_categories(results, name, "object_recall")),
                million(results.networks[name].get("parameters")),
            ]
        )
    return rows


def chosen_form(results: Results) -> str:
    """Finds which of our small forms has the best mean validation IoU; the test split has no say."""
    forms = [
        name for name in [OURS, *results.group("tuning")] if (results.networks[name].get("parameters") or 0) <= SMALL
    ]
    return best(results, forms, "iou", "validation") or OURS


def differences_csv(results: Results) -> str:
    """Writes every difference of the page as CSV, in fractions: ours against all others, the ablation's rows in pairs."""
    pairs = [(OURS, other) for other in results.networks if other != OURS]
    pairs += [(one, other) for _, one, other in ABLATION_PAIRS if {one, other} <= results.networks.keys()]
    pairs += [("ablation-both", other) for other in results.group("rival") if "ablation-both" in results.networks]
    heading = [
        "network",
        "against",
        "metric",
        "mean",
        "its mean",
        "difference",
        "difference ±",
        "won",
        "pairs",
        "verdict",
    ]
    rows = []
    for one, other in dict.fromkeys(pairs):
        for metric in ("iou", "object_recall"):
            found = compare(results, one, other, metric)
            means = (found.one.value, found.other.value, found.difference.value, found.difference.deviation)
            rows.append([one, other, metric, *map(exact, means), found.won, found.pairs, found.verdict])
    return csv_text(heading, rows)
