"""The page and the plots of the benchmarks' results."""

from pathlib import Path
from typing import Any, NamedTuple


class Suite(NamedTuple):
    """How a suite is shown on the page.

    Attributes:
        heading: heading of the suite.
        note: what the columns mean.
        columns: heading, key, factor and format of each column.
        drawn: key of the column that is plotted.
    """

    heading: str
    note: str
    columns: tuple[tuple[str, str, float, str], ...]
    drawn: str


_RATIO = "{:.2f} x"
SUITES = {
    "bce_dice": Suite(
        "BCE + Dice, forward and backward",
        "Each implementation alternately with DeepSkip's, uint8 target. Bandwidth: counted bytes (logits read twice, gradient "
        "written, target read twice) over the time, next to that of a copy in the same run. Extra: the most that was "
        "allocated at once, the gradient too. Saved: kept for backward beyond the inputs.",
        (
            ("ms", "seconds", 1e3, "{:.3f}"), ("10 %", "seconds_10", 1e3, "{:.3f}"), ("90 %", "seconds_90", 1e3, "{:.3f}"),
            ("DeepSkip is", "deepskip_is", 1, _RATIO), ("GB/s", "bytes_per_second", 1e-9, "{:.1f}"),
            ("of a copy", "of_a_copy", 1, "{:.2f}"), ("extra MB", "peak_bytes", 1e-6, "{:.2f}"),
            ("saved MB", "saved_bytes", 1e-6, "{:.2f}"), ("launches", "launches", 1, "{:d}"),
        ),
        "seconds",
    ),
    "deep_skip": Suite(
        "The deep-skip stage, level by level",
        "All implementations alternately. Size: samples x height x width of the output, b = 8. Extra: the most that was "
        "allocated at once, outputs and gradients too. Saved: kept for backward beyond inputs and weights; predicted: every "
        "upsampled map for the plain form, nothing for ours.",
        (
            ("forward ms", "forward", 1e3, "{:.2f}"), ("DeepSkip is", "forward_ratio", 1, _RATIO),
            ("forward + backward ms", "seconds", 1e3, "{:.2f}"), ("DeepSkip is", "ratio", 1, _RATIO),
            ("extra MB", "peak_bytes", 1e-6, "{:.1f}"), ("saved MB", "saved_bytes", 1e-6, "{:.1f}"),
            ("predicted", "predicted_bytes", 1e-6, "{:.1f}"),
        ),
        "seconds",
    ),
    "ladder": Suite(
        "What each step brought on this CPU",
        "The network with one more form at a time, all alternately. Freed memory: the process keeps it for the next step; "
        "it is kept from its row on, and cannot be undone, so the first and the last form are measured again with it.",
        (
            ("training images/s", "train", 1, "{:.1f}"), ("of the first", "train_ratio", 1, _RATIO),
            ("inference images/s", "inference", 1, "{:.1f}"), ("of the first", "inference_ratio", 1, _RATIO),
        ),
        "train",
    ),
    "network": Suite(
        "The whole network",
        "All implementations alternately. A training step is forward, BCE + Dice and backward, without the optimizer; "
        "inference is forward without a gradient. Freed memory is kept by the process, for all of them.",
        (
            ("parameters", "parameters", 1, "{:,}"), ("training images/s", "train", 1, "{:.1f}"),
            ("DeepSkip is", "train_ratio", 1, _RATIO), ("inference images/s", "inference", 1, "{:.1f}"),
            ("DeepSkip is", "inference_ratio", 1, _RATIO), ("extra MB, training", "peak_bytes", 1e-6, "{:.0f}"),
        ),
        "train",
    ),
    "step": Suite(
        "Where a training step goes",
        "The trainer's step in parts, one after the other; the share is of their sum. By operator: on a GPU the profiler's "
        "kernels, on a CPU each operator as it is dispatched (which costs time of its own). Operations are those of the plain "
        "form, counted by torch; of the peak: relative to a large matrix product in the same run. The trace next to this page "
        "is the profiler's; on a CPU its own memory makes operators that write some megabytes several times as slow.",
        (
            ("ms", "seconds", 1e3, "{:.2f}"), ("share", "share", 100, "{:.1f} %"), ("calls", "calls", 1, "{:.0f}"),
            ("GFLOP", "operations", 1e-9, "{:.1f}"), ("GFLOP/s", "rate", 1e-9, "{:.0f}"),
            ("matrix product GFLOP/s", "peak", 1e-9, "{:.0f}"), ("of the peak", "utilisation", 1, "{:.2f}"),
        ),
        "seconds",
    ),
    "checkpoint": Suite(
        "A checkpoint",
        "Blocks of three training steps, all kinds alternately, with a checkpoint (model, moving average, optimizer; local "
        "disk, synced) after the first. Wait: what the step that saves waits, median and 90 %. Added: what the block takes "
        "longer than one without in the same round, the thread's share of the machine too (median of the differences).",
        (
            ("MB", "bytes", 1e-6, "{:.1f}"), ("wait ms", "wait", 1e3, "{:.2f}"), ("90 %", "wait_90", 1e3, "{:.2f}"),
            ("of a step", "of_a_step", 1e2, "{:.1f} %"), ("added ms", "added", 1e3, "{:.1f}"),
            ("of a step", "added_of_a_step", 1e2, "{:.1f} %"),
        ),
        "wait",
    ),
}  # fmt: skip


def page(results: dict[str, Any]) -> str:
    """Write the page: the environment, and a table for each size."""
    lines = ["# Benchmarks", ""]
    about = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    lines.append(about + ". Made by `make bench`.")
    for name, rows in results["suites"].items():
        suite = SUITES[name]
        lines += ["", f"## {suite.heading}", "", suite.note]
        for size in dict.fromkeys(row["size"] for row in rows):
            some = [row for row in rows if row["size"] == size]
            columns = [column for column in suite.columns if some[0].get(column[1]) is not None]
            lines += ["", f"### {size}, {some[0]['dtype']}", ""]
            lines.append("| implementation | " + " | ".join(column[0] for column in columns) + " |")
            lines.append("|---" * (len(columns) + 1) + "|")
            for row in some:
                cells = [
                    form.format(row[key] if factor == 1 else factor * row[key]) for _, key, factor, form in columns
                ]
                lines.append(f"| {row['implementation']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw a picture of each suite, bars for every size, and return the files; none if matplotlib is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: skipped the plots")
        return []
    paths = []
    for key, rows in results["suites"].items():
        suite = SUITES[key]
        heading, _, factor, _ = next(column for column in suite.columns if column[1] == suite.drawn)
        sizes = list(dict.fromkeys(row["size"] for row in rows))
        figure, axes = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 2.6), layout="constrained", squeeze=False)
        for axis, size in zip(axes[0], sizes, strict=True):
            some = [row for row in rows if row["size"] == size][::-1]
            colors = ["#c44e52" if row["implementation"] == "deepskip" else "#8c8c8c" for row in some]
            values = [factor * row[suite.drawn] for row in some]
            bars = axis.barh([row["implementation"] for row in some], values, color=colors)
            axis.bar_label(bars, fmt="%.3g", padding=2)
            axis.margins(x=0.15)
            axis.set(title=size, xlabel=heading)
        paths.append(folder / f"{name}-{key.replace('_', '-')}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        plt.close(figure)
    return paths
