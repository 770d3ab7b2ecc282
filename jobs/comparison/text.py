"""The words of the comparison's page on what came out and what became of the claims; Markdown."""

from collections.abc import Callable

from jobs.comparison.claims import (
    CONTRADICTIONS,
    HELD,
    NOT_HELD,
    UNKNOWN,
    Difference,
    ablation_rows,
    best,
    chosen_form,
    compare,
    lead,
    million,
    parameters_text,
    reach_text,
    rivals,
    rivals_rows,
    sizes_rows,
    spread,
    tally,
    the_five,
    tuned_forms,
    tuning_rows,
    verdict_of,
    widths_text,
)
from jobs.comparison.conditions import (
    LOSSES,
    USUAL,
    budget_text,
    counted_as,
    heads_texts,
    listed,
    machines_text,
    mixed_text,
    values_of,
    way_of,
    way_text,
)
from jobs.comparison.results import (
    BEST,
    ENLARGED,
    OURS,
    Results,
    family,
    over_categories,
)
from jobs.comparison.tables import grid

ABLATION = "ablation-both"
# in the README's table: the five that the paper names, and one more
SHORT_RIVALS = 6
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


def short_text(results: Results, other: Results | None = None) -> str:
    """Says what came out, in a few lines."""
    lines = []
    rival = best(results, rivals(results), "iou")
    objects = best(results, rivals(results), "object_recall")
    lines.append(
        f"* {worth(results, OURS)}, over {counted_as(len(results.categories), 'category', 'categories')}; seeds "
        f"{listed(results.seeds)}."
    )
    lines += [f"* {worth(results, name)}. {chosen_text(results, name)}" for name in tuned_forms(results)]
    for name, words in ((rival, "MIoU"), (objects, "object recall")):
        if name:
            lines.append(f"* The rival with the highest {words}: {worth(results, name)}.")
    said = [*heads_texts(results), *beaten_texts(results), *alike_texts(results)]
    lines += [f"* {text}" for text in said]
    for name in forms_of_ours(results):
        for size, verdict, number, ahead, own, theirs, which in sizes_rows(results, name)[:1]:
            lines.append(
                f'* "Finds more of the smallest objects" ({size} pixels, {number} objects), {results.label(name)}: {verdict}; '
                f"{own} % against {theirs} % of {which}, {ahead} points."
            )
    for claim, verdict, *_ in ablation_rows(results)[:4]:
        lines.append(f'* "{claim[0].upper()}{claim[1:]}": {verdict}.')
    lines.append(f"* {parameters_text(results)}")
    lines += [f"* {text}" for text in apart_texts(other, heads_texts, beaten_texts, alike_texts)]
    return "\n".join(lines) + "\n"


def chosen_text(results: Results, form: str) -> str:
    """Says how a tuned form was found."""
    if form == ENLARGED:
        times = results.networks[form].get("enlarge", USUAL.enlarge)
        return (
            f"Images are enlarged in categories whose mean validation IoU gains by it with ours, at {times}² times the "
            "operations; that this is chosen by category is because of test results with all enlarged."
        )
    values = results.networks[BEST]
    what = ["norm", "rate", "augmentation"]
    if values.get("momentum", USUAL.momentum) != USUAL.momentum:
        what.append("momentum")
    if values.get("test_flips"):
        what.append("flips")
    return (
        f"The {', '.join(what[:-1])} and {what[-1]} of the tuned form were chosen on validation for it (that alpha and "
        "copy-paste were tried is because of their test results at 128 pixels); those of no rival were."
    )


def worth(results: Results, network: str) -> str:
    """Says what a network reaches; object recall beside an object's IoU, and what it costs in pixels and false alarms."""
    iou, recall, objects, precision, alarms = (
        over_categories(results, network, key)
        for key in ("iou", "object_recall", "object_iou", "precision", "false_alarms_per_image")
    )
    return (
        f"{results.label(network)} ({million(results.networks[network].get('parameters'))}): MIoU {spread(iou)} %, object "
        f"recall {spread(recall)} %, IoU of an object {spread(objects)} %, precision of pixels {spread(precision)} %, "
        f"{alarms.value:.1f} false alarms an image"
    )


