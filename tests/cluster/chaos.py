"""python -m tests.cluster.chaos: random faults for some minutes, and a report on whether everything held."""

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

import psutil

from deepskip.data_shards.commands import pack_coins
from tests.cluster.faults import FAULTS, Fault, add_machine, recover
from tests.cluster.nodes import ROOT, Nodes
from tests.cluster.training import SAMPLES, Training, check

STEPS = 60
RELATIVE = 1e-4


def main() -> None:
    """Runs the faults, writes the report, and exits with 1 where something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "chaos.md")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    started = time.time()
    done: list[tuple[float, str, str, float]] = []
    broken: list[str] = []
    trainings: list[Training] = []
    with tempfile.TemporaryDirectory(prefix="deepskip-chaos-") as home:
        pack_coins(Path(home) / "data", {"train": SAMPLES, "val": 2})
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


def one_training(
    training: Training, rng: random.Random, started: float, done: list[tuple[float, str, str, float]]
) -> None:
    """Trains once; random faults come after 0 to 4 seconds of undisturbed steps until the training is done."""
    training.submit()
    training.wait_for(2)
    while max(training.losses()) < STEPS - 20:
        time.sleep(rng.uniform(0, 4))
        whole = len(training.nodes.nodes) == 3 and training.world_sizes()[-1] == 2
        fault: Fault = rng.choice(FAULTS if whole else [Fault("a machine comes", add_machine, (1, 2)), *FAULTS[:3]])
        if fault.do is add_machine and len(training.nodes.nodes) == 3:
            continue
        step, workers = max(training.losses()), training.world_sizes()[-1]
        if step >= STEPS - 3:
            break
        try:
            seconds = recover(training, fault)
        except (ProcessLookupError, psutil.NoSuchProcess):
            # a machine had come, and the training was just ending this worker to go on with more
            continue
        done.append((time.time() - started, training.name, f"{fault.name} (step {step}, {workers} workers)", seconds))
        say(f"{training.name} step {step}: {fault.name}: {seconds:.1f} s")
    training.result(seconds=200)


def report(
    arguments: argparse.Namespace,
    minutes: float,
    trainings: list[Training],
    done: list[tuple[float, str, str, float]],
    broken: list[str],
) -> str:
    """Makes the page."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for _, _, what, seconds in done:
        by_kind[what.split(" (step")[0]].append(seconds)
    lines = [
        "# Chaos: the last report",
        "",
        f"`make chaos ARGS='--minutes {arguments.minutes:g} --seed {arguments.seed}'`: {minutes:.1f} minutes, {len(trainings)} "
        f"training{'s' * (len(trainings) > 1)} of {STEPS} steps, {len(done)} faults, "
        f"on {os.cpu_count()} cores ({platform.machine()}), "
        f"{time.strftime('%Y-%m-%d')}.",
        "",
        "Each training ran on 1 to 2 workers (`cluster.workers: [1, 2]`) of three Ray nodes, each in a network, process and",
        "mount namespace of its own. After each: exit status 0, every sample of every epoch taken once, every loss of every",
        f"execution of every step within {RELATIVE:g} relative of an unbroken run's, one MLflow run, FINISHED, every metric",
        "once.",
        "",
        f"**{'Everything held.' if not broken else f'{len(broken)} trainings did not hold:'}**",
        *(f"\n```\n{each[:2000]}\n```" for each in broken),
        "",
        "| fault | times | seconds to the next step: median | longest |",
        "|---|---|---|---|",
        *(f"| {kind} | {len(v)} | {statistics.median(v):.1f} | {max(v):.1f} |" for kind, v in sorted(by_kind.items())),
        "",
        "| after s | training | fault | next step after s |",
        "|---|---|---|---|",
        *(f"| {at:.0f} | {name} | {what} | {seconds:.1f} |" for at, name, what, seconds in done),
        "",
    ]
    return "\n".join(lines)


def say(line: str) -> None:
    """Prints at once."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
