import os
import pickle
from pathlib import Path

import pytest
import torch

from deepskip import checkpoint


def test_newest_whole_one_wins_and_broken_ones_are_named(tmp_path: Path) -> None:
    for step in (10, 20, 30, 100):
        checkpoint.save({"step": step}, checkpoint.step_path(tmp_path, step))
    newest, older = checkpoint.step_path(tmp_path, 100), checkpoint.step_path(tmp_path, 30)
    newest.write_bytes(newest.read_bytes()[:-100])
    older.write_bytes(b"")
    state, faults = checkpoint.newest(tmp_path)
    assert state is not None
    assert state["step"] == 20
    assert [str(newest) in faults[0], str(older) in faults[1]] == [True, True]


def test_a_write_that_fails_leaves_nothing_and_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.step_path(tmp_path, 10)
    checkpoint.save({"step": 10}, path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"step": 11}, path)
    assert checkpoint.read(path)["step"] == 10
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save({"step": step}, checkpoint.step_path(tmp_path, step))
        checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.step_paths(tmp_path)] == ["step-00000005.pt", "step-00000004.pt"]


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("/tmp/deepskip-bomb-went-off",))


def test_a_pickle_from_strangers_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"format": checkpoint.FORMAT, "version": 1, "model": Bomb()}, path)
    with pytest.raises(checkpoint.CheckpointError, match="no whole checkpoint"):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(checkpoint.CheckpointError, match="no whole checkpoint"):
        checkpoint.read(path)
    assert not Path("/tmp/deepskip-bomb-went-off").exists()


def test_other_peoples_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(checkpoint.CheckpointError, match="not written by DeepSkip"):
        checkpoint.read(path)
    checkpoint.save({"version": checkpoint.VERSION + 1}, path)
    with pytest.raises(checkpoint.CheckpointError, match="reads up to 1"):
        checkpoint.read(path)


def test_for_inference_the_best_before_the_newest(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        checkpoint.load_for_inference(tmp_path / "nowhere")
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
        checkpoint.load_for_inference(tmp_path)
    checkpoint.save({"step": 20}, checkpoint.step_path(tmp_path, 20))
    assert checkpoint.load_for_inference(tmp_path)["step"] == 20
    checkpoint.save({"step": 10}, tmp_path / checkpoint.FOLDER / checkpoint.BEST)
    assert checkpoint.load_for_inference(tmp_path)["step"] == 10