def alike_texts(results: Results) -> list[str]:
    """Says how ours stands to the rivals that the same loss, optimizer and rate trained: what the network alone does."""
    texts = []
    for name in claimants(results):
        for other in rivals(results):
            if results.has(other) and way_of(results, other) == way_of(results, name):
                iou, objects = (compare(results, name, other, key) for key in ("iou", "object_recall"))
                texts.append(
                    f"Trained alike ({way_text(results, name)}), {named(results, name)} against {results.label(other)}: "
                    f"{lead(iou)} points of MIoU (ahead: **{iou.verdict}**), {lead(objects)} of object recall "
                    f"(**{objects.verdict}**){apart_of(iou)}."
                )
    return texts


def beaten_texts(results: Results) -> list[str]:
    """Says how each form of ours stands to the rivals that the paper names, and to all forms of them."""
    five, texts = the_five(results), []
    for name in claimants(results) if five else []:
        found, whole = tally(results, name, five), tally(results, name, rivals(results))
        texts.append(
            f'"Beats the paper\'s {len(five)} rivals in MIoU", {named(results, name)}: **{verdict_of(found)}**; '
            f"{counted(found)}. Of all {len(rivals(results))} forms of rivals: {counted(whole)}."
        )
    return texts


def apart_of(found: Difference) -> str:
    """Says how many pairs of a comparison were not computed alike."""
    if not found.apart:
        return ""
    return f"; {found.apart} of {counted_as(found.pairs, 'pair', 'pairs')} not computed alike"


def apart_texts(other: Results | None, *kinds: Callable[[Results], list[str]]) -> list[str]:
    """Says such things of a grid of its own, with what it is."""
    if other is None:
        return []
    return [f"In the other grid, {budget_text(other)}: {text}" for of in kinds for text in of(other)]


def counted(tallied: dict[str, list[str]]) -> str:
    """Counts what is behind, ahead and undecided."""
    open_for = f"cannot be told for {len(tallied[UNKNOWN])}" + (
        f" ({', '.join(tallied[UNKNOWN])})" if tallied[UNKNOWN] else ""
    )
    return f"ahead of {len(tallied[HELD])}, behind {len(tallied[NOT_HELD])}, {open_for}"


def named(results: Results, network: str) -> str:
    """Names a form of ours so that it is known for one."""
    label = results.label(network)
    return f'the ablation\'s "{label}"' if results.networks[network]["group"] == "ablation" else label


def claimants(results: Results) -> list[str]:
    """Lists the forms of ours that the paper's claim is put to: as we train it, tuned, and as the ablation does."""
    return [name for name in (*forms_of_ours(results), ABLATION) if name in results.networks and results.has(name)]


def forms_of_ours(results: Results) -> list[str]:
    """Lists ours as the config has it and, where they are whole, the tuned forms."""
    return [OURS, *tuned_forms(results)]


def claims_text(results: Results) -> str:
    """Says claim by claim which of the paper's held."""
    parts = [
        "Two networks are compared on the cells that both have, paired by category and seed. A difference is a mean over "
        "categories, in brackets its 95 % interval for these categories (Student's t of each category's seeds, degrees of "
        "freedom by Welch and Satterthwaite); it says nothing of other data. A claim **held** or **did not hold** where the "
        "interval is wholly on one side of 0; else it **cannot be told**. With one seed there is no interval, and nothing "
        "is told of a rival that lacks a category. Pairs whose cells ran on two machines, in two precisions "
        "or with other thresholds to choose from are counted as not computed alike.",
    ]
    for name in claimants(results):
        loss = results.networks[name].get("loss")
        words = f" (loss: {LOSSES.get(loss, loss)})" if loss else ""
        parts.append(f"### Does it beat the rivals? {named(results, name)}{words}")
        parts += [chosen_text(results, name)] if name in (BEST, ENLARGED) else []
        parts.append(grid(RIVAL_HEADINGS, rivals_rows(results, name), words=2))
        found = tally(results, name, rivals(results))
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
    if rows := [[results.label(name), *row] for name in forms_of_ours(results) for row in sizes_rows(results, name)]:
        parts.append("### Does it find more of the small objects?")
        parts.append(
            "The share found of the objects of all categories together, by their area in the pixels of the images as the "
            "networks get them; categories with many objects count for most. The rival is the one that finds most of that "
            "size, of any width, and the difference is on the seeds that both have."
        )
        columns = ("form", "pixels", "finds more", "objects", "points", "form, %", "the rival, %", "which")
        parts.append(grid(columns, rows, words=3))
    parts.append("### Is it the smallest?")
    parts.append(parameters_text(results))
    if text := widths_text(results):
        parts.append(text)
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def contradictions_text() -> str:
    """Lists where the paper's printed numbers contradict each other."""
    return "\n".join(f"* {line}" for line in CONTRADICTIONS) + "\n"


