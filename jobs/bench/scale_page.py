"""Write the tables of docs/scale.md and its plot, from the model and stored results.

Run it as `python -m deepskip.jobs.bench.scale_page`. GPUs were not measured: their numbers are assumptions.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepskip.cluster.scale import (
    Faults,
    Link,
    Machine,
    all_reduce_link,
    best_interval,
    fitted_link,
    fitted_machine,
    goodput,
    step,
    strong,
    weak,
)
from deepskip.data_shards.order import automatic_lanes
from deepskip.jobs.bench.fetching import simulate

ROOT = Path(__file__).parents[2]
PAGE, PLOT = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.svg"
RESULTS = Path(__file__).parent / "results" / "scaling.json"
NS = [2**power for power in range(11)]
# rows of the table
SHOWN = (1, 64, 256, 1024)
# counted by torch's FlopCounterMode: forward and backward of the default network, a 3 x 128 x 128 image
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
    """Return what jobs.bench.scaling measured, sizes and image counts as numbers."""
    return json.loads(RESULTS.read_text())


def measured_machine(results: dict[str, Any]) -> Machine:
    """Fit the model to what one process, and all-reduces over two, were measured to take."""
    link = fitted_link([tuple(row) for row in results["all_reduce"]["2"]], 2)
    return fitted_machine({int(k): (v["mean"], v["deviation"]) for k, v in results["alone"].items()}, link)


def check_table(results: dict[str, Any]) -> str:
    """Return the table of errors of the model, the least and the greatest, where nothing was fitted to what it predicts."""
    machine, on = measured_machine(results), results["machine"]
    alone, together = results["alone"], results["together"]

    def predicted(images: str) -> float:
        return step(2, 2 * int(images), machine, algorithm="ring").seconds

    efficiencies = []
    # 8 images in all, and 8 a process
    for images, share in (("4", 2.0), ("8", 1.0)):
        measured = alone["8"]["mean"] / (share * together[images]["mean"])
        efficiencies.append(step(1, 8, machine).seconds / (share * predicted(images)) / measured)
    counts = sorted(map(int, together))
    ratios = {
        f"step of 2 processes, {counts[0]} to {counts[-1]} images each": [
            predicted(images) / measured["mean"] for images, measured in together.items()
        ]
    }
    ratios["efficiency of 2 processes, strong and weak"] = efficiencies
    ratios["all-reduce over 3 and 4 processes"] = [
        all_reduce_link(n, size, machine.inner, "ring") / seconds
        for n in (3, 4)
        for size, seconds in results["all_reduce"][str(n)]
    ]
    lines = [
        f"| {on['name']}, {on['cores']} cores, torch {on['torch']}, {on['date']} | error of the model |",
        "|---|---:|",
    ]
    for name, values in ratios.items():
        errors = [f"{100 * (value - 1):+.0f}" for value in sorted({min(values), max(values)})]
        lines.append(f"| {name} | {' to '.join(errors)} % |")
    return "\n".join(lines)


def scaling_table() -> str:
    """Return the table of steps and efficiencies."""
    lines = [
        f"| GPUs | {STRONG_BATCH:,} images, ms a step | efficiency | 25 Gb/s "
        f"| {WEAK_BATCH} a GPU, ms a step | efficiency | 25 Gb/s |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    fixed, growing = (
        [f(list(SHOWN), batch, m) for m in (GPU, CLOUD)] for f, batch in ((strong, STRONG_BATCH), (weak, WEAK_BATCH))
    )
    for i, n in enumerate(SHOWN):
        times = step(n, STRONG_BATCH, GPU).seconds, step(n, n * WEAK_BATCH, GPU).seconds
        cells = [f"{1e3 * times[0]:.1f}", *(f"{each[i]:.2f}" for each in fixed)]
        cells += [f"{1e3 * times[1]:.1f}", *(f"{each[i]:.2f}" for each in growing)]
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def faults_table() -> str:
    """Return the table of faults, the best interval between checkpoints, and the share of time that is kept work."""
    lines = [
        "| GPUs | faults a day | best interval, s | goodput | every 30 min | spot: faults a day | best interval, s | goodput |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for n in (8, 64, 1024):
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


# 100 TB
SHARDS, SHARD_GB, SHARD_SAMPLES, LANES_BATCH = 100_000, 1.0, 1000, 8192


def lanes_table() -> str:
    """Return the table of what a machine reads in an epoch, with one lane and with automatic ones."""
    lines = [
        "| machines | lanes | shards fetched | opened | GB in cache |",
        "|---:|---:|---:|---:|---:|",
    ]
    many = automatic_lanes(1024, LANES_BATCH)
    for machines, lanes, window in ((1024, 1, 16), (1024, many, 2), (1000, many, 2)):
        found = simulate(machines, SHARDS, SHARD_SAMPLES, LANES_BATCH, window, lanes)
        cells = (machines, lanes, found.fetched, found.opened, found.cached * SHARD_GB)
        lines.append(f"| {' | '.join(f'{cell:,.0f}' for cell in cells)} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Return every generated part of the page by its name."""
    results = read_results()
    return {
        "check": check_table(results),
        "scaling": scaling_table(),
        "faults": faults_table(),
        "lanes": lanes_table(),
    }


def filled(page: str) -> str:
    """Return the page with its generated parts replaced: those between <!-- NAME --> and <!-- end -->."""
    for name, text in tables().items():
        # A backslash in a table must not be read as one of re.sub's escapes.
        text = text.replace("\\", r"\\")
        page, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\1\n{text}\n\n\2", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for {name}; it must have one")
    return page


def draw() -> None:
    """Draw efficiency by number of GPUs, strong and weak, and goodput by the interval between checkpoints."""
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
