"""Run random faults for some minutes and report whether every check passed: `python -m tests.cluster.chaos`."""

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.cluster.faults import FAULTS, Fault, add_machine, recover
from tests.cluster.nodes import ROOT, Nodes
from tests.cluster.training import Training, check, pack

STEPS = 60
RELATIVE = 1e-4


class Recovery(NamedTuple):
    """A fault and the time until the next step.

    Attributes:
        at: seconds from the start to that step.
        step: newest step when the fault came.
        workers: number of workers when the fault came.
        seconds: time from the fault to the next step.
    """

    at: float
    training: str
    fault: str
    step: int
    workers: int
    seconds: float


def main() -> None:
    """Run the faults, write the report, and exit with 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "chaos.md")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    started = time.time()
    done: list[Recovery] = []
    broken: list[str] = []
    trainings: list[Training] = []
    with tempfile.TemporaryDirectory(prefix="deepskip-chaos-") as home:
        pack(Path(home) / "data")
        nodes = Nodes(Path(home) / "nodes")
        try:
            for number in range(3):
                nodes.start(number)
            nodes.wait(3)
            unbroken = Training(nodes, Path(home), "unbroken", STEPS, pace=0.0)
            unbroken.submit()
            if unbroken.result():
                sys.exit(unbroken.said())
            while time.time() - started < 60 * arguments.minutes:
                training = Training(nodes, Path(home), f"chaos-{len(trainings)}", STEPS, workers=(1, 2), pace=0.4)
                trainings.append(training)
                try:
                    one_training(training, rng, started, done)
                    check(training, unbroken, RELATIVE)
                except (AssertionError, TimeoutError, OSError) as error:
                    broken.append(f"{training.name}: {error}")
                    say(f"BROKEN {broken[-1]}")
                    if training.process is not None and training.process.poll() is None:
                        training.process.kill()
                nodes.restore()
        finally:
            nodes.stop()
        minutes = (time.time() - started) / 60
        arguments.report.write_text(report(arguments, minutes, trainings, done, broken))
    say(f"{len(done)} faults in {len(trainings)} trainings, {minutes:.1f} minutes; {len(broken)} broken")
    sys.exit(bool(broken))


def one_training(training: Training, rng: random.Random, started: float, done: list[Recovery]) -> None:
    """Train once, with faults after 0 to 4 seconds of undisturbed steps each, until the training is done."""
    training.submit()
    training.wait_for(2)
    while max(training.losses()) < STEPS - 20:
        time.sleep(rng.uniform(0, 4))
        whole = len(training.nodes.nodes) == 3 and training.world_sizes()[-1] == 2
        fault: Fault = rng.choice(FAULTS if whole else [Fault("machine added", add_machine, (1, 2)), *FAULTS[:3]])
        if fault.do is add_machine and len(training.nodes.nodes) == 3:
            continue
        step, workers = max(training.losses()), training.world_sizes()[-1]
        if step >= STEPS - 3:
            break
        try:
            seconds = recover(training, fault)
        except (ProcessLookupError, psutil.NoSuchProcess):
            # A machine had joined, and the training was just ending this worker to resume with more workers.
            continue
        done.append(Recovery(time.time() - started, training.name, fault.name, step, workers, seconds))
        say(f"{training.name} step {step}: {fault.name}: {seconds:.1f} s")
    training.result()


def report(
    arguments: argparse.Namespace,
    minutes: float,
    trainings: list[Training],
    done: list[Recovery],
    broken: list[str],
) -> str:
    """Return the page as Markdown."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for each in done:
        by_kind[each.fault].append(each.seconds)
    lines = [
        "# Chaos",
        "",
        "`make chaos` breaks trainings at random, and checks that each ends as an unbroken one does. This is its last report;",
        "[Faults](faults.md) explains what happens to a training.",
        "",
        f"| command | date | cores | minutes | trainings of {STEPS} steps | faults |",
        "|---|---|---:|---:|---:|---:|",
        f"| `make chaos ARGS='--minutes {arguments.minutes:g} --seed {arguments.seed}'` | {time.strftime('%Y-%m-%d')} "
        f"| {os.cpu_count()} ({platform.machine()}) | {minutes:.1f} | {len(trainings)} | {len(done)} |",
        "",
        "Each training ran on one or two workers (`cluster.workers: [1, 2]`) of three Ray nodes. Each node had its own",
        "network, processes and mounts. At the end of each training these were checked:",
        "",
        "* The exit status is 0.",
        "* Every sample of every epoch was used once.",
        f"* Every loss of every step is within {RELATIVE:g} relative of an unbroken run's, also where a step was repeated.",
        "* There is one MLflow run, FINISHED, with each metric once.",
        "",
        f"**{'Every check passed.' if not broken else f'{len(broken)} trainings failed a check:'}**",
        *(f"\n```text\n{each[:2000]}\n```" for each in broken),
        "",
        "Seconds from the fault to the next step:",
        "",
        "| fault | times | median | longest |",
        "|---|---:|---:|---:|",
        *(f"| {kind} | {len(v)} | {statistics.median(v):.1f} | {max(v):.1f} |" for kind, v in sorted(by_kind.items())),
        "",
        "All faults in their order:",
        "",
        "| training | step | workers | fault | seconds |",
        "|---|---:|---:|---|---:|",
        *(f"| {x.training} | {x.step} | {x.workers} | {x.fault} | {x.seconds:.1f} |" for x in done),
        "",
    ]
    return "\n".join(lines)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