def apart_text(other: Results) -> str:
    """Says of a grid of its own what was run, with the command."""
    sides, steps = listed(values_of(other, "image_size")), listed(values_of(other, "steps"))
    commands = "\n".join(str(command) for command in values_of(other, "command"))
    return (
        f"The rows below are of a grid of their own, {sides} pixels a side, {steps} steps a cell, seeds "
        f"{listed(other.seeds)}; {machines_text(other)}:\n\n```\n{commands}\n```\n\n{mixed_text(other)}"
    ).rstrip()


def tuned_text(results: Results) -> str:
    """Says what the tuned form is beside the others of one change each."""
    return "".join(
        f" {results.label(name)} has several changes, chosen on the validation splits of this very grid, which makes its "
        "validation MIoU a little too high."
        for name in tuned_forms(results)
    )


def winning_text(results: Results, other: Results | None = None) -> str:
    """Says what each change to ours does, in the other grid where this lacks it, and whether ours reaches the best rival."""
    tuned = results if other is None or results.group("tuning") else other
    parts = [] if tuned is results else [apart_text(tuned)]
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
            "as above; with another optimizer go its rate and weight decay. The best on validation is marked; "
            f"sizes, figure 5 and panels are of the unchanged form.{tuned_text(tuned)}"
        )
        parts.append(grid(headings, tuning_rows(tuned), words=2))
    if lines := apart_texts(other, alike_texts):
        parts.append("\n".join(f"* {line}" for line in lines))
    parts.append(
        "The bar: at least the mean IoU and the mean object recall of the best rival of any size, which is "
        "the best on test of those that were run."
    )
    lines = [*heads_texts(results), *bar_texts(results), *apart_texts(other, heads_texts, bar_texts)]
    parts.append("\n".join(f"* {line}" for line in lines))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def bar_texts(results: Results) -> list[str]:
    """Says of each form of ours whether it reaches the best rival."""
    forms = dict.fromkeys([OURS, chosen_form(results), *tuned_forms(results)]) if rivals(results) else ()
    metrics = (("iou", "Mean IoU"), ("object_recall", "Mean object recall"))
    return [reach_text(results, form, metric, words) for form in forms for metric, words in metrics]


def readme_table(results: Results, other: Results | None = None) -> str:
    """Makes the README's short form: ours, and the SHORT_RIVALS best rivals each in its best form, by MIoU."""
    families: dict[str, list[str]] = {}
    for name in results.group("rival"):
        families.setdefault(family(name), []).append(name)
    better = [form for forms in families.values() if (form := best(results, forms, "iou"))]
    ours = forms_of_ours(results)
    names = sorted([*ours, *better], key=lambda name: -over_categories(results, name, "iou").value)
    # ours stay, whatever they reached
    kept = [*ours, *[name for name in names if name not in ours][:SHORT_RIVALS]]
    rows = [
        [
            f"**{results.label(name)}**" if name in ours else results.label(name),
            way_text(results, name),
            million(results.networks[name].get("parameters")),
            spread(over_categories(results, name, "iou")),
            spread(over_categories(results, name, "object_recall")),
            spread(over_categories(results, name, "object_iou")),
            spread(over_categories(results, name, "precision")),
            str(over_categories(results, name, "iou").seeds),
        ]
        for name in names
        if name in kept
    ]
    steps = listed(values_of(results, "steps"))
    chosen = "".join(f" {chosen_text(results, name)}" for name in ours[1:])
    caption = (
        f"{counted_as(len(results.categories), 'category', 'categories')}, "
        f"{steps} steps a cell, {machines_text(results)}; mean ± standard deviation over seeds. MIoU: the mean "
        "over categories of the foreground's IoU; IoU of an object: with the predicted component that overlaps it most; P: "
        "precision of pixels. Each rival in the form with the highest MIoU on the "
        f"seeds that its forms share, at most {SHORT_RIVALS}: [docs/comparison](docs/comparison/README.md).{chosen}"
    )
    headings = ["network", "trained and tested with", "parameters", "MIoU, %"]
    headings += ["object recall, %", "IoU of an object, %", "P, %", "seeds"]
    lines = "\n".join(f"* {text}" for text in [*alike_texts(results), *apart_texts(other, alike_texts)])
    return f"{grid(headings, rows, words=2)}\n{caption}\n" + (f"\n{lines}\n" if lines else "")
