"""Checkpoints: written completely or not at all, and read without running code from them, from any storage.

A file is a zip as torch.save writes it. Its comment is "sha256:" and the 64 hexadecimal digits of all bytes before
them. So a change of any byte is detected, and plain torch.load(weights_only=True) still reads the file.
"""

import errno
import hashlib
import io
import re
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from deepskip import weight_files
from deepskip.checkpoint_check import Unsound, check_model, check_zip
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location

FORMAT = "deepskip-checkpoint"
VERSION = 2
FOLDER = "checkpoints"
BEST = "best.pt"
# The suffix that a broken checkpoint's name gets when a training skips it.
BROKEN = ".broken"
# Times that a folder is listed in which all checkpoints vanish before they are read.
LISTINGS = 5
_MARK = b"sha256:"
_DIGITS = 64


class DataState(TypedDict):
    """The description of the training data in a checkpoint: the fields of `training_step.DataInfo`."""

    in_channels: int
    num_classes: int
    ignore_index: int
    mean: list[float]
    std: list[float]
    preparation: dict[str, Any]
    splits: NotRequired[dict[str, dict[str, str | int]]]
    classes: NotRequired[list[str]]


class RandomState(TypedDict):
    """States of torch's random numbers.

    Attributes:
        cpu: state of the CPU's generator, (bytes,) uint8.
        cuda: state of the GPU's generator, (bytes,) uint8, or None without a GPU.
    """

    cpu: Tensor
    cuda: Tensor | None


class NetworkState(TypedDict):
    """What a network is built from.

    Attributes:
        config: settings of the training by section, as `dataclasses.asdict` makes them of `Config`.
        data: description of the training data.
        model: weights and buffers by name, of any shape (*,).
        ema: their moving averages, or None if there are none.
    """

    config: dict[str, Any]
    data: DataState
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None


class StepState(NetworkState):
    """What `TrainingStep` adds to a network.

    Attributes:
        optimizer: state of the optimizer; None in the best checkpoint.
        rng: states of the random numbers.
        step: number of steps done.
    """

    optimizer: dict[str, Any] | None
    rng: RandomState
    step: int


class RecordState(TypedDict):
    """What the loop around the steps adds.

    Attributes:
        best: metrics and step of the best validation, or None before the first one.
        stale: number of validations after the best one.
        seconds: time spent on the training.
    """

    best: dict[str, float] | None
    stale: int
    seconds: float


class StreamState(TypedDict):
    """The admission log of a training that follows a stream of g generations in s shards.

    Attributes:
        admissions: generations and the steps from which they are trained on, (g, 2) int64.
        shards: number of shards of each generation, (g,) int64.
        samples: number of samples of each shard, (s,) int64.
        digests: sha256 of the manifest of each generation, (g, 32) uint8.
        taken: sum of the fingerprints of all samples that the steps have taken.
    """

    admissions: Tensor
    shards: Tensor
    samples: Tensor
    digests: Tensor
    taken: int


class State(StepState, RecordState):
    """What a training saves.

    Attributes:
        mlflow_run_id: MLflow's run of the training, or None.
        stream: the admission log, if the training follows a stream.
    """

    mlflow_run_id: str | None
    stream: NotRequired[StreamState]


class FileState(State):
    """What a checkpoint file holds.

    Attributes:
        format: FORMAT.
        version: VERSION of the DeepSkip that wrote it.
    """

    format: str
    version: int


class ModelState(NetworkState, RecordState):
    """A checkpoint without the parts that only a training needs.

    Attributes:
        step: number of steps that the training had done.
        mlflow_run_id: MLflow's run of the training, or None.
    """

    step: int
    mlflow_run_id: str | None


class CheckpointError(RuntimeError):
    """No complete checkpoint written by DeepSkip was found."""


class CheckpointTooNew(CheckpointError):
    """The checkpoint was written by a later DeepSkip: it is not broken and must not be skipped."""


class CheckpointNotWritten(RuntimeError):
    """A checkpoint could not be written.

    The message says where, why, what to do, and from which checkpoint the training can resume.
    """


