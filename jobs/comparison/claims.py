"""What became of the paper's claims, computed from the cells, and where its printed numbers contradict each other."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import t as student_t

from jobs.comparison.results import (
    BEST,
    ENLARGED,
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
    recalls,
    shown,
    size_bins,
    thresholds_of,
)
from jobs.comparison.tables import csv_text, exact, minus

HELD, NOT_HELD, UNKNOWN = "held", "did not hold", "cannot be told"
# with more parameters a form of ours is none of the small network that the paper is about
SMALL = 700_000
PLAIN = "ablation-none"
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
    ("deep skips help in the tuned form", BEST, "ablation-best"),
    ("larger images help the tuned form", ENLARGED, BEST),
    ("a search by category helps the tuned form", "deepskip-searched", BEST),
    ("deep skips help beside BCE + Dice", "ablation-both", "ablation-loss"),
    ("BCE + Dice helps beside deep skips", "ablation-both", "ablation-skips"),
)


@dataclass(frozen=True)
class Difference:
    """How far one network is ahead of another, on the categories and seeds that both have.

    one, other: their means over those categories. value: of pairs of category and seed, averaged. half: half the width of its
    95 % interval, nan where seeds show no spread. won: pairs in which the one is ahead, of `pairs`. by_category: mean
    difference of each. whole: the categories are all that were run. apart: pairs whose cells were not computed alike.
    """

    one: Mean
    other: Mean
    value: float
    half: float
    won: int
    pairs: int
    by_category: dict[str, float]
    whole: bool = True
    apart: int = 0

    @property
    def verdict(self) -> str:
        """Says whether the one is ahead: nothing can be told of some categories, of one seed, or if the interval holds 0."""
        # what rounding leaves of equal means is no lead; nan is in no order
        if not self.whole or not abs(self.value) > self.half + 1e-9:
            return UNKNOWN
        return HELD if self.value > 0 else NOT_HELD


def half_width(by_category: Iterable[Sequence[float]]) -> float:
    """Gives half the 95 % interval of a mean over categories of paired differences (a sequence of seeds for each).

    The categories are those of the comparison, no sample of others, so what varies is a category's seeds: Student's t with
    the degrees of freedom of Welch and Satterthwaite. With one category it is the paired t-test. nan with one seed, and
    where two seeds happen to agree.
    """
    found = list(by_category)
    if not found or any(len(values) < 2 for values in found):
        return math.nan
    parts = [statistics.variance(values) / len(values) for values in found]
    if not any(parts):
        return 0.0 if all(len(values) > 2 for values in found) else math.nan
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, found, strict=True))
    return float(student_t.ppf(0.975, freedom)) * math.sqrt(sum(parts)) / len(found)


Values = Mapping[str, Mapping[int, float]]


def compare(results: Results, one: str, other: str, metric: str, split: str = "test") -> Difference:
    """Compares two networks by a metric, paired by category and seed."""
    first, second = (
        {category: by_seed(results, category, network, metric, split) for category in results.categories}
        for network in (one, other)
    )
    found = difference(first, second)
    _, seeds = block({c: first[c].keys() & second[c].keys() for c in first})
    apart = sum(
        place_of(results.cells[c, one, s]) != place_of(results.cells[c, other, s])
        for c in found.by_category
        for s in seeds
    )
    return replace(found, whole=len(found.by_category) == len(results.categories), apart=apart)


def place_of(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """Gives what a cell was computed on, in and with: machine, precision, ends of the thresholds."""
    return cell.get("hardware"), cell.get("precision"), *thresholds_of(cell)


def won_text(found: Difference) -> str:
    """Says in how many pairs the one is ahead, and how many of them were not computed alike."""
    apart = f" ({found.apart} not computed alike)" if found.apart else ""
    return f"{found.won} of {found.pairs}{apart}"


def difference(first: Values, second: Values) -> Difference:
    """Compares values by category and seed with others, on what both have."""
    categories, seeds = block({c: first[c].keys() & second[c].keys() for c in first})
    if not categories:
        return Difference(Mean(math.nan), Mean(math.nan), math.nan, math.nan, 0, 0, {})
    ahead = {c: [first[c][s] - second[c][s] for s in seeds] for c in categories}
    one, other = (
        average(statistics.fmean(values[c][s] for c in categories) for s in seeds) for values in (first, second)
    )
    by_category = {c: statistics.fmean(found) for c, found in ahead.items()}
    return Difference(
        one,
        other,
        statistics.fmean(by_category.values()),
        half_width(ahead.values()),
        sum(value > 0 for found in ahead.values() for value in found),
        len(categories) * len(seeds),
        by_category,
    )


def lead(found: Difference) -> str:
    """Gives a difference in points with its 95 % interval."""
    if math.isnan(found.half):
        return points(found.value)
    # differences of fractions end at 100 points
    low, high = max(-1.0, found.value - found.half), min(1.0, found.value + found.half)
    return f"{points(found.value)} ({points(low)} to {points(high)})"


def best(results: Results, networks: list[str], metric: str, split: str = "test") -> str | None:
    """Finds the network with the highest mean over all categories; None where none has all of them.

    Of two the one that is ahead on the seeds that both have: a seed can be worth more than what networks differ by.
    """
    means = {network: over_categories(results, network, metric, split) for network in networks}
    found: str | None = None
    for network, mean in means.items():
        if mean.partial or math.isnan(mean.value):
            continue
        if found is None:
            found = network
            continue
        ahead = compare(results, network, found, metric, split)
        # without a seed that both have
        lead = ahead.value if ahead.whole else mean.value - means[found].value
        found = network if lead > 0 else found
    return found


def points(value: float) -> str:
    """Gives a difference of fractions in points of percent, with its sign."""
    # not -0.0
    return "–" if math.isnan(value) else minus(f"{round(100 * value, 1) + 0.0:+.1f}")


def spread(mean: Mean) -> str:
    """Gives a mean ± deviation in percent."""
    if math.isnan(mean.value):
        return "–"
    text = f"{100 * mean.value:.1f}"
    return text if math.isnan(mean.deviation) else f"{text} ± {100 * mean.deviation:.1f}"


def million(count: float | None) -> str:
    """Gives a number of parameters in millions."""
    return "–" if count is None else f"{count / 1e6:.2f} M"


def rivals(results: Results) -> list[str]:
    """Lists what ours is compared with: the rivals, and first the plain U-Net that the paper adds to."""
    return [*(name for name in (PLAIN,) if name in results.networks), *results.group("rival")]


def rivals_rows(results: Results, one: str) -> list[list[str]]:
    """Makes the rows of a network against each rival: MIoUs, difference, pairs, extremes, object recall, verdict."""
    rows = []
    for other in rivals(results):
        found, objects = compare(results, one, other, "iou"), compare(results, one, other, "object_recall")
        ends = sorted(found.by_category.items(), key=lambda item: item[1])
        extremes = [f"{points(value)} {shown(category)}" for category, value in dict(ends[:1] + ends[-1:]).items()]
        some, all_of = len(found.by_category), len(results.categories)
        rows.append(
            [
                results.label(other) + (f" (in {some} of {all_of} categories)" if 0 < some < all_of else ""),
                f"**{found.verdict}**",
                lead(found),
                won_text(found),
                spread(found.one),
                spread(found.other),
                lead(objects),
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
            differences = [lead(found), lead(objects)]
            sides = [spread(found.one), spread(found.other)]
            rows.append([claim, f"**{found.verdict}**", *differences, won_text(found), *sides])
    return rows


def sizes_rows(results: Results, form: str) -> list[list[str]]:
    """Makes the rows of object recall by object size: a form of ours beside the rival that finds most of that size."""
    rows = []
    counts = [objects for objects, *_ in by_size(results, form, results.categories)]
    for words, edges, objects in zip(bin_names(results), size_bins(results), counts, strict=True):
        ours = recalls(results, form, results.categories, edges)
        found = {
            name: shares for name in rivals(results) if (shares := recalls(results, name, results.categories, edges))
        }
        if not ours or not found:
            continue
        rival = max(found, key=lambda name: statistics.fmean(found[name].values()))
        ahead = difference({"all": ours}, {"all": found[rival]})
        sides = [spread(ahead.one), spread(ahead.other)]
        rows.append([words, f"**{ahead.verdict}**", f"{objects:,}", lead(ahead), *sides, results.label(rival)])
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
    plain = results.networks.get(PLAIN, {}).get("parameters")
    text = f"Ours has {million(ours)} where the paper says 1.32 M; "
    if plain is not None and plain < ours:
        text += f"the U-Net that it adds deep skips to has fewer, {million(plain)}; "
    if smaller:
        return f"**Fewest parameters: {NOT_HELD}.** {text}fewer have {', '.join(smaller)}."
    return (
        f"**Fewest parameters: {HELD}.** {text}the smallest rival of those whose count it states, and which are built to that "
        f"count here, is {results.label(smallest)} with {million(known[smallest])}."
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
        f"The rivals built to the paper's counts have them, {inside}; farthest is {results.label(name)}: "
        f"{million(count)} for {million(paper)} ({points(count / paper - 1)} %)."
    )


def reach_text(results: Results, one: str, metric: str, words: str) -> str:
    """Says whether a network of ours reaches the best rival of any size by a metric."""
    rival = best(results, rivals(results), metric)
    if rival is None:
        return f"{words}: {UNKNOWN}, no rival has every category."
    found = compare(results, one, rival, metric)
    if found.verdict == UNKNOWN:
        why = "no spread over seeds" if math.isnan(found.half) else "its interval holds 0"
        why = why if found.whole else "it lacks a category"
        outcome = f"{'reached' if found.value >= 0 else 'not reached'} on average, but it {UNKNOWN} ({why})"
    else:
        outcome = "reached and passed" if found.verdict == HELD else "not reached"
    partial = [results.label(name) for name in rivals(results) if over_categories(results, name, metric).partial]
    absent = f" Left out, as they lack a category: {', '.join(partial)}." if partial else ""
    return (
        f"{words}: **{outcome}**. {results.label(one)} {spread(found.one)}, the best rival, {results.label(rival)} "
        f"({million(results.networks[rival].get('parameters'))}), {spread(found.other)}: "
        f"{lead(found)} points; ahead in pairs: {won_text(found)}.{absent}"
    )


def tuning_rows(results: Results) -> list[list[str]]:
    """Makes the rows of ours, each change to it, and its tuned forms; the best on validation is marked."""
    chosen = chosen_form(results)
    rows = []
    for name in small_forms(results):
        iou, objects = compare(results, name, OURS, "iou"), compare(results, name, OURS, "object_recall")
        effect = {HELD: "better", NOT_HELD: "worse", UNKNOWN: UNKNOWN}[iou.verdict] if name != OURS else "–"
        differences = [lead(each) if name != OURS else "–" for each in (iou, objects)]
        rows.append(
            [
                results.label(name) + (" (best on validation)" if name == chosen else ""),
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
    forms = [name for name in small_forms(results) if (results.networks[name].get("parameters") or 0) <= SMALL]
    return best(results, forms, "iou", "validation") or OURS


def small_forms(results: Results) -> list[str]:
    """Lists ours, with each change, and tuned."""
    return [OURS, *results.group("tuning"), *tuned_forms(results)]


def tuned_forms(results: Results) -> list[str]:
    """Lists ours with what was chosen on validation, and on larger images, where they have every category."""
    found = {name: over_categories(results, name, "iou") for name in (BEST, ENLARGED) if name in results.networks}
    return [name for name, mean in found.items() if not math.isnan(mean.value) and not mean.partial]


def differences_csv(results: Results) -> str:
    """Writes every difference as CSV, in fractions: ours, as it is and tuned, against all, the ablation's rows in pairs."""
    pairs = [(OURS, other) for other in results.networks if other != OURS]
    pairs += [(name, other) for name in tuned_forms(results) for other in results.networks if other != name]
    pairs += [(one, other) for _, one, other in ABLATION_PAIRS if {one, other} <= results.networks.keys()]
    pairs += [("ablation-both", other) for other in results.group("rival") if "ablation-both" in results.networks]
    heading = [
        "network",
        "against",
        "metric",
        "mean",
        "its mean",
        "difference",
        "half of 95 % interval",
        "won",
        "pairs",
        "verdict",
    ]
    rows = []
    for one, other in dict.fromkeys(pairs):
        for metric in ("iou", "object_recall"):
            found = compare(results, one, other, metric)
            means = (found.one.value, found.other.value, found.value, found.half)
            rows.append([one, other, metric, *map(exact, means), found.won, found.pairs, found.verdict])
    return csv_text(heading, rows)
