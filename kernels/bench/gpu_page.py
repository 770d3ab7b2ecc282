"""Make the page and the figures of a GPU run from its rows: python -m deepskip.kernels.bench.gpu_page DIR [--counts FILE]."""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepskip.kernels.bench import journal

Row = dict[str, Any]


def median(row: Row, key: str = "seconds") -> float:
    """Return the median of a row's timings, in seconds."""
    return statistics.median(row[key])


def milliseconds(row: Row) -> str:
    """Format a row's median and its tenth and ninetieth percentiles, in ms."""
    times = sorted(row["seconds"])
    low, high = times[len(times) // 10], times[(9 * len(times)) // 10 if len(times) > 1 else 0]
    return f"{1e3 * median(row):.3f} ({1e3 * low:.3f} to {1e3 * high:.3f})"


def table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, its first column text and the others numbers."""
    yield "| " + " | ".join(heading) + " |"
    yield "|---|" + "---:|" * (len(heading) - 1)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def ratio_of(row: Row) -> float:
    """Return the contender's time over DeepSkip's, timed alternately."""
    return median(row) / median(row, "deepskip_seconds")


def compared(row: Row) -> str:
    """Format the ratio, in bold where DeepSkip loses."""
    found = ratio_of(row)
    return f"{found:.2f} x" if found >= 1 else f"**{found:.2f} x**"


def megabytes(row: Row, key: str) -> str:
    """Format bytes in MB; empty if the row has none."""
    return f"{row[key] / 1e6:.1f}" if row.get(key) is not None else ""


def of(rows: list[Row], suite: str) -> list[Row]:
    """Return the measured rows of a suite."""
    return [row for row in rows if row.get("suite") == suite and "seconds" in row]


def environment_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the run's environment, and what failed or was skipped."""
    for row in rows:
        if row.get("suite") == "environment":
            yield ", ".join(
                f"{key} {value}" for key, value in row.items() if key not in ("suite", "phase", "toy", "at")
            )
            yield ""
    if any(row.get("toy") for row in rows):
        yield "**A rehearsal at toy size on a CPU, through Triton's interpreter: its times say nothing.**"
        yield ""
    for row in rows:
        if "failed" in row or "skipped" in row:
            about = ", ".join(
                str(row[key]) for key in ("part", "phase", "size", "operator", "implementation") if key in row
            )
            yield f"* {about}: {row.get('failed') or row['skipped']}"
    clocks = [row["clocks.sm"] for row in rows if row.get("suite") == "clocks" and "clocks.sm" in row]
    if clocks:
        yield f"SM clock after each phase: {', '.join(clocks)}."
    yield ""


def gate_lines(rows: list[Row]) -> Iterator[str]:
    """Yield how many comparisons with float64 were right, and those that were not."""
    found = [row for row in rows if row.get("suite") == "gate" and "right" in row]
    if not found:
        return
    yield f"## Correctness\n\n{sum(row['right'] for row in found)} of {len(found)} comparisons with float64 are right."
    yield ""
    yield from (
        f"* wrong: {row['operator']}, {row['dtype']}: an error of {row['error']}, of its norm; plain: {row['plain_error']}"
        for row in found
        if not row["right"]
    )


def bandwidth_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the card's bandwidths."""
    if found := of(rows, "bandwidth"):
        yield "## Bandwidth\n"
        cells = [
            (f"{row['implementation']} {row['bytes'] / 2**30:.3g} GiB", f"{row['bytes'] / median(row) / 1e9:.0f}")
            for row in found
        ]
        yield from table(("", "GB/s"), cells)


def launch_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the times of our operators."""
    if found := of(rows, "launches"):
        yield "## Our operators\n"
        cells = [(f"{row['size']}: {row['operator']}", milliseconds(row)) for row in found]
        yield from table(("", "ms (10 to 90 %)"), cells)


def contender_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the stage, batch norm and the loss compared with other implementations; DeepSkip loses at ratios below one."""
    headings = {
        "stage contenders": "The deep-skip stage", "norm contenders": "Batch norm and ReLU", "loss contenders": "BCE + Dice"
    }  # fmt: skip
    for suite, heading in headings.items():
        if not (found := of(rows, suite)):
            continue
        yield f"## {heading}, compared with others\n\nDeepSkip alternately with each; bold where it loses.\n"
        cells = [
            (
                f"{row['size']}: {row['implementation']}" + (f", {row['operator']}" if "operator" in row else ""),
                milliseconds(row), f"{1e3 * median(row, 'deepskip_seconds'):.3f}", compared(row),
                megabytes(row, "saved_bytes"), megabytes(row, "deepskip_saved_bytes"), megabytes(row, "peak_bytes"),
                megabytes(row, "deepskip_peak_bytes"),
            )
            for row in found
        ]  # fmt: skip
        heads = ("", "ms (10 to 90 %)", "DeepSkip, ms", "takes", "saved, MB", "DeepSkip", "extra, MB", "DeepSkip")
        yield from table(heads, cells)


def network_lines(rows: list[Row]) -> Iterator[str]:
    """Yield the whole network, launched and graphed, compared with DeepSkip in the same run."""
    if not (found := of(rows, "network")):
        return
    yield "## The whole network\n\nForward, loss and backward, or inference; bold where DeepSkip loses.\n"
    ours = {(row["operator"], row["graphed"]): row for row in found if row["implementation"] == "deepskip"}
    cells = []
    for row in found:
        mine = ours.get((row["operator"], row["graphed"]))
        ratio = median(row) / median(mine) if mine else None
        images = int(row["size"].split("x")[0]) / median(row)
        cells.append(
            (
                f"{row['implementation']}, {row['operator']}" + (", CUDA graph" if row["graphed"] else ""), milliseconds(row),
                f"{images:.1f}", "" if ratio is None else f"{ratio:.2f} x" if ratio >= 1 else f"**{ratio:.2f} x**",
                megabytes(row, "peak_bytes"), f"{row['parameters']:,}",
            )
        )  # fmt: skip
    yield from table(("", "ms (10 to 90 %)", "images/s", "of DeepSkip", "extra, MB", "parameters"), cells)


def candidate_lines(rows: list[Row]) -> Iterator[str]:
    """Yield, for each launch, the time of the shape in use and the fastest shape."""
    found = [row for row in rows if row.get("suite") == "candidates"]
    if not found:
        return
    yield "## Shapes of the launches\n\nAll timings are in rows.jsonl.\n"
    cells = []
    for key in dict.fromkeys((row["operator"], row["size"]) for row in found):
        mine = [row for row in found if (row["operator"], row["size"]) == key]
        timed = [row for row in mine if "seconds" in row]
        taken = next((row for row in timed if row["taken"]), None)
        best = min(timed, key=median) if timed else None
        cells.append(
            (
                f"{key[1]}: {key[0]}", "" if taken is None else f"{1e3 * median(taken):.3f}",
                "" if best is None else f"{1e3 * median(best):.3f}", "" if best is None else best["implementation"],
                str(len(timed)), str(sum(bool(row["spills"]) for row in mine)),
                str(sum("failed" in row for row in mine)),
            )
        )  # fmt: skip
    yield from table(("", "the product's, ms", "fastest, ms", "its shape", "timed", "spill", "fail"), cells)


def page(rows: list[Row], broken: int, counts: list[Row]) -> str:
    """Write the page of a run, as far as it got."""
    lines = ["# A GPU run", ""]
    lines += list(environment_lines(rows))
    if broken:
        lines += [f"{broken} rows are incomplete, because their writer was stopped; they are not shown.", ""]
    for part in (bandwidth_lines, gate_lines, launch_lines, contender_lines, network_lines, candidate_lines):
        lines += list(part(rows))
    if counts:
        # Only the counts need torch.
        from deepskip.kernels.bench.counts import table as counts_table

        lines += ["## Instructions and bytes, counted", "", counts_table(counts), ""]
    return "\n".join(lines) + "\nMade by `python -m deepskip.kernels.bench.gpu_page`.\n"


def figures(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the contenders of the stage and of the network; nothing if matplotlib is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: skipped the figures")
        return []
    bars: dict[str, list[tuple[str, float, bool]]] = {}
    for row in of(rows, "stage contenders"):
        some = bars.setdefault(f"stage, {row['operator']}", [])
        some.append((f"{row['size']}: {row['implementation']}", ratio_of(row), False))
    for row in of(rows, "network"):
        title = f"network, {row['operator']}" + (", CUDA graph" if row["graphed"] else "") + ", ms"
        bars.setdefault(title, []).append(
            (row["implementation"], 1e3 * median(row), row["implementation"] == "deepskip")
        )
    made = []
    for title, some in bars.items():
        figure, axis = plt.subplots(figsize=(7, 0.7 + 0.28 * len(some)), layout="constrained")
        names, values, mine = zip(*some[::-1], strict=True)
        drawn = axis.barh(range(len(names)), values, color=["#c44e52" if one else "#8c8c8c" for one in mine])
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
        axis.margins(x=0.15)
        axis.set_xlabel(title if "network" in title else "times DeepSkip's", fontsize=8)
        axis.set_title(title.removesuffix(", ms"), fontsize=9)
        if "stage" in title:
            axis.axvline(1, color="#c44e52", linewidth=1)
        path = folder / (
            "".join(c if c.isalnum() else "-" for c in title.removesuffix(", ms")).replace("--", "-") + ".svg"
        )
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        made.append(path)
    return made


def main() -> None:
    """Write page.md and the figures into the run's folder."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.kernels.bench.gpu_page", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder that kernels.bench.gpu wrote")
    parser.add_argument("--counts", type=Path, help="what kernels.bench.builds --json wrote")
    arguments = parser.parse_args()
    file = arguments.folder / "rows.jsonl"
    rows, broken = journal.read(file)
    if not rows:
        parser.error(f"{file} has no rows; python -m deepskip.kernels.bench.gpu --out {arguments.folder} makes them")
    counts = json.loads(arguments.counts.read_text()) if arguments.counts else []
    text = page(rows, broken, counts)
    drawn = figures(rows, arguments.folder)
    text += "".join(f"\n![{path.stem}]({path.name})\n" for path in drawn)
    (arguments.folder / "page.md").write_text(text)
    print(arguments.folder / "page.md")


if __name__ == "__main__":
    main()
