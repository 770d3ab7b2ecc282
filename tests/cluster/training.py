"""A small training on test nodes, and the checks that its result must pass after any faults."""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import psutil

from deepskip.data_shards.sample import Sample
from deepskip.data_shards.sources.coins import coins
from deepskip.data_shards.writer import write_shards
from tests.cluster.nodes import Node, Nodes, until
from tests.cluster.recorder import FOLDER, KILL_AT_RENAME, PACE

SAMPLES, BATCH, CHECKPOINT_EVERY = 24, 4, 5
SETTINGS = {
    "model.base_channels": 4,
    "model.levels": 3,
    "model.norm": "group",
    "data.crop": 32,
    # For two machines that is one lane a sample of the batch, so that each worker has lanes and shards of its own.
    "data.lanes": "auto",
    # At the default rate, rounding grows to 3e-4 of the loss in 60 steps, so that 1 worker and 2 workers differ. At
    # this rate it stays at 1e-7, where a lost momentum makes 1e-3.
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 5,
    "optim.global_batch_size": BATCH,
    "run.log_every": 1,
    "run.checkpoint_every": CHECKPOINT_EVERY,
    "run.panels": 0,
    "cluster.resize_seconds": 3,
    "cluster.collective_timeout": 20,
    "cluster.max_failures": 3,
}


def pack(folder: Path) -> None:
    """Pack coins into shards of three, of which each lane has two, and two coins to validate."""
    for split, count in (("train", SAMPLES), ("val", 2)):
        samples = (Sample(*coin) for coin in coins(split, count))
        write_shards(samples, folder / split, num_classes=1, samples_per_shard=3)


@dataclass
class Training:
    """A run of `steps` steps on `workers` workers, slowed down to `pace` seconds a step."""

    nodes: Nodes
    home: Path
    name: str
    steps: int
    workers: int | tuple[int, int] = 2
    pace: float = 0.1
    variables: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.records = self.home / "records" / self.name
        self.records.mkdir(parents=True)
        self.output = self.home / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        """Return the run's folder."""
        return self.home / "runs" / self.name

    def submit(self) -> None:
        """Start the job on the head's machine."""
        workers = list(self.workers) if isinstance(self.workers, tuple) else self.workers
        settings = SETTINGS | {"optim.steps": self.steps, "run.validate_every": self.steps} | self.settings
        settings |= {"run.name": self.name, "cluster.workers": workers, "data.path": self.home / "data"}
        settings |= {"run.storage": self.home / "runs"}
        command = [
            sys.executable,
            "-m",
            "deepskip.jobs.train",
            *(f"--{key}={value}" for key, value in settings.items()),
        ]
        hook = {"RAY_TRAIN_CALLBACKS": "tests.cluster.recorder.Recorder", FOLDER: str(self.records)}
        self.process = self.nodes.run(command, self.output, hook | {PACE: str(self.pace)} | self.variables)

    def result(self, seconds: float = 600) -> int:
        """Wait for the job and return its exit status."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} did not end in {seconds:g} s:\n{self.said()}") from None

    def said(self) -> str:
        """Return what the job printed."""
        return self.output.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """Read all records of the workers, each with its group, rank, world_size, pid and node."""
        found = []
        for path in sorted(self.records.glob("*.jsonl")):
            whole = path.read_text().rpartition("\n")[0].splitlines()
            parsed = [json.loads(line) for line in whole]
            found += [parsed[0] | line for line in parsed[1:]]
        return found

    def wait_for(
        self,
        step: int = 1,
        after: float = 0.0,
        world_size: int | None = None,
        other_than: str | None = None,
        seconds: float = 300,
    ) -> float:
        """Wait for a step after a moment, by `world_size` workers and another group than one; return its time."""

        def done() -> float | None:
            if self.process is not None and self.process.poll() not in (None, 0):
                raise AssertionError(f"{self.name} ended:\n{self.said()}")
            times = [
                line["time"]
                for line in self.lines()
                if "loss" in line
                and line["step"] >= step
                and line["time"] > after
                and line["group"] != other_than
                and world_size in (None, line["world_size"])
            ]
            return min(times, default=None)

        try:
            return float(until(done, seconds, f"step {step} of {self.name}"))
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.said()}") from None

    def group(self) -> str:
        """Return the newest group that trains or trained."""
        return str(max(self.lines(), key=lambda line: int(line["group"]))["group"])

    def worker(self, rank: int) -> tuple[Node, psutil.Process]:
        """Find the newest worker of a rank."""
        last = max((line for line in self.lines() if line["rank"] == rank), key=lambda line: line["time"])
        node = next(node for node in self.nodes.nodes.values() if node.mark == last["node"])
        return node, self.nodes.outside(node, last["pid"])

    def drivers(self) -> list[psutil.Process]:
        """Find the job's driver, as seen from outside."""
        head = self.nodes.nodes[0]
        return [p for p in self.nodes.processes(head) if p.cmdline()[1:3] == ["-m", "deepskip.jobs.train"]]

    def kill_rank(self, rank: int) -> float:
        """Kill a worker and return the time."""
        _, process = self.worker(rank)
        moment = time.time()
        process.kill()
        return moment

    def kill_at_rename(self) -> float:
        """Kill rank 0 between writing its next checkpoint and renaming it; return the time."""
        marker = self.records / KILL_AT_RENAME
        marker.touch()
        until(lambda: not marker.exists(), 60, "the next checkpoint")
        return time.time()

    def losses(self) -> dict[int, set[float]]:
        """Return the losses of each step, in all its executions."""
        found: dict[int, set[float]] = {}
        for line in self.lines():
            if "loss" in line:
                found.setdefault(line["step"], set()).add(line["loss"])
        return found

    def repeated(self) -> set[int]:
        """Return the steps that were done more than once."""
        times = Counter(line["step"] for line in self.lines() if "loss" in line)
        return {step for step, count in times.items() if count > 1}

    def samples(self) -> dict[int, list[tuple[int, int]]]:
        """Return the (epoch, sample) pairs of each step's last execution, over all ranks."""
        lines = self.lines()
        last = {line["step"]: line["group"] for line in sorted(lines, key=lambda line: line["time"]) if "loss" in line}
        found: dict[int, list[tuple[int, int]]] = {step: [] for step in last}
        for line in lines:
            if "samples" in line and last.get(line["step"]) == line["group"]:
                found[line["step"]] += [(epoch, sample) for epoch, sample in line["samples"]]
        return found

    def world_sizes(self) -> list[int]:
        """Return the sizes of the groups that trained, in order of time."""
        groups = {line["group"]: line["world_size"] for line in sorted(self.lines(), key=lambda line: line["time"])}
        return list(groups.values())


