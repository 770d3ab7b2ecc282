"""The folder of a run: its name, its lock, and whether the run is new, unfinished or finished."""

import fcntl
import itertools
import json
import math
import platform
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from deepskip import identity
from deepskip.config import Config, is_free
from deepskip.data_shards import storage
from deepskip.data_shards.order import automatic_lanes
from deepskip.identity import Identity
from deepskip.jobs import admissions, journal
from deepskip.jobs.journal import BadSamples, BrokenFile, read_measured
from deepskip.jobs.settings import differences, flatten

RECORD = "run.json"
SUMMARY = "summary.json"
LOCK = ".lock"
PEN = ".pen"
JOURNAL = journal.MEASURED
MACHINES = "machines.json"
FINISHED = "is finished"
LANES = "data.lanes"
GOES_ON = "the same command resumes from the last checkpoint, which is intact"
CURE = "Remove it and run the same command again; checkpoints do not depend on it"
# value of run.tracking_uri for a training without an MLflow run
NOT_TRACKED = "none"
# how trainings behaved before these settings existed
UNKNOWN_BEFORE = {
    "augment.gamma": 0.0,
    "data.copy_paste": 0.0,
    "loss.overlap": "dice",
    "data.bands": None,
    "data.fixed_lanes": False,
    "data.lanes": 1,
    "data.follow": False,
    "data.replay": 0.0,
    "data.replay_generations": 10,
    "model.enlarge": 1,
    "model.network": "deepskip",
    "model.options": {},
    "optim.momentum": 0.95,
    "run.precision": None,
    "run.weights": None,
    "optim.schedule": "cosine",
}


class RunError(ValueError):
    """A run cannot be started under its name; the message says why, and what to do."""


class RunFinished(RunError):
    """A run with the same settings exists and is finished.

    Attributes:
        folder: folder of the run.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass
class Run:
    """A run that this process has locked.

    Attributes:
        folder: folder of the run.
        mlflow_run_id: MLflow run of an earlier part of the training; None if there is none.
        lock: the locked file; closing it releases the run.
        data: identity of each split; None if the data is not packed yet.
        lanes: number of lanes of an earlier part of the training, or that was chosen now; None if there is none.
    """

    folder: Path
    mlflow_run_id: str | None
    lock: IO[bytes]
    data: Mapping[str, Identity] | None = None
    lanes: int | None = None

    @property
    def name(self) -> str:
        """Return the name of the run, which is the name of its folder."""
        return self.folder.name


def claim(
    folder_of_runs: Path,
    name: str | None,
    stem: str,
    config: dict[str, Any],
    data: Mapping[str, Identity] | None = None,
) -> Run:
    """Find or create the folder of a training, and lock it for as long as this process lives.

    An unfinished run with the same settings is resumed. Any other run of a given name is an error, except that
    optim.steps may grow.

    Args:
        folder_of_runs: folder that holds the runs.
        name: name of the run; None takes `stem`, with a number if another run has that name.
        stem: default name.
        config: settings of the training by section.
        data: identity of each split; None if the data is not packed yet.

    Returns:
        The run, locked.

    Raises:
        RunFinished: the run of the given name has these settings and is finished.
        RunError: the run of the given name has other settings or data, or another process is training it. Also for any
            run whose files cannot be read or locked.
    """
    names = [name] if name else (stem if i == 1 else f"{stem}-{i}" for i in itertools.count(1))
    for candidate in names:
        folder = folder_of_runs / candidate
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = storage.lock_file(folder / LOCK)
        except OSError as error:
            raise RunError(f"{error.filename}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            if name:
                raise RunError(f"run {name} in {folder_of_runs} is being trained by another process") from None
            continue
        except OSError as error:
            lock.close()
            raise RunError(
                f"{folder / LOCK} cannot be locked: {error.strerror}. Set run.storage to a file system with locks (flock)"
            ) from error
        try:
            earlier = check_files(folder) or of_checkpoint(folder)
        except (BrokenFile, OSError) as error:
            lock.close()
            raise RunError(str(error)) from error
        refusal = reason_against(folder, earlier, config, grow=name is not None, data=data)
        if refusal is None:
            data = beginning_of(earlier, data, say=True)
            return Run(folder, earlier.get("mlflow_run_id"), lock, data, lanes_of(earlier))
        lock.close()
        if name:
            raise refused(folder, refusal)
    raise AssertionError("names do not end")


def check_name(folder: Path, config: dict[str, Any], data: Mapping[str, Identity] | None) -> None:
    """Raise RunError if a named run cannot be trained; nothing is created, locked or repaired.

    Args:
        folder: folder of the run, which may not exist.
        config: settings of the training by section.
        data: identity of each split; None if the data is not packed yet.

    Raises:
        RunError: the run has other settings or data, or its record cannot be read.
    """
    try:
        earlier = read_record(folder) or of_checkpoint(folder)
    except (BrokenFile, OSError) as error:
        raise RunError(str(error)) from error
    refusal = reason_against(folder, earlier, config, grow=True, data=data)
    if refusal not in (None, FINISHED):
        raise refused(folder, refusal)


def of_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the record of a run that has lost it, from its newest checkpoint; {} if there is none.

    Raises:
        BrokenFile: a later DeepSkip wrote a checkpoint.
        OSError: the checkpoints cannot be read.
    """
    if next(folder.glob("*/step-*.pt"), None) is None:
        return {}
    # imported on demand: it imports torch
    from deepskip import checkpoint

    try:
        state, _ = checkpoint.newest(folder)
    except checkpoint.CheckpointTooNew as error:
        raise BrokenFile(str(error)) from error
    if state is None:
        return {}
    data = state["data"].get("splits") or None
    return {"config": state["config"], "mlflow_run_id": state.get("mlflow_run_id"), "data": data}


