"""Checkpoints: written whole or not at all, read without running anything from them."""

import os
import re
from pathlib import Path
from typing import Any

import torch

FORMAT = "deepskip-checkpoint"
VERSION = 1
FOLDER = "checkpoints"
BEST = "best.pt"
KEPT = 2

State = dict[str, Any]


class CheckpointError(RuntimeError):
    """No checkpoint that is there, whole and ours."""


def save(state: State, path: Path) -> None:
    """Writes a checkpoint under a temporary name, syncs it to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # the rename itself lives in the folder
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> State:
    """Reads one checkpoint onto the CPU; raises CheckpointError when it is broken or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # a file from strangers fails in many ways: zip, pickle, runtime and unicode errors among them
    except Exception as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by DeepSkip")
    if state["version"] > VERSION:
        raise CheckpointError(f"{path} is of version {state['version']}; this DeepSkip reads up to {VERSION}")
    return state


def step_path(run: Path, step: int) -> Path:
    """Names the checkpoint of a step."""
    return run / FOLDER / f"step-{step:08d}.pt"


def step_paths(run: Path) -> list[Path]:
    """Lists a run's checkpoints of steps, newest first."""
    found = [p for p in (run / FOLDER).glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]), reverse=True)


def newest(run: Path) -> tuple[State | None, list[str]]:
    """Gives the newest checkpoint that loads, or None, and what was wrong with each newer one."""
    faults: list[str] = []
    for path in step_paths(run):
        try:
            return read(path), faults
        except CheckpointError as error:
            faults.append(str(error))
    return None, faults


def prune(run: Path) -> None:
    """Removes all but the newest checkpoints of steps."""
    for path in step_paths(run)[KEPT:]:
        path.unlink(missing_ok=True)


def load_for_inference(run_or_path: Path) -> State:
    """Reads a checkpoint file, or a run's best checkpoint, or its newest; raises CheckpointError where there is none."""
    if run_or_path.is_file():
        return read(run_or_path)
    if not run_or_path.is_dir():
        raise CheckpointError(f"{run_or_path} does not exist; name a run's folder (runs/NAME) or a checkpoint file")
    best = run_or_path / FOLDER / BEST
    if best.is_file():
        return read(best)
    state, faults = newest(run_or_path)
    if state is None:
        detail = "; ".join(faults) or f"looked for {best} and {run_or_path / FOLDER}/step-*.pt"
        raise CheckpointError(f"{run_or_path} holds no checkpoint: {detail}")
    return state
