"""Writes the comparison's page: tables (Markdown, CSV), figures, claims, one self-contained HTML file, the README's table."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from deepskip import files
from jobs.comparison import conditions, figures, tables, text
from jobs.comparison.claims import differences_csv
from jobs.comparison.html_page import to_html
from jobs.comparison.panels import panel
from jobs.comparison.results import OURS, Results, read, shown
from jobs.settings import stop

TITLE = "The paper's experiments, run"
PAPER = "[10.18280/ts.400430](https://doi.org/10.18280/ts.400430)"


def build_parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.comparison.page",
        description="Makes tables, figures and one HTML page of what python -m jobs.compare measured.",
    )
    parser.add_argument("--cells", type=Path, required=True, help="the comparison's folder: cells/ and networks.json")
    parser.add_argument(
        "--other", type=Path, help="another such folder; its rows of group `tuning` are shown where --cells has none"
    )
    parser.add_argument("--other_to", type=Path, help="folder for that grid's own page, to which the other links")
    parser.add_argument(
        "--to", type=Path, required=True, help="folder for README.md, index.html, short.md, *.csv, *.svg, *.png"
    )
    return parser


def figure_makers(results: Results) -> dict[str, tuple[str, Callable[[], bytes | None]]]:
    """Names every figure with its words and what draws it; nothing is drawn yet."""
    networks = [(heading, names) for stem, heading, names in tables.blocks(results) if stem != "ablation"]
    ablation = [(heading, names) for stem, heading, names in tables.blocks(results) if stem == "ablation"]
    everything = networks + ablation
    # without rivals there is the ablation to draw, and without either ours
    sets = networks or ablation or [("ours", results.group("ours"))]
    widest = sets[-1][1]
    makers: dict[str, tuple[str, Callable[[], bytes | None]]] = {}
    # first those that may be refused
    for category in results.categories:
        makers[f"panel-{category}.png"] = (
            f"Best, median and worst test image of {shown(category)}",
            # the category of this turn, not of the last
            lambda category=category: panel(results, category),  # type: ignore[misc]
        )
    makers |= {
        "figure-4.svg": (
            "Figure 4: IoU by category, mean and standard deviation over seeds",
            lambda: figures.to_svg(figures.bars(results, everything or sets)),
        ),
        "figure-5.svg": (
            f"Figure 5: loss, Dice and IoU of {results.label(OURS)} over steps",
            lambda: figures.to_svg(figures.training_curves(results, OURS)),
        ),
        "convergence.svg": (
            "Validation IoU (a fraction) over steps, mean over categories and seeds",
            lambda: figures.to_svg(figures.convergence(results, everything or sets)),
        ),
        "parameters.svg": (
            "MIoU by parameters; hollow: the paper's widths",
            lambda: figures.to_svg(figures.parameters(results)),
        ),
    }
    if any(cell.get("by_size") for cell in results.cells.values()):
        makers["sizes.svg"] = (
            "Object recall and IoU by object size, all categories together",
            lambda: figures.to_svg(figures.sizes(results, sets)),
        )
        makers["sizes-categories.svg"] = (
            "Object recall by object size in each category",
            lambda: figures.to_svg(figures.sizes_of_categories(results, widest)),
        )
    return makers


def page_text(
    results: Results,
    other: Results | None,
    shown_figures: dict[str, str],
    made: list[tables.Table],
    other_page: str | None = None,
) -> str:
    """Writes the page as Markdown; shown_figures: the words of every figure by its name; other_page: a link."""

    def picture(*names: str) -> str:
        return "\n\n".join(f"![{shown_figures[n]}]({n})\n\n{shown_figures[n]}." for n in names if n in shown_figures)

    def table(start: str) -> str:
        return "\n\n".join(f"### {t.title}\n\n{tables.to_markdown(t)}" for t in made if t.name.startswith(start))

    sections = [
        (
            "In short",
            text.short_text(results, other),
        ),
        ("What was run", conditions.run_text(results) + conditions.apart_link(results, other, other_page)),
        ("The paper's claims", text.claims_text(results)),
        ("Where the paper's printed numbers contradict each other", text.contradictions_text()),
        (
            "IoU by category",
            "MIoU is the mean of the categories' IoUs, as in the paper. Mean ± standard deviation over seeds; the best of "
            "several seeds in bold.\n\n" + "\n\n".join([table("table-1"), table("table-2"), picture("figure-4.svg")]),
        ),
        (
            "Pixels and objects",
            "Over a whole test split: PA, the share of pixels that are right; P, R and F1, precision and recall of foreground "
            "pixels and their harmonic mean; IoU with background, the mean of the two classes' IoUs. An object is found when "
            "more than half of its pixels are; a predicted component that touches no object is a false alarm. Object recall "
            "alone is highest for a network that marks everything: read it beside P, and beside the mean IoU of an object "
            f"with the predicted component that overlaps it most, 0 for one that is not touched.\n\n{table('table-3')}",
        ),
        (
            "Cost",
            "\n\n".join([conditions.cost_text(results), table("table-4"), picture("parameters.svg")]),
        ),
        (
            "Objects, by category and size",
            "\n\n".join([table("table-5"), picture("sizes.svg", "sizes-categories.svg")]),
        ),
        ("Training", picture("figure-5.svg", "convergence.svg")),
        ("What each change does", text.winning_text(results, other)),
        ("Predictions", predictions_text(picture, [name for name in shown_figures if name.startswith("panel-")])),
        ("Numbers to go on with", csv_text(made, other)),
    ]
    links = " · ".join(f"[{heading}](#{anchor(heading)})" for heading, body in sections if body.strip())
    opening = (
        f"# {TITLE}\n\nThe paper ({PAPER}) says that deep skips and BCE + Dice beat five other networks on small objects. It "
        "names no data and gives no code. Here its experiments are run on data of the kinds it names; this is what came out. "
        f"`python -m jobs.comparison.page` wrote this page from the measured cells.\n\n{links}\n"
    )
    parts = [opening, *(f"## {heading}\n\n{body.strip()}\n" for heading, body in sections if body.strip())]
    return "\n".join(parts)


def predictions_text(picture: Callable[..., str], names: list[str]) -> str:
    """Says what the panels show, and shows them; nothing where there are none."""
    return (
        "The best, median and worst test image of each network's first seed by its own IoU, beside the other's IoU on it; ours "
        f"above the rival that is best in the category. A frame is what is enlarged below it.\n\n{picture(*names)}"
        if names
        else ""
    )


def anchor(heading: str) -> str:
    """Gives a heading's anchor, as GitHub and Python-Markdown both make it of letters, blanks, commas and apostrophes."""
    return heading.lower().replace("'", "").replace(",", "").replace(" ", "-")


