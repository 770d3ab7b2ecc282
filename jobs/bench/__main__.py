"""Measure the overhead of the trainer and of Ray Train per step, compared with a bare loop under torchrun.

Run it as `python -m deepskip.jobs.bench`. The bare loop, the trainer under torchrun (without Ray) and the trainer under Ray run
alternately, so that other load on the machine affects all of them. The time of a
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
    parser.add_argument("--pairs", type=int, default=7, help="number of runs of each of the three")
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
                    "cluster.workers": workers,
                }
                options = [f"--{key}={value}" for key, value in settings.items()]
                run = home / "runs" / f"{workers}-{pair}"
                without = run.with_name(f"{run.name}-local")
                train = ["deepskip.jobs.train", *options, "--run.name"]
                pairs.append(
                    (
                        bare(workers, options),
                        trained(without, [*torchrun(workers), *train, without.name]),
                        trained(run, [sys.executable, "-m", *train, run.name]),
                    )
                )
                alone, without_ray, with_ray = pairs[-1]
                print(
                    f"{workers} workers, s per step: bare {alone:.4f}, torchrun {without_ray:.4f}, Ray {with_ray:.4f}",
                    flush=True,
                )
            rows.append({"workers": workers, "pairs": pairs})
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(table(rows, machine, arguments.steps))


def torchrun(workers: int) -> list[str]:
    """Return the start of a command that runs a module, to be named next, under torchrun on this machine.

    Args:
        workers: number of processes.
    """
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}", "-m"]


def bare(workers: int, options: list[str]) -> float:
    """Run the bare loop under torchrun, and return its seconds per step.

    Args:
        workers: number of processes.
        options: the settings of the training, as command-line arguments.
    """
    command = [*torchrun(workers), "deepskip.jobs.bench.bare", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    seconds = json.loads(done.stdout.splitlines()[-1])
    windows = [statistics.fmean(seconds[start : start + WINDOW]) for start in range(0, len(seconds), WINDOW)]
    return statistics.median(windows[LEFT_OUT:])


def trained(run: Path, command: list[str]) -> float:
    """Run a training, and return its seconds per step, from the speeds that it logged.

    Args:
        run: folder of the run.
        command: what runs it.
    """
    subprocess.run(command, capture_output=True, check=True)
    speeds = [values["images_per_second"] for kind, _, values, _ in read_measured(run / MEASURED) if kind == "train"]
    batch = json.loads((run / "run.json").read_text())["config"]["optim"]["global_batch_size"]
    return statistics.median(batch / speed for speed in speeds[LEFT_OUT:])


def table(rows: list[dict[str, Any]], machine: dict[str, Any], steps: int) -> str:
    """Return the results as Markdown.

    Args:
        rows: for each number of "workers" its "pairs" of (bare, under torchrun, under Ray) seconds per step.
        machine: "cores" and "torch" (version) of the machine.
        steps: number of steps of each run.
    """
    lines = [
        f"# The trainer and Ray Train, compared with a bare loop: {machine['cores']} cores, torch {machine['torch']}",
        "",
        f"`python -m deepskip.jobs.bench`: coins, 128x128, global batch 8, {steps} steps. The three run alternately; medians,",
        "and the overhead of each turn, sorted.",
        "",
        "| workers | s per step: bare | torchrun | Ray | what costs | each turn | median |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        medians = " | ".join(f"{statistics.median(values):.4f}" for values in zip(*row["pairs"], strict=True))
        for name, before, after in (("trainer", 0, 1), ("Ray", 1, 2), ("both", 0, 2)):
            costs = [turn[after] / turn[before] - 1 for turn in row["pairs"]]
            each = ", ".join(f"{cost:+.1%}" for cost in sorted(costs))
            start = f"| {row['workers']} | {medians}" if name == "trainer" else "| | | |"
            lines.append(f"{start} | {name} | {each} | {statistics.median(costs):+.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