def pack(state: Mapping[str, Any]) -> bytearray:
    """Return the bytes of a checkpoint file.

    Args:
        state: a `State` or `ModelState`, which torch.save stores; "format" and "version" are added.

    Returns:
        The zip of torch.save with the checksum as its comment.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    data = bytearray(buffer.getbuffer())
    # A zip ends with the length of its comment, here 0.
    data[-2:] = (len(_MARK) + _DIGITS).to_bytes(2, "little")
    data += _MARK
    data += hashlib.sha256(data).hexdigest().encode()
    return data


def unpack(data: bytes, location: Location) -> FileState:
    """Return the state in a checkpoint file's bytes, on the CPU.

    Args:
        data: the whole file.
        location: where the bytes come from, for error messages.

    Raises:
        CheckpointError: if the bytes are incomplete, changed or not written by DeepSkip. The message has the location.
        CheckpointTooNew: if a later DeepSkip wrote them.
    """
    body, digits = memoryview(data)[:-_DIGITS], data[-_DIGITS:]
    if bytes(body[-len(_MARK) :]) != _MARK:
        raise CheckpointError(
            f"{location} is not a complete checkpoint: its end is missing, or DeepSkip did not write it"
        )
    if hashlib.sha256(body).hexdigest().encode() != digits:
        raise CheckpointError(
            f"{location} is not a complete checkpoint: its bytes changed since it was written (sha256 differs)"
        )
    try:
        check_zip(io.BytesIO(data), len(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # A checksum is no signature. Untrusted files fail in many ways: zip, pickle, runtime and unicode errors among them.
    except Exception as error:
        raise CheckpointError(f"{location} is not a complete checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("version"), int):
        raise CheckpointError(f"{location} was not written by DeepSkip")
    if state["version"] > VERSION:
        raise CheckpointTooNew(
            f"{location} has version {state['version']}; this DeepSkip reads up to {VERSION}. Install a later one."
        )
    return cast(FileState, state)


def save(state: Mapping[str, Any], location: Location) -> None:
    """Write a checkpoint, completely or not at all.

    Args:
        state: see `pack`.
        location: path or URL of the file.

    Raises:
        OSError: if the storage cannot be written to.
    """
    storage.write_bytes(location, pack(state))


def read(location: Location) -> FileState:
    """Read one checkpoint onto the CPU.

    Raises:
        CheckpointError: if it is broken or not a checkpoint.
        OSError: if the storage cannot be read.
    """
    return unpack(storage.read_bytes(location), location)


def read_model(location: Location) -> ModelState:
    """Read a checkpoint, or weights as safetensors, and check that a model can be built from it.

    Raises:
        CheckpointError: if it is broken, not a checkpoint, or its model cannot be built.
        ImportError: if its network is from a package that is not installed.
        OSError: if the storage cannot be read.
    """
    if not str(location).endswith(weight_files.SUFFIX):
        return sound(read(location), location)
    try:
        return sound(cast(ModelState, weight_files.unpack(storage.read_bytes(location))), location)
    except weight_files.TooNew as error:
        raise CheckpointTooNew(f"{location} {error}") from error
    except weight_files.BrokenWeights as error:
        raise CheckpointError(f"{location} {error}") from error


def sound(state: ModelState, location: Location) -> ModelState:
    """Return a state unchanged if a model can be built from it.

    Args:
        state: state of a checkpoint.
        location: where the state comes from, for error messages.

    Raises:
        CheckpointError: if no model can be built from it.
        ImportError: if its network is from a package that is not installed.
    """
    try:
        check_model(state)
    except Unsound as error:
        raise CheckpointError(f"{location} contains no usable model: {error}") from error
    return state


def step_path(run: Location, step: int) -> Any:
    """Return the location of a step's checkpoint: a Path, or a URL if the run is stored at one."""
    return storage.join(storage.locate(run), FOLDER, f"step-{step:08d}.pt")


