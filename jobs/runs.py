"""A run's folder: its name, whether it is new, goes on or is finished, and its lock."""

import errno
import fcntl
import itertools
import json
import math
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deepskip.config import is_free
from deepskip.data_shards import storage
from deepskip.jobs.settings import differences, flatten

RECORD = "run.json"
SUMMARY = "summary.json"
LOCK = ".lock"
PEN = ".pen"
JOURNAL = "metrics.jsonl"
MACHINES = "machines.json"
BAD_SAMPLES = "bad_samples.jsonl"
FINISHED = "is finished"
# what run.tracking_uri says where there shall be no MLflow run
NOT_TRACKED = "none"
# what a training did before there was such a setting
UNKNOWN_BEFORE = {
    "data.copy_paste": 0.0,
    "model.enlarge": 1,
    "model.network": "deepskip",
    "model.options": {},
    "optim.momentum": 0.95,
}


class RunError(ValueError):
    """A run that cannot be started under its name; says why and what to do."""


class RunFinished(RunError):
    """The run is there, with the same settings, and finished; `folder` holds it."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass
class Run:
    """A run that this process holds: its folder, the MLflow run of an earlier part, and the lock."""

    folder: Path
    mlflow_run_id: str | None
    lock: IO[str]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


def claim(folder_of_runs: Path, name: str | None, stem: str, config: dict[str, Any]) -> Run:
    """Finds the folder of a training, makes it if need be, and locks it for as long as this process lives.

    A run of the same settings that is not finished goes on. With a name given, any other run of that name is an error,
    except that optim.steps may grow. Without one the name is `stem`, numbered on past other runs.
    Raises RunFinished for a given name of a finished run of these settings, else RunError.
    """
    names = [name] if name else (stem if i == 1 else f"{stem}-{i}" for i in itertools.count(1))
    for candidate in names:
        folder = folder_of_runs / candidate
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            if name:
                raise RunError(f"run {name} in {folder_of_runs} is being trained by another process") from None
            continue
        earlier = read_json(folder / RECORD)
        refusal = reason_against(folder, earlier, config, grow=name is not None)
        if refusal is None:
            return Run(folder, earlier.get("mlflow_run_id"), lock)
        lock.close()
        if name:
            message = f"run {name} in {folder_of_runs} {refusal}; choose another run.name or remove {folder}"
            raise RunFinished(message, folder) if refusal == FINISHED else RunError(message)
    raise AssertionError("names do not end")


def reason_against(folder: Path, earlier: dict[str, Any], config: dict[str, Any], grow: bool) -> str | None:
    """Says why a training of these settings cannot be, or go on, in a folder; None where it can."""
    if not earlier:
        return None
    before, now = UNKNOWN_BEFORE | flatten(earlier["config"]), flatten(config)
    changed = [
        key for key in differences(earlier["config"], config) if not is_free(key) and before.get(key) != now.get(key)
    ]
    longer = config["optim"]["steps"] > earlier["config"]["optim"]["steps"]
    if grow and longer and changed == ["optim.steps"]:
        return None
    if changed:
        return f"has other settings ({', '.join(changed)})"
    return FINISHED if (folder / SUMMARY).is_file() else None


def record(run: Run, config: dict[str, Any], mlflow_run_id: str | None) -> None:
    """Writes what the run is; a summary of an earlier, shorter part no longer holds and is removed."""
    run.mlflow_run_id = mlflow_run_id
    write_json(run.folder / RECORD, {"config": config, "mlflow_run_id": mlflow_run_id})
    (run.folder / SUMMARY).unlink(missing_ok=True)


def disk_full(error: BaseException | None) -> str | None:
    """Says what to do where an error, or what led to it, is that a disk is full; None where it is not."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f" at {error.filename}" if error.filename else ""
            return f"the disk is full{what}; the last checkpoint is whole. Make room, and the same command goes on from it."
        error = error.__cause__ or error.__context__
    return None


class LeaseLost(RuntimeError):
    """Other workers have taken up the training, while these were cut off from Ray."""


def acquire_writer_lease(folder: Path) -> str:
    """Take the right to write a run's checkpoints from workers that may still live elsewhere; returns its token."""
    lease = uuid.uuid4().hex
    write_json(folder / PEN, {"pen": lease})
    return lease


def check_writer_lease(folder: Path, lease: str) -> None:
    """Raise LeaseLost where somebody else has acquired the lease."""
    if read_json(folder / PEN) != {"pen": lease}:
        raise LeaseLost(f"other workers have taken up the training in {folder}")


def write_down(journal: Path, kind: str, step: int, values: dict[str, float]) -> int:
    """Appends what was measured at a step to a run's journal, as far as the disk takes it; gives its time stamp, in ms."""
    stamp = int(time.time() * 1000)
    # the training itself meets the full disk; what was measured is in memory still
    with suppress(OSError), journal.open("a") as file:
        file.write(json.dumps([kind, step, values, stamp]) + "\n")
    return stamp


def read_journal(journal: Path) -> list[tuple[str, int, dict[str, float], int]]:
    """Reads (kind, step, values, time stamp) of what a run measured; a line that was cut short is cut off."""
    if not journal.is_file():
        return []
    text = journal.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(journal, len(whole.encode()))
    return [(kind, step, values, stamp) for kind, step, values, stamp in map(json.loads, whole.splitlines())]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    storage.write_bytes(path, f"{json.dumps(value, indent=2)}\n".encode())


def without_nan(value: Any) -> Any:
    """Replaces nan by None, which JSON has a word for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


class BadSamples:
    """The samples that a training left out, each once, in bad_samples.jsonl of its folder; several ranks may add to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / BAD_SAMPLES
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        # a process that was killed may have left half a line
        self.seen = {self._identity(json.loads(line)) for line in lines if line.endswith("}")}

    def __len__(self) -> int:
        return len(self.seen)

    def add(self, report: dict[str, Any]) -> bool:
        """Writes down a report {"split", "shard", "key", "epoch", "reason"}; False where its sample is listed already."""
        if self._identity(report) in self.seen:
            return False
        self.seen.add(self._identity(report))
        with self.path.open("a") as file:
            file.write(json.dumps(report) + "\n")
        return True

    def _identity(self, report: dict[str, Any]) -> tuple[str, ...]:
        return report["split"], report["shard"], report["key"]
