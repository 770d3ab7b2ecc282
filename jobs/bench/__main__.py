"""Measure the overhead of Ray Train and the trainer per step, compared with a bare loop under torchrun.

Run it as `python -m deepskip.jobs.bench`. Both run alternately, so that other load on the machine affects both. The time of a
step is the median over windows of log_every steps. The first windows, in which memory is allocated, are skipped. What the
trainer does between steps (validation, checkpoints) is not measured.

On 2 cores the processes of Ray (controller, agents, log monitor, GCS, waiting actors) take 14 % of one core, by their
processor time in /proc over 30 s. An idle actor wakes 97 times a second to look for signals, and no setting changes that.
Pinned workers, one malloc arena and SCHED_BATCH for Ray's processes changed nothing that was larger than the noise.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from deepskip.data_shards.commands import pack_coins
from deepskip.jobs.journal import MEASURED, read_measured

RESULTS = Path(__file__).parent / "results"
WINDOW, LEFT_OUT = 5, 2


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, and write results/NAME.json and results/NAME.md.

    Args:
        argv: command-line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m deepskip.jobs.bench", description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=7, help="number of runs of each")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--name", default=f"{os.cpu_count()}-cores")
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        pack_coins(home / "data")
        for workers in arguments.workers:
            pairs = []
            for pair in range(arguments.pairs):
                settings = {
                    "data.path": home / "data",
                    "optim.steps": arguments.steps,
                    "run.log_every": WINDOW,
                    "run.validate_every": arguments.steps,
                    "run.storage": home / "runs",
                    "run.name": f"{workers}-{pair}",
                    "cluster.workers": workers,
                }
                options = [f"--{key}={value}" for key, value in settings.items()]
                pairs.append((bare(workers, options), trained(home / "runs" / f"{workers}-{pair}", options)))
                print(
                    f"{workers} workers: bare {pairs[-1][0]:.4f} s per step, trained {pairs[-1][1]:.4f} s", flush=True
                )
            rows.append({"workers": workers, "pairs": pairs})
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(table(rows, machine, arguments.steps))


def bare(workers: int, options: list[str]) -> float:
    """Run the bare loop under torchrun, and return its seconds per step.

    Args:
        workers: number of processes.
        options: the settings of the training, as command-line arguments.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
    command += ["-m", "deepskip.jobs.bench.bare", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    seconds = json.loads(done.stdout.splitlines()[-1])
    windows = [statistics.fmean(seconds[start : start + WINDOW]) for start in range(0, len(seconds), WINDOW)]
    return statistics.median(windows[LEFT_OUT:])


def trained(run: Path, options: list[str]) -> float:
    """Run the training job, and return its seconds per step, from the speeds that it logged.

    Args:
        run: folder of the run.
        options: the settings of the training, as command-line arguments.
    """
    subprocess.run([sys.executable, "-m", "deepskip.jobs.train", *options], capture_output=True, check=True)
    speeds = [values["images_per_second"] for kind, _, values, _ in read_measured(run / MEASURED) if kind == "train"]
    batch = json.loads((run / "run.json").read_text())["config"]["optim"]["global_batch_size"]
    return statistics.median(batch / speed for speed in speeds[LEFT_OUT:])


def table(rows: list[dict[str, Any]], machine: dict[str, Any], steps: int) -> str:
    """Return the results as Markdown.

    Args:
        rows: for each number of "workers" its "pairs" of (bare, trained) seconds per step.
        machine: "cores" and "torch" (version) of the machine.
        steps: number of steps of each run.
    """
    lines = [
        f"# Ray Train and the trainer, compared with a bare loop: {machine['cores']} cores, torch {machine['torch']}",
        "",
        f"`python -m deepskip.jobs.bench`: coins, 128x128, global batch 8, {steps} steps, medians; both run alternately.",
        "",
        "| workers | bare, s per step | trained, s per step | overhead of each pair | median |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        costs = [with_ray / alone - 1 for alone, with_ray in row["pairs"]]
        alone, with_ray = (statistics.median(values) for values in zip(*row["pairs"], strict=True))
        each = ", ".join(f"{cost:+.1%}" for cost in costs)
        lines.append(f"| {row['workers']} | {alone:.4f} | {with_ray:.4f} | {each} | {statistics.median(costs):+.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