def check(training: Training, unbroken: Training, relative: float = 0.0, uri: str | None = None) -> None:
    """Check that a training equals the unbroken one: each sample once an epoch, the losses, one MLflow run.

    Args:
        training: training with faults.
        unbroken: training without faults.
        relative: by how much a loss may differ; 0 is bit for bit.
        uri: MLflow's address, if it is not the runs' own.
    """
    assert training.process is not None
    assert training.process.poll() == 0, training.said()
    taken = training.samples()
    assert sorted(taken) == list(range(1, training.steps + 1))
    per_epoch = SAMPLES // BATCH
    for epoch in range(training.steps // per_epoch):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        assert Counter(pair for step in steps for pair in taken[step]) == Counter((epoch, s) for s in range(SAMPLES))
    expected = unbroken.losses()
    for step, losses in training.losses().items():
        (right,) = expected[step]
        for loss in losses:
            assert loss == right if not relative else math.isclose(loss, right, rel_tol=relative), (step, loss, right)
    check_mlflow(training, "FINISHED", uri)
    summary = json.loads((training.folder / "summary.json").read_text())
    other = json.loads((unbroken.folder / "summary.json").read_text())
    assert math.isclose(summary["val"]["loss"], other["val"]["loss"], rel_tol=max(relative, 1e-12))


def check_mlflow(training: Training, status: str, uri: str | None = None) -> None:
    """Check that there is one run of the training's name with this status, and each step's loss once."""
    client = mlflow.MlflowClient(uri or f"sqlite:///{training.home / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("deepskip")
    named = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{training.name}'")
    assert [run.info.status for run in named] == [status]
    history = client.get_metric_history(named[0].info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == sorted(training.losses())
    for metric in history:
        assert metric.value in training.losses()[metric.step]