def refused(folder: Path, refusal: str) -> RunError:
    """Return the error for a named run that cannot be trained.

    Args:
        folder: folder of the run.
        refusal: the reason, as `reason_against` returns it.
    """
    message = f"run {folder.name} in {folder.parent} {refusal}; choose another run.name or remove {folder}"
    return RunFinished(message, folder) if refusal == FINISHED else RunError(message)


def reason_against(
    folder: Path,
    earlier: dict[str, Any],
    config: dict[str, Any],
    grow: bool,
    data: Mapping[str, Identity] | None = None,
) -> str | None:
    """Return why a training cannot start or resume in a folder.

    Args:
        folder: folder of the run.
        earlier: the run's record; {} if there is none.
        config: settings of the training by section.
        grow: whether optim.steps may be larger than in the record.
        data: identity of each split; None if it is not known.

    Returns:
        The reason, FINISHED for a finished run with the same settings, or None if the training can start.
    """
    if not earlier:
        return None
    before, now = UNKNOWN_BEFORE | flatten(earlier["config"]), flatten(config)
    before[LANES] = lanes_of(earlier) or before[LANES]
    if now.get(LANES) == "auto":
        now[LANES] = before[LANES]
    changed = [
        key for key in differences(earlier["config"], config) if not is_free(key) and before.get(key) != now.get(key)
    ]
    few, many = (
        math.inf if each["optim"]["steps"] is None else each["optim"]["steps"] for each in (earlier["config"], config)
    )
    longer = many > few
    may_grow = grow and longer and changed == ["optim.steps"]
    if changed and not may_grow:
        return f"has other settings ({', '.join(changed)})"
    # the earliest versions did not record the data
    noted, accepted = earlier.get("data"), config.get("data", {}).get("accept")
    data = beginning_of(earlier, data)
    if data and isinstance(noted, dict) and (refusal := identity.refusal(noted, data, accepted)):
        return refusal
    if may_grow or not (folder / SUMMARY).is_file():
        return None
    summary = read_json(folder / SUMMARY)
    if grow and summary.get("stopped_early") and more_patient(earlier["config"], config):
        return None
    # A stream that was idle ends a run before its last step.
    ended_early = config.get("data", {}).get("follow") and summary.get("steps", many) < many
    return None if grow and ended_early and admissions.has_more(folder, config["data"]["path"]) else FINISHED


def more_patient(earlier: dict[str, Any], config: dict[str, Any]) -> bool:
    """Return whether run.patience is larger than it was; 0 is the largest."""
    before, now = (each["run"].get("patience", 0) or math.inf for each in (earlier, config))
    return bool(now > before)


def beginning_of(
    earlier: dict[str, Any], data: Mapping[str, Identity] | None, say: bool = False
) -> Mapping[str, Identity] | None:
    """Return the data on which a run resumes: of splits to which generations were appended, those that it began with.

    Args:
        earlier: the run's record; {} if there is none.
        data: identity of each split as it is now; None if it is not known.
        say: whether to print which splits have grown.
    """
    noted = earlier.get("data")
    if data is None or not isinstance(noted, dict):
        return data
    found = identity.beginning(noted, data)
    for split in found if say else ():
        first, last = identity.generations(found[split]), identity.generations(data[split])
        followed = split == "train" and earlier["config"].get("data", {}).get("follow")
        if first < last and not followed:
            print(f"{split} has {last} generations; the run resumes on the {first} that it began with", flush=True)
    return found


def generations_of(folder: Path) -> dict[str, int]:
    """Return how many generations of each split a run is trained on; nothing of a split of which it records none.

    Args:
        folder: folder of the run.
    """
    noted = read_record(folder).get("data")
    if not isinstance(noted, dict):
        return {}
    return {split: identity.generations(found) for split, found in noted.items() if isinstance(found, dict)}


def record(run: Run, config: dict[str, Any], mlflow_run_id: str | None) -> None:
    """Write the record of a run, and remove the summary of an earlier, shorter training.

    Args:
        run: the run; its MLflow run is set too.
        config: settings of the training by section.
        mlflow_run_id: MLflow run; None if the run is not tracked.
    """
    run.mlflow_run_id = mlflow_run_id
    chosen = {"lanes": run.lanes} if flatten(config).get(LANES) == "auto" and run.lanes else {}
    write_json(run.folder / RECORD, {"config": config, "mlflow_run_id": mlflow_run_id, "data": run.data} | chosen)
    (run.folder / SUMMARY).unlink(missing_ok=True)