def csv_text(made: list[tables.Table], other: Results | None) -> str:
    """Lists the CSV files."""
    lines = [
        "* [cells.csv](cells.csv): every cell, whole, failed or not run",
        "* [sizes.csv](sizes.csv): by object size",
        "* [differences.csv](differences.csv): ours, as it is and tuned, against all others, the ablation's rows in pairs",
    ]
    if other is not None:
        lines.append("* [cells-other.csv](cells-other.csv): every cell of the other grid")
    lines += [f"* [{table.name}.csv]({table.name}.csv): {table.title}" for table in made]
    return "\n".join(lines)


def write_page(results: Results, to: Path, other: Results | None = None, other_page: str | None = None) -> list[Path]:
    """Writes everything, the pages last, so that no page names a file that is not there; gives the paths.

    other_page: where the page of the other grid is, from here.
    """
    made = tables.all_tables(results)
    written = {f"{table.name}.csv": tables.to_csv(table).encode() for table in made}
    written |= {"cells.csv": tables.cells_csv(results).encode(), "sizes.csv": tables.sizes_csv(results).encode()}
    if other is not None:
        written["cells-other.csv"] = tables.cells_csv(other).encode()
    written["differences.csv"] = differences_csv(results).encode()
    pictures: dict[str, bytes] = {}
    words: dict[str, str] = {}
    for name, (title, draw) in tqdm(figure_makers(results).items(), desc="figures", unit="figure"):
        if (data := draw()) is not None:
            pictures[name], words[name] = data, title
    readme = page_text(results, other, words, made, other_page)
    written |= pictures | {"short.md": text.readme_table(results, other).encode(), "README.md": readme.encode()}
    written["index.html"] = to_html(readme, f"DeepSkip: {TITLE}", pictures).encode()
    for name, data in written.items():
        files.write(to / name, data)
    return [to / name for name in written]


def main(argv: list[str] | None = None) -> None:
    """Writes the page; a folder that is no comparison's ends the program with an `error:` line."""
    arguments = build_parser().parse_args(argv)
    try:
        results = read(arguments.cells)
        other = read(arguments.other) if arguments.other else None
        for found in (results, other):
            if found is not None and OURS not in found.networks:
                raise ValueError(f"{found.folder / 'networks.json'} has no {OURS}, which all others are compared with")
        other_page = None
        if arguments.other_to is not None:
            if other is None:
                raise ValueError("--other_to is for the page of the grid that --other names")
            write_page(other, arguments.other_to)
            other_page = (Path(os.path.relpath(arguments.other_to, arguments.to)) / "README.md").as_posix()
        paths = write_page(results, arguments.to, other, other_page)
    except ValueError as error:
        stop(str(error))
    size = (arguments.to / "index.html").stat().st_size
    print(f"{len(paths)} files in {arguments.to}; open {arguments.to / 'index.html'} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
