"""Update the tables of docs/scale.md and its plot, from the scaling model and stored results.

Run it as `python -m deepskip.jobs.bench.scale_page`. GPUs were not measured: their numbers are assumptions.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepskip.cluster.scale import (
    GRADIENT_BYTES,
    Faults,
    Link,
    Machine,
    all_reduce,
    all_reduce_link,
    best_interval,
    fitted_link,
    fitted_machine,
    goodput,
    step,
    strong,
    weak,
)

ROOT = Path(__file__).parents[2]
PAGE, PLOT = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.svg"
RESULTS = Path(__file__).parent / "results" / "scaling.json"
NS = [2**power for power in range(11)]
# Forward and backward pass of the default network for a 3 x 128 x 128 image, counted by torch's FlopCounterMode.
FLOPS_128 = 3.3557e9
# Crops of 512 x 512 pixels, relative to 128 x 128.
PIXELS = (512 / 128) ** 2
# PNGs of 128 x 128 pixels read per second in one process (data_shards/bench/results); the page assumes 4 processes per GPU.
PNG_128 = 2109.0
# Assumptions, none of them measured: docs/scale.md has the source of each.
NVLINK, INFINIBAND, ETHERNET = Link(3e-6, 450e9), Link(5e-6, 50e9), Link(50e-6, 3.125e9)
GPU_FLOPS = 20e12
GPU = Machine(
    image_seconds=FLOPS_128 * PIXELS / GPU_FLOPS,
    step_seconds=8e-3,
    deviation=0.03,
    inner=NVLINK,
    outer=INFINIBAND,
    loader_images=4 * PNG_128 / PIXELS,
)
CLOUD = replace(GPU, outer=ETHERNET, devices_per_node=1)
STRONG_BATCH, WEAK_BATCH = 1024, 16
HOUR = 3600.0
# 419 interruptions in 54 days on 16,384 GPUs, 8 per node (The Llama 3 Herd of Models, 2024).
STEADY = Faults(node_mtbf=54 * 24 * HOUR * 2048 / 419, recovery=60.0, checkpoint=0.3)
SPOT = replace(STEADY, node_mtbf=24 * HOUR)


def read_results() -> dict[str, Any]:
    """Return the results of jobs.bench.scaling, as its `measure` returns them."""
    return json.loads(RESULTS.read_text())


def measured_machine(results: dict[str, Any]) -> Machine:
    """Fit the scaling model to the measured steps of one process and the measured all-reduces over two."""
    link = fitted_link([tuple(row) for row in results["all_reduce"]["2"]], 2)
    return fitted_machine({int(k): (v["mean"], v["deviation"]) for k, v in results["alone"].items()}, link)


def check_table(results: dict[str, Any]) -> str:
    """Return the table of predicted and measured times; it omits the measurements that the model was fitted to."""
    machine = measured_machine(results)
    lines = ["| what | processes | measured, ms | model, ms | error |", "|---|---|---|---|---|"]
    for n in (3, 4):
        for size, seconds in results["all_reduce"][str(n)]:
            predicted = all_reduce_link(n, size, machine.inner, "ring")
            lines.append(row(f"all-reduce of {size:,.0f} bytes", n, seconds, predicted))
    for images, seconds in results["together"].items():
        predicted = step(2, 2 * int(images), machine, algorithm="ring").seconds
        lines.append(row(f"step, {images} images a process", 2, seconds["mean"], predicted))
    alone, together = results["alone"], results["together"]
    for name, images, share in (
        ("strong scaling, 8 images in all", "4", 2.0),
        ("weak scaling, 8 images a process", "8", 1.0),
    ):
        measured = alone["8"]["mean"] / (share * together[images]["mean"])
        model = step(1, 8, machine).seconds / (share * step(2, 2 * int(images), machine, algorithm="ring").seconds)
        error = 100 * (model / measured - 1)
        lines.append(f"| efficiency, {name} | 2 | {measured:.3f} | {model:.3f} | {error:+.0f} % |")
    return "\n".join(lines)


def row(what: str, n: int, measured: float, predicted: float) -> str:
    """Return a row of that table.

    Args:
        what: what was measured.
        n: number of processes.
        measured: measured time, s.
        predicted: the model's time, s.
    """
    return (
        f"| {what} | {n} | {1e3 * measured:.2f} | {1e3 * predicted:.2f} | {100 * (predicted / measured - 1):+.0f} % |"
    )


def fit_text(results: dict[str, Any]) -> str:
    """Return the fitted parameters of the model, and the machine that was measured, as a paragraph."""
    machine, on, saved = measured_machine(results), results["machine"], results["checkpoint"]
    link = machine.inner
    return (
        f"Fitted: {1e3 * machine.step_seconds:.0f} ms a step and {1e3 * machine.image_seconds:.1f} ms an image (one process, "
        f"one thread), {100 * machine.deviation:.0f} % deviation from step to step; {1e6 * link.latency:.0f} µs a message and "
        f"{link.bandwidth / 1e9:.2f} GB/s (all-reduce over two processes). A checkpoint of {saved['bytes'] / 1e6:.1f} MB takes "
        f"{1e3 * saved['seconds']:.0f} ms on the local disk. "
        f"{on['name']}, {on['cores']} cores, torch {on['torch']}, {on['date']}."
    )


def scaling_table() -> str:
    """Return the table of step times and efficiencies by number of GPUs."""
    fast, slow = "8 a node, 400 Gb/s", "1 a node, 25 Gb/s"
    lines = [
        f"| GPUs | strong: {STRONG_BATCH:,} images, ms a step | efficiency, {fast} | {slow} "
        f"| weak: {WEAK_BATCH} a GPU, ms a step | efficiency, {fast} | {slow} |",
        "|---|---|---|---|---|---|---|",
    ]
    fixed, growing = (
        [f(NS, batch, m) for m in (GPU, CLOUD)] for f, batch in ((strong, STRONG_BATCH), (weak, WEAK_BATCH))
    )
    for i, n in enumerate(NS):
        times = step(n, STRONG_BATCH, GPU).seconds, step(n, n * WEAK_BATCH, GPU).seconds
        cells = [f"{1e3 * times[0]:.1f}", *(f"{each[i]:.2f}" for each in fixed)]
        cells += [f"{1e3 * times[1]:.1f}", *(f"{each[i]:.2f}" for each in growing)]
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table() -> str:
    """Return the table of the parts of a step's time."""
    lines = [
        "| GPUs, batch | compute, ms | fixed part of it | waiting for the slowest | loss sums | gradients | loader |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, batch in ((8, STRONG_BATCH), (64, STRONG_BATCH), (1024, STRONG_BATCH), (1024, 1024 * WEAK_BATCH)):
        found = step(n, batch, GPU)
        values = (found.compute, GPU.step_seconds, found.waiting, found.sums, found.gradients, found.loader)
        lines.append(f"| {n}, {batch:,} | " + " | ".join(f"{1e3 * value:.2f}" for value in values) + " |")
    return "\n".join(lines)


def all_reduce_table() -> str:
    """Return the table of algorithms to all-reduce the gradients over 1,024 GPUs."""
    lines = [
        "| 1,024 GPUs, all gradients at once | 8 a node, 400 Gb/s a node: ms | one a node, 25 Gb/s: ms |",
        "|---|---|---|",
    ]
    for name, algorithm, hierarchical in (
        ("one ring", "ring", False),
        ("one tree", "tree", False),
        ("ring in the node, ring between", "ring", True),
        ("ring in the node, tree between", "tree", True),
    ):
        times = [all_reduce(1024, GRADIENT_BYTES, m, algorithm, hierarchical) for m in (GPU, CLOUD)]  # type: ignore[arg-type]
        lines.append(f"| {name} | {1e3 * times[0]:.2f} | {1e3 * times[1]:.2f} |")
    return "\n".join(lines)


def faults_table() -> str:
    """Return the table of faults, the best interval between checkpoints, and the goodput."""
    lines = [
        "| GPUs (8 a node) | faults a day | best interval, s | goodput | with one every 30 min "
        "| spot: faults a day | best interval, s | goodput |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n in (8, 64, 256, 1024):
        cells = []
        for faults in (STEADY, SPOT):
            mtbf = faults.mtbf(n // 8)
            best = best_interval(mtbf, faults.checkpoint)
            kept = goodput(best, mtbf, faults.recovery, faults.checkpoint)
            cells += [f"{24 * HOUR / mtbf:.2f}", f"{best:.0f}", f"{kept:.4f}"]
            if faults is STEADY:
                cells.append(f"{goodput(1800, mtbf, faults.recovery, faults.checkpoint):.4f}")
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Return every generated part of the page by its name."""
    results = read_results()
    return {
        "fit": fit_text(results),
        "check": check_table(results),
        "scaling": scaling_table(),
        "parts": parts_table(),
        "all-reduce": all_reduce_table(),
        "faults": faults_table(),
    }


def filled(page: str) -> str:
    """Return the page with its generated parts replaced: the text between <!-- NAME --> and <!-- end -->.

    Args:
        page: the page, as Markdown.

    Raises:
        ValueError: if the page does not have exactly one place for each part.
    """
    for name, text in tables().items():
        # A backslash in a table must not be read as one of re.sub's escapes.
        text = text.replace("\\", r"\\")
        page, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\1\n{text}\n\n\2", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for {name}; it must have one")
    return page


def draw() -> None:
    """Plot efficiency over the number of GPUs, strong and weak, and goodput over the interval between checkpoints."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    # A fixed salt, so that the same numbers make the same file.
    plt.rcParams |= {"svg.hashsalt": "scale", "font.size": 9}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for machine, style, name in ((GPU, "-", "8 a node, 400 Gb/s"), (CLOUD, "--", "1 a node, 25 Gb/s")):
        left.plot(NS, weak(NS, WEAK_BATCH, machine), style, color="C0", label=f"weak, {WEAK_BATCH} a GPU; {name}")
        left.plot(
            NS, strong(NS, STRONG_BATCH, machine), style, color="C3", label=f"strong, {STRONG_BATCH:,} in all; {name}"
        )
    left.set(
        xscale="log", xlabel="GPUs", ylabel="efficiency", ylim=(0, 1.05), title="model; GPU numbers are assumptions"
    )
    left.set_xticks(NS[::2], [str(n) for n in NS[::2]])
    left.minorticks_off()
    left.legend(fontsize=7, loc="lower left")
    intervals = np.geomspace(5, 20000, 200)
    for faults, color, name in ((STEADY, "C0", "steady"), (SPOT, "C3", "spot")):
        for n, style in ((64, "-"), (1024, "--")):
            mtbf = faults.mtbf(n // 8)
            curve = [goodput(x, mtbf, faults.recovery, faults.checkpoint) for x in intervals]
            right.plot(intervals, curve, style, color=color, label=f"{name}, {n:,} GPUs")
            best = best_interval(mtbf, faults.checkpoint)
            right.plot(best, goodput(best, mtbf, faults.recovery, faults.checkpoint), "o", color=color, markersize=4)
    right.set(
        xscale="log",
        xlabel="work between checkpoints, s",
        ylabel="goodput",
        ylim=(0, 1.05),
        title="faults; dots: Daly's best",
    )
    right.legend(fontsize=7, loc="lower left")
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Write the page and the plot."""
    PAGE.write_text(filled(PAGE.read_text()))
    draw()
    print(PAGE, PLOT)


if __name__ == "__main__":
    main()