def lanes_of(earlier: dict[str, Any]) -> int | None:
    """Return the number of lanes of a run, which does not change when it is resumed; None if it is not chosen yet.

    Args:
        earlier: the run's record; {} if there is none.
    """
    if not earlier:
        return None
    lanes = earlier.get("lanes") or flatten(earlier["config"]).get(LANES, UNKNOWN_BEFORE[LANES])
    return lanes if isinstance(lanes, int) else None


def choose_lanes(run: Run, config: Config, machines: int) -> None:
    """Replace data.lanes: auto by a number, in place, and record it before any rank starts; other values are kept.

    Args:
        run: the run, whose earlier number is kept if it has one.
        config: settings of the training.
        machines: number of machines with ranks.
    """
    if config.data.lanes != "auto":
        return
    settings = asdict(config)
    if run.lanes is None:
        run.lanes = automatic_lanes(machines, config.optim.global_batch_size)
        print(f"data.lanes is {run.lanes}, for {machines} machine{'s' * (machines > 1)}", flush=True)
        record(run, settings, run.mlflow_run_id)
    config.data.lanes = run.lanes


class NotShared(RuntimeError):
    """The folder of a run on a worker's machine is not the one on the driver's; the message has the machine."""


def check_shared(folder: Path, seconds: float = 10.0) -> None:
    """Raise NotShared if this machine does not see the folder of a run that another one has begun.

    Args:
        folder: folder of the run.
        seconds: time that a file system may take to show a new file.

    Raises:
        NotShared: the run's record does not appear.
    """
    until = time.monotonic() + seconds
    while not (folder / RECORD).is_file():
        if time.monotonic() > until:
            raise NotShared(
                f"{folder} does not exist on {platform.node()}; set run.storage to a folder on a file system that all "
                "machines share"
            )
        time.sleep(0.2)


def check_data(folder: Path, now: Mapping[str, Identity]) -> None:
    """Raise OtherData if a rank has loaded other data than the process that started the training.

    Args:
        folder: folder of the run.
        now: identity of each split, as the rank has loaded it.

    Raises:
        OtherData: the data was changed in between.
    """
    noted = read_record(folder).get("data")
    if isinstance(noted, dict) and (changes := identity.changes(noted, now)):
        raise identity.OtherData(
            f"the data was changed while the training of {folder} started: {changes}. Run the same command again"
        )


class LeaseLost(RuntimeError):
    """Other workers have taken over the training, while these workers were cut off from Ray."""


def acquire_writer_lease(folder: Path) -> str:
    """Acquire the right to write a run's checkpoints; workers that may still live elsewhere lose it.

    Args:
        folder: folder of the run.

    Returns:
        The token of the lease.
    """
    lease = uuid.uuid4().hex
    write_json(folder / PEN, {"pen": lease})
    return lease


def check_writer_lease(folder: Path, lease: str) -> None:
    """Raise LeaseLost if other workers have acquired the lease.

    Args:
        folder: folder of the run.
        lease: token of the own lease.

    Raises:
        LeaseLost: the lease has another token.
    """
    if read_json(folder / PEN) != {"pen": lease}:
        raise LeaseLost(f"other workers have taken over the training in {folder}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    storage.write_bytes(path, f"{json.dumps(value, indent=2)}\n".encode())


def without_nan(value: Any) -> Any:
    """Return a value in which each nan is replaced by None, because JSON has no nan."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that DeepSkip wrote.

    Args:
        path: the file.

    Returns:
        Its content; {} if there is no such file.

    Raises:
        BrokenFile: the file does not hold a JSON object.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path} is not valid JSON ({' '.join(str(error).split())[:200]}). {CURE}") from error
    if not isinstance(found, dict):
        raise BrokenFile(f"{path} holds no JSON object. {CURE}")
    return found


def check_files(folder: Path) -> dict[str, Any]:
    """Validate the files of a run.

    Args:
        folder: folder of the run.

    Returns:
        The run's record; {} if there is none.

    Raises:
        BrokenFile: a file is broken; the message says which, and what to do.
        OSError: a file cannot be read.
    """
    for name in (SUMMARY, PEN, MACHINES):
        read_json(folder / name)
    read_measured(folder / JOURNAL)
    BadSamples(folder)
    return read_record(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a run.

    Args:
        folder: folder of the run.

    Returns:
        The record; {} if there is none.

    Raises:
        BrokenFile: the record is not JSON, or holds no settings.
        OSError: the record cannot be read.
    """
    earlier = read_json(folder / RECORD)
    config = earlier.get("config")
    if earlier and not (
        isinstance(config, dict)
        and all(isinstance(section, dict) for section in config.values())
        and isinstance(config.get("optim", {}).get("steps", ""), int | None)
    ):
        raise BrokenFile(f"{folder / RECORD} holds no settings of a training. {CURE}")
    return earlier
