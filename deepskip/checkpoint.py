"""Checkpoints: written whole or not at all, read without running anything from them, wherever their run is stored.

A file is a zip as torch.save writes it, whose comment is "sha256:" and the 64 digits of all bytes before them: a byte that
changed anywhere is noticed, and plain torch.load(weights_only=True) still takes the file.
"""

import errno
import hashlib
import io
import re
from typing import Any

import torch

from deepskip.checkpoint_check import Unsound, check_model, check_zip
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location

FORMAT = "deepskip-checkpoint"
VERSION = 2
FOLDER = "checkpoints"
BEST = "best.pt"
# what a broken checkpoint's name gets when a training passes over it
BROKEN = ".broken"
_MARK = b"sha256:"
_DIGITS = 64

State = dict[str, Any]


class CheckpointError(RuntimeError):
    """No checkpoint that is there, whole and ours."""


class CheckpointTooNew(CheckpointError):
    """A checkpoint of a later DeepSkip: not broken, and not to be passed over."""


class CheckpointNotWritten(RuntimeError):
    """A checkpoint could not be written; says where, why, what to do, and from which one the training can go on."""


def pack(state: State) -> bytearray:
    """Gives the bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    data = bytearray(buffer.getbuffer())
    # a zip ends with the length of its comment, here 0
    data[-2:] = (len(_MARK) + _DIGITS).to_bytes(2, "little")
    data += _MARK
    data += hashlib.sha256(data).hexdigest().encode()
    return data


def unpack(data: bytes, location: Location) -> State:
    """Gives the state in a checkpoint file's bytes, on the CPU; raises CheckpointError, with the location in it."""
    body, digits = memoryview(data)[:-_DIGITS], data[-_DIGITS:]
    if bytes(body[-len(_MARK) :]) != _MARK:
        raise CheckpointError(f"{location} is no whole checkpoint: its end is missing, or DeepSkip did not write it")
    if hashlib.sha256(body).hexdigest().encode() != digits:
        raise CheckpointError(
            f"{location} is no whole checkpoint: its bytes changed since it was written (sha256 differs)"
        )
    try:
        check_zip(io.BytesIO(data), len(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # a checksum is no signature: what strangers wrote fails in many ways, zip, pickle, runtime and unicode errors among them
    except Exception as error:
        raise CheckpointError(f"{location} is no whole checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("version"), int):
        raise CheckpointError(f"{location} was not written by DeepSkip")
    if state["version"] > VERSION:
        raise CheckpointTooNew(
            f"{location} is of version {state['version']}; this DeepSkip reads up to {VERSION}. Install a later one."
        )
    return state


def save(state: State, location: Location) -> None:
    """Writes a checkpoint, whole or not at all; raises OSError."""
    storage.write_bytes(location, pack(state))


def read(location: Location) -> State:
    """Reads one checkpoint onto the CPU; raises CheckpointError when it is broken or something else, or OSError."""
    return unpack(storage.read_bytes(location), location)


def read_model(location: Location) -> State:
    """Reads a checkpoint of which a model can be built; raises CheckpointError, ImportError or OSError.

    ImportError is for a network of a package that is not installed.
    """
    return sound(read(location), location)


def sound(state: State, location: Location) -> State:
    """Gives a state of which a model can be built, as it is; raises CheckpointError for any other, or ImportError."""
    try:
        check_model(state)
    except Unsound as error:
        raise CheckpointError(f"{location} holds no model that can be used: {error}") from error
    return state


def step_path(run: Location, step: int) -> Any:
    """Names the checkpoint of a step: a Path, or a URL where the run is at one."""
    return storage.join(storage.locate(run), FOLDER, f"step-{step:08d}.pt")


def names_in(run: Location) -> list[str]:
    """Lists the files in a run's folder of checkpoints; [] where there is none."""
    try:
        return storage.names(storage.join(storage.locate(run), FOLDER))
    except (FileNotFoundError, NotADirectoryError):
        return []


def step_paths(run: Location) -> list[Any]:
    """Lists a run's checkpoints of steps, newest first."""
    steps = [int(m[1]) for n in names_in(run) if (m := re.fullmatch(r"step-(\d{8,})\.pt", n))]
    return [step_path(run, step) for step in sorted(steps, reverse=True)]


def find_newest(run: Location) -> tuple[tuple[bytes, State] | None, dict[Location, str]]:
    """Gives the newest checkpoint that is whole, as a file's bytes and a state, or None, and what is wrong with each newer one.

    Raises CheckpointTooNew, and OSError where a file cannot be read: a storage that is away must not look like an empty one.
    """
    faults: dict[Location, str] = {}
    for path in step_paths(run):
        try:
            data = storage.read_bytes(path)
            return (data, unpack(data, path)), faults
        except CheckpointTooNew:
            raise
        except CheckpointError as error:
            faults[path] = str(error)
        except FileNotFoundError:
            continue
        except OSError as error:
            # a bad sector
            if error.errno != errno.EIO:
                raise
            faults[path] = f"{path} cannot be read: {error.strerror}"
    return None, faults


def newest(run: Location) -> tuple[State | None, list[str]]:
    """Gives the newest checkpoint that is whole, or None, and what is wrong with each newer one; raises as find_newest."""
    found, faults = find_newest(run)
    return found[1] if found else None, list(faults.values())


def set_aside(path: Location) -> None:
    """Renames a broken checkpoint, so that it is never again taken for a newest one."""
    storage.rename(path, storage.name(path) + BROKEN)


def prune(run: Location, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints of steps."""
    for path in step_paths(run)[keep:]:
        storage.remove(path)


def load_for_inference(run_or_path: Location) -> State:
    """Reads a checkpoint file, or a run's best checkpoint, or its newest; raises CheckpointError where there is none.

    What it holds may be a stranger's: it is checked before anything is built of it. Raises ImportError too, as read_model.
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
            raise CheckpointError(
                f"{location} does not exist; name a run's folder (runs/NAME) or a checkpoint file"
            ) from None
        except IsADirectoryError:
            pass
    state, faults = newest(location)
    if state is None:
        detail = "; ".join(faults) or f"looked for {storage.join(folder, BEST)} and {folder}/step-*.pt"
        raise CheckpointError(f"{location} holds no checkpoint: {detail}")
    return sound(state, location)
