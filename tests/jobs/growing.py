"""A small data set that grows, and trainings that follow it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import deepskip
from deepskip.data_shards.appending import append_split
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from deepskip.jobs import runs
from deepskip.jobs.journal import read_measured

ROOT = Path(__file__).parents[2]
SIDE = 32
SMALL = {
    "model.base_channels": 4, "model.levels": 3, "model.norm": "group", "data.crop": SIDE, "data.follow": True,
    "data.replay": 0.25, "data.replay_generations": 2, "data.poll_seconds": 0.05, "data.when_idle": "end",
    "data.idle_seconds": 0, "data.lanes": 2, "optim.steps": None, "optim.schedule": "constant", "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 2, "optim.global_batch_size": 4, "optim.momentum": 0.0, "run.log_every": 1,
    "run.validate_every": 1000, "run.checkpoint_every": 5, "run.panels": 0, "run.tracking_uri": "none",
    "cluster.cpus_per_worker": 1, "cluster.collective_timeout": 30,
}  # fmt: skip


def packed(folder: Path, first: int, count: int, inverted: bool = False) -> Path:
    """Pack squares on noise into shards of three."""
    rng = np.random.default_rng(first)
    samples = []
    for number in range(first, first + count):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        row, column = rng.integers(4, 16, 2)
        mask[row : row + 10, column : column + 10] = 1
        image = rng.normal(80, 20, (SIDE, SIDE, 2)) + 90 * mask[..., None]
        image = (255 - image if inverted else image).clip(0, 255).astype(np.uint8)
        samples.append(Sample(f"s{number}", image, mask))
    write_shards(samples, folder, num_classes=1, samples_per_shard=3)
    return folder


def begin(home: Path, count: int = 10) -> Path:
    """Pack generation 0 of a data set, and return its folder."""
    packed(home / "data" / "train", 0, count)
    packed(home / "data" / "val", 10_000, 2)
    return home / "data"


def grow(data: Path, number: int, count: int, inverted: bool = False, watermark: float | None = None) -> None:
    """Append the generation of a number."""
    staged = packed(data.parent / f"staged-{number}", 100 * number, count, inverted)
    append_split(str(data / "train"), staged, watermark=watermark)


def configured(home: Path, name: str, **settings: object) -> deepskip.Config:
    """Return the settings of a run; dots in names are written as __."""
    config = deepskip.Config()
    given = {key.replace("__", "."): value for key, value in settings.items()}
    for key, value in (SMALL | {"run.storage": str(home / "runs"), "run.name": name} | given).items():
        section, _, field = key.partition(".")
        setattr(getattr(config, section), field, value)
    if "data.path" not in given:
        config.data.path = str(home / "data")
    return config


def command(home: Path, name: str, ranks: int = 1, **settings: object) -> list[str]:
    """Return the command of a training in processes of its own."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    values = SMALL | {"run.storage": home / "runs", "run.name": name, "data.path": home / "data"} | given
    words = [f"--{key}={'null' if value is None else value}" for key, value in values.items()]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *start, "-m", "deepskip.jobs.train", *([] if ranks > 1 else ["--local"]), *words]


def started(words: list[str]) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step as a run has measured it, the last time if it was done more than once."""
    return {step: values["loss"] for kind, step, values, _ in read_measured(folder / runs.JOURNAL) if kind == "train"}


def done(folder: Path) -> int:
    """Return the last step that a run has logged, as another process or thread writes it."""
    path = folder / runs.JOURNAL
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)[1] for line in lines if line.startswith('["train"') and line.endswith("]")]
    return max(steps, default=0)


def admitted(folder: Path) -> list[tuple[int, int]]:
    """Return the admission log of a run."""
    path = folder / "admissions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["generation"], line["step"]) for line in lines]


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a function returns something true, for some seconds of a process that is not held."""
    for _ in range(round(seconds / 0.05)):
        if what():
            return
        time.sleep(0.05)
    raise TimeoutError("it took too long")