def names_in(run: Location) -> list[str]:
    """Return the names of the files in a run's folder of checkpoints, or [] if there is no such folder."""
    try:
        return storage.names(storage.join(storage.locate(run), FOLDER))
    except (FileNotFoundError, NotADirectoryError):
        return []


def step_paths(run: Location) -> list[Any]:
    """Return the locations of a run's step checkpoints, newest first."""
    steps = [int(m[1]) for n in names_in(run) if (m := re.fullmatch(r"step-(\d{8,})\.pt", n))]
    return [step_path(run, step) for step in sorted(steps, reverse=True)]


def find_newest(run: Location) -> tuple[tuple[bytes, State] | None, dict[Location, str]]:
    """Find the newest complete checkpoint of a run.

    Returns:
        The checkpoint as its file's bytes and its state, or None if there is none. Then, by location, the fault of each
        newer file that is broken.

    Raises:
        CheckpointTooNew: if a later DeepSkip wrote a checkpoint.
        OSError: if a file cannot be read: an unreachable storage must not look like an empty one. A bad sector is
            reported as a fault instead. Also if checkpoints vanish each time that they are looked for.
    """
    faults: dict[Location, str] = {}
    # Workers that are cut off may still write a newer checkpoint, and remove the one that was listed.
    for _ in range(LISTINGS):
        vanished = 0
        for path in step_paths(run):
            try:
                data = storage.read_bytes(path)
                return (data, unpack(data, path)), faults
            except CheckpointTooNew:
                raise
            except CheckpointError as error:
                faults[path] = str(error)
            except FileNotFoundError:
                vanished += 1
            except OSError as error:
                # EIO is a bad sector; an older checkpoint may still be readable.
                if error.errno != errno.EIO:
                    raise
                faults[path] = f"{path} cannot be read: {error.strerror}"
        if not vanished:
            return None, faults
    raise OSError(f"the checkpoints of {run} vanish while they are read; does another process train it?")


def newest(run: Location) -> tuple[State | None, list[str]]:
    """Return the newest complete checkpoint of a run and the faults of newer ones.

    Returns:
        The state, or None if there is none, and a message for each newer file that is broken.

    Raises:
        CheckpointTooNew: as `find_newest`.
        OSError: as `find_newest`.
    """
    found, faults = find_newest(run)
    return found[1] if found else None, list(faults.values())


def set_aside(path: Location) -> None:
    """Rename a broken checkpoint, so that it is never again taken for the newest one."""
    storage.rename(path, storage.name(path) + BROKEN)


def prune(run: Location, keep: int) -> None:
    """Remove all but the newest `keep` step checkpoints."""
    for path in step_paths(run)[keep:]:
        storage.remove(path)


def load_for_inference(run_or_path: Location) -> ModelState:
    """Read a checkpoint or safetensors file, or a run's best checkpoint, or its newest if it has no best one.

    A name that is neither is that of a model installed with DeepSkip (`weight_files.installed`).

    The file may come from an untrusted source, so it is checked before anything is built from it.

    Raises:
        CheckpointError: if there is no checkpoint, or none that is complete and usable.
        CheckpointTooNew: if a later DeepSkip wrote it.
        ImportError: if its network is from a package that is not installed.
        OSError: if the storage cannot be read.
    """
    location = storage.locate(run_or_path)
    folder = storage.join(location, FOLDER)
    found = names_in(location)
    if BEST in found:
        return read_model(storage.join(folder, BEST))
    if not found:
        try:
            return read_model(location)
        except FileNotFoundError:
            installed = weight_files.installed()
            if str(run_or_path) in installed:
                return read_model(installed[str(run_or_path)])
            raise CheckpointError(
                f"{location} does not exist; name a run's folder (runs/NAME), a checkpoint file, or a model that comes "
                f"with DeepSkip ({', '.join(installed)})"
            ) from None
        except IsADirectoryError:
            pass
    state, faults = newest(location)
    if state is None:
        detail = "; ".join(faults) or f"looked for {storage.join(folder, BEST)} and {folder}/step-*.pt"
        raise CheckpointError(f"{location} holds no checkpoint: {detail}")
    return sound(state, location)
