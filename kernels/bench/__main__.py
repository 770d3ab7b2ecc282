"""Runs the microbenchmarks and writes their results and a page: python -m kernels.bench, or `make bench`."""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.bench import measure

HERE = Path(__file__).parent


def main() -> None:
    """Runs the suites; the exit status is pytest's."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        suites = [str(suite) for suite in sorted(HERE.glob("bench_*.py"))]
        status = pytest.main(
            [*suites, "-q", "-p", "no:timeout", "-o", "addopts=", "--benchmark-disable-gc", f"--benchmark-json={path}"]
        )
        if status:
            sys.exit(status)
        rows = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    results: dict[str, Any] = {"environment": measure.environment(device), "bce_dice": rows}
    name = re.sub(r"[^a-z0-9]+", "-", results["environment"]["name"].lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(page(results) + f"\n![times]({name}.svg)\n")
    plot(results, arguments.out / f"{name}.svg")
    print(page(results))


def page(results: dict[str, Any]) -> str:
    """Makes the page: what it was taken on, and a table a size."""
    lines = ["# BCE + Dice, forward and backward", ""]
    lines.append(
        ", ".join(f"{key} {value}" for key, value in results["environment"].items()) + ". Made by `make bench`."
    )
    lines.append("")
    lines.append(
        "Each implementation in turns with DeepSkip's, uint8 target. Bandwidth: counted bytes (logits read twice, gradient "
        "written, target read twice) over the time, beside that of a copy in the same run. Extra: the most that was "
        "allocated at once, the gradient too. Saved: kept for backward beyond the inputs."
    )
    sizes = list(dict.fromkeys(row["size"] for row in results["bce_dice"]))
    for size in sizes:
        rows = [row for row in results["bce_dice"] if row["size"] == size]
        lines += ["", f"## {size}, {rows[0]['dtype']}", ""]
        on_gpu = rows[0]["launches"] is not None
        lines.append(
            "| implementation | ms | 10 % | 90 % | DeepSkip is | GB/s | of a copy | extra MB | saved MB |"
            + " launches |" * on_gpu
        )
        lines.append("|---|---|---|---|---|---|---|---|---|" + "---|" * on_gpu)
        for row in rows:
            times = " | ".join(f"{1000 * row[key]:.3f}" for key in ("seconds", "seconds_10", "seconds_90"))
            rate, whole = row["bytes_per_second"], row["copy_bandwidth"]
            lines.append(
                f"| {row['implementation']} | {times} | {row['deepskip_is']:.2f} x | {rate / 1e9:.1f} | {rate / whole:.2f} | "
                f"{row['peak_bytes'] / 1e6:.2f} | {row['saved_bytes'] / 1e6:.2f} |" + f" {row['launches']} |" * on_gpu
            )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the times of every size as bars, whiskers from 10 % to 90 %; says so where matplotlib is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"matplotlib is not installed: {path.name} is not drawn")
        return
    sizes = list(dict.fromkeys(row["size"] for row in results["bce_dice"]))
    figure, axes = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 2.4), layout="constrained", squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        rows = [row for row in results["bce_dice"] if row["size"] == size][::-1]
        times, low, high = ([1000 * row[key] for row in rows] for key in ("seconds", "seconds_10", "seconds_90"))
        whiskers = [[t - a for t, a in zip(times, low, strict=True)], [b - t for t, b in zip(times, high, strict=True)]]
        colors = ["#c44e52" if row["implementation"] == "deepskip" else "#8c8c8c" for row in rows]
        axis.barh([row["implementation"] for row in rows], times, xerr=whiskers, color=colors)
        axis.set(title=size, xlabel="ms, forward and backward")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
