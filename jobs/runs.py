"""A run's folder: its name, whether it is new, goes on or is finished, and its lock."""

import fcntl
import itertools
import json
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deepskip.config import is_free
from deepskip.data_shards import storage
from deepskip.jobs import journal
from deepskip.jobs.journal import BadSamples, BrokenFile, read_measured
from deepskip.jobs.settings import differences, flatten

RECORD = "run.json"
SUMMARY = "summary.json"
LOCK = ".lock"
PEN = ".pen"
JOURNAL = journal.MEASURED
MACHINES = "machines.json"
FINISHED = "is finished"
GOES_ON = "the same command goes on from the last checkpoint, which is whole"
CURE = "Remove it and give the same command again: checkpoints do not depend on it"
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
    """A run that this process holds: its folder, the MLflow run of an earlier part, the lock, and digests of its data."""

    folder: Path
    mlflow_run_id: str | None
    lock: IO[bytes]
    data: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


def claim(
    folder_of_runs: Path, name: str | None, stem: str, config: dict[str, Any], data: dict[str, str] | None = None
) -> Run:
    """Finds the folder of a training, makes it if need be, and locks it for as long as this process lives.

    A run of the same settings that is not finished goes on. With a name given, any other run of that name is an error,
    except that optim.steps may grow. Without one the name is `stem`, numbered on past other runs. data: a digest of each split.
    Raises RunFinished for a given name of a finished run of these settings, else RunError.
    """
    names = [name] if name else (stem if i == 1 else f"{stem}-{i}" for i in itertools.count(1))
    for candidate in names:
        folder = folder_of_runs / candidate
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = storage.lock_file(folder / LOCK)
        except OSError as error:
            raise RunError(f"{error.filename}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            if name:
                raise RunError(f"run {name} in {folder_of_runs} is being trained by another process") from None
            continue
        try:
            earlier = check_files(folder)
        except (BrokenFile, OSError) as error:
            lock.close()
            raise RunError(str(error)) from error
        refusal = reason_against(folder, earlier, config, grow=name is not None, data=data)
        if refusal is None:
            return Run(folder, earlier.get("mlflow_run_id"), lock, data)
        lock.close()
        if name:
            raise refused(folder, refusal)
    raise AssertionError("names do not end")


def check_name(folder: Path, config: dict[str, Any], data: dict[str, str] | None) -> None:
    """Raise RunError where a named run's folder holds a run of other settings or data; nothing is made, locked or mended."""
    try:
        earlier = read_record(folder)
    except (BrokenFile, OSError) as error:
        raise RunError(str(error)) from error
    refusal = reason_against(folder, earlier, config, grow=True, data=data)
    if refusal not in (None, FINISHED):
        raise refused(folder, refusal)


def refused(folder: Path, refusal: str) -> RunError:
    """Make the error of a named run that is not to be trained."""
    message = f"run {folder.name} in {folder.parent} {refusal}; choose another run.name or remove {folder}"
    return RunFinished(message, folder) if refusal == FINISHED else RunError(message)


def reason_against(
    folder: Path, earlier: dict[str, Any], config: dict[str, Any], grow: bool, data: dict[str, str] | None = None
) -> str | None:
    """Says why a training of these settings, and data, cannot be, or go on, in a folder; None where it can."""
    if not earlier:
        return None
    before, now = UNKNOWN_BEFORE | flatten(earlier["config"]), flatten(config)
    changed = [
        key for key in differences(earlier["config"], config) if not is_free(key) and before.get(key) != now.get(key)
    ]
    longer = config["optim"]["steps"] > earlier["config"]["optim"]["steps"]
    may_grow = grow and longer and changed == ["optim.steps"]
    if changed and not may_grow:
        return f"has other settings ({', '.join(changed)})"
    # runs of earlier versions have not noted it
    if data and (noted := earlier.get("data")) and noted != data:
        return "was trained on other shards, which were at the same data.path"
    if may_grow:
        return None
    return FINISHED if (folder / SUMMARY).is_file() else None


def record(run: Run, config: dict[str, Any], mlflow_run_id: str | None) -> None:
    """Writes what the run is; a summary of an earlier, shorter part no longer holds and is removed."""
    run.mlflow_run_id = mlflow_run_id
    write_json(run.folder / RECORD, {"config": config, "mlflow_run_id": mlflow_run_id, "data": run.data})
    (run.folder / SUMMARY).unlink(missing_ok=True)


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
    """Reads a JSON file of ours; {} where there is none. Raises BrokenFile where it is none that we write, or OSError."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path} is no JSON ({' '.join(str(error).split())[:200]}). {CURE}") from error
    if not isinstance(found, dict):
        raise BrokenFile(f"{path} holds no object. {CURE}")
    return found


def check_files(folder: Path) -> dict[str, Any]:
    """Looks through the files of a run and gives its record; raises BrokenFile, which says what to do, or OSError."""
    for name in (SUMMARY, PEN, MACHINES):
        read_json(folder / name)
    read_measured(folder / JOURNAL)
    BadSamples(folder)
    return read_record(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a run is, {} where there is none; raises BrokenFile, or OSError."""
    earlier = read_json(folder / RECORD)
    config = earlier.get("config")
    if earlier and not (
        isinstance(config, dict)
        and all(isinstance(section, dict) for section in config.values())
        and isinstance(config.get("optim", {}).get("steps"), int)
    ):
        raise BrokenFile(f"{folder / RECORD} holds no settings of a training. {CURE}")
    return earlier
