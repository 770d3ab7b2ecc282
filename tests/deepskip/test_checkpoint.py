import errno
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepskip import checkpoint
from deepskip.checkpoint import CheckpointError, CheckpointNotWritten, CheckpointTooNew
from deepskip.checkpoint_writer import CheckpointWriter
from deepskip.data_shards import storage
from deepskip.identity import OtherData
from deepskip.ranks import agreed_start, check_data
from tests.jobs.serving import state as model


def state(step: int, value: float = 0.0) -> checkpoint.State:
    return {"step": step, "model": {"weight": torch.full((3, 2), value)}, "optimizer": {"state": [torch.zeros(2)]}}


def start(run: Path) -> tuple[checkpoint.State | None, list[str]]:
    warnings: list[str] = []
    return agreed_start(run, 0, 1, torch.device("cpu"), warnings.append), warnings


def test_newest_whole_one_wins_and_broken_ones_are_named(tmp_path: Path) -> None:
    for step in (10, 20, 30, 100):
        checkpoint.save({"step": step}, checkpoint.step_path(tmp_path, step))
    newest, older = checkpoint.step_path(tmp_path, 100), checkpoint.step_path(tmp_path, 30)
    newest.write_bytes(newest.read_bytes()[:-100])
    older.write_bytes(b"")
    found, faults = checkpoint.newest(tmp_path)
    assert found is not None
    assert found["step"] == 20
    assert [str(newest) in faults[0], str(older) in faults[1]] == [True, True]


def test_ranks_that_loaded_other_data_stop_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"train": {"samples": 8, "contents": "a"}}
    others = {"train": {"samples": 9, "contents": "b"}}
    for place, found in ((1, [mine, others]), (2, [mine, mine, others])):
        monkeypatch.setattr(
            dist, "all_gather_object", lambda into, own, found=found: into.__setitem__(slice(None), found)
        )
        # Each rank sees the same list, and so raises the same error.
        for own in (mine, others):
            with pytest.raises(
                OtherData, match=f"while the ranks started: on rank {place} train has samples 9 instead of 8"
            ):
                check_data(None, own, None, len(found))
    monkeypatch.setattr(dist, "all_gather_object", lambda into, own: into.__setitem__(slice(None), [own, own]))
    assert check_data(None, mine, None, 2) is None


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    data = checkpoint.pack(state(1))
    assert checkpoint.unpack(bytes(data), "x")["step"] == 1
    for place in range(len(data)):
        data[place] ^= 1 << place % 8
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            checkpoint.unpack(bytes(data), "x")
        data[place] ^= 1 << place % 8
    for length in range(0, len(data), 7):
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            checkpoint.unpack(bytes(data[:length]), "x")


def test_others_can_read_and_check_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(state(1, 0.5), path)
    assert torch.equal(torch.load(path, weights_only=True)["model"]["weight"], torch.full((3, 2), 0.5))
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert file.comment == b"sha256:" + hashlib.sha256(path.read_bytes()[:-64]).hexdigest().encode()


def test_a_write_that_fails_leaves_nothing_and_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.step_path(tmp_path, 10)
    checkpoint.save({"step": 10}, path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"step": 11}, path)
    assert checkpoint.read(path)["step"] == 10
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_writer_killed_before_its_rename(tmp_path: Path) -> None:
    checkpoint.save(state(10), checkpoint.step_path(tmp_path, 10))
    code = (
        "import os, sys, pathlib; from deepskip import checkpoint\n"
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "checkpoint.save({'step': 20}, checkpoint.step_path(pathlib.Path(sys.argv[1]), 20))\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    folder = tmp_path / checkpoint.FOLDER
    assert len(list(folder.iterdir())) == 2
    found, warnings = start(tmp_path)
    assert found is not None
    assert (found["step"], warnings) == (10, [])
    assert [path.name for path in folder.iterdir()] == ["step-00000010.pt"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, 3) as writer:
        for step in range(1, 6):
            writer.save(state(step), best=step == 2)
    assert [path.name[5:13] for path in checkpoint.step_paths(tmp_path)] == ["00000005", "00000004", "00000003"]
    best = checkpoint.read(tmp_path / checkpoint.FOLDER / checkpoint.BEST)
    assert (best["step"], best["optimizer"]) == (2, None)


def test_broken_ones_are_set_aside_and_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(state(step), checkpoint.step_path(tmp_path, step))
    for step in (20, 30):
        checkpoint.step_path(tmp_path, step).write_bytes(b"half")
    found, warnings = start(tmp_path)
    assert found is not None
    assert found["step"] == 10
    assert ["step-00000030.pt" in warnings[0], "step-00000020.pt" in warnings[1]] == [True, True]
    with CheckpointWriter(tmp_path, 2, 10) as writer:
        writer.save(state(15))
    assert [path.name for path in checkpoint.step_paths(tmp_path)] == ["step-00000015.pt", "step-00000010.pt"]
    broken = sorted(path.name for path in (tmp_path / checkpoint.FOLDER).glob("*.broken"))
    assert broken == ["step-00000020.pt.broken", "step-00000030.pt.broken"]
    assert start(tmp_path)[1] == []


def test_checkpoints_that_vanish_are_not_a_run_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, listed = storage.read_bytes, checkpoint.step_paths
    checkpoint.save(state(10), checkpoint.step_path(tmp_path, 10))

    def written_meanwhile(path: storage.Location) -> bytes:
        # Workers that are cut off write a newer one and remove this one.
        checkpoint.step_path(tmp_path, 10).unlink(missing_ok=True)
        checkpoint.save(state(11), checkpoint.step_path(tmp_path, 11))
        return read(path)

    monkeypatch.setattr(storage, "read_bytes", written_meanwhile)
    found, _ = start(tmp_path)
    assert found is not None
    assert found["step"] == 11
    monkeypatch.setattr(storage, "read_bytes", read)
    # A listing that never shows what is there.
    monkeypatch.setattr(checkpoint, "step_paths", lambda run: [*listed(run)[:0], checkpoint.step_path(run, 9)])
    with pytest.raises(OSError, match="vanish while they are read"):
        start(tmp_path)


def test_the_writer_works_beside_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, saved = threading.Event(), checkpoint.save

    def slow(what: checkpoint.State, location: storage.Location) -> None:
        assert go.wait(60)
        saved(what, location)

    monkeypatch.setattr(checkpoint, "save", slow)
    weight = torch.arange(24.0).view(1, 4, 2, 3).contiguous(memory_format=torch.channels_last)
    expected = weight.clone()
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save({"step": 1, "model": {"weight": weight}})
        weight.zero_()
        writer.check()
        assert checkpoint.step_paths(tmp_path) == []
        second = threading.Thread(target=writer.save, args=({"step": 2, "model": {"weight": weight}},))
        second.start()
        second.join(0.2)
        # It waits for the first, whose copy it would overwrite.
        assert second.is_alive()
        go.set()
        second.join()
    first, later = (checkpoint.read(checkpoint.step_path(tmp_path, step))["model"]["weight"] for step in (1, 2))
    assert torch.equal(first, expected)
    assert first.stride() == expected.stride()
    assert torch.equal(later, torch.zeros_like(expected))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_full_disk_is_told_at_the_next_call_and_the_last_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = (
        rf"{checkpoint.step_path(tmp_path, 2)} could not be written: No space left on device\. Free space there.*"
        rf"resumes from {checkpoint.step_path(tmp_path, 1)}, which is complete"
    )
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save(state(1, 1.0))
        writer.wait()
        monkeypatch.setattr(os, "fsync", full_disk)
        writer.save(state(2, 2.0))
        with pytest.raises(CheckpointNotWritten, match=message):
            writer.save(state(3, 3.0))
        writer.save(state(4, 4.0))
        assert writer.written is not None
        writer.written.exception()
        with pytest.raises(CheckpointNotWritten):
            writer.check()
    with pytest.raises(CheckpointNotWritten, match="could not be written"), CheckpointWriter(tmp_path, 2, 1) as writer:
        writer.save(state(5))
    with pytest.raises(KeyError):
        save_and_fail(tmp_path)
    found, warnings = start(tmp_path)
    assert found is not None
    assert torch.equal(found["model"]["weight"], torch.full((3, 2), 1.0))
    assert warnings == []


def save_and_fail(run: Path) -> None:
    with CheckpointWriter(run, 2, 1) as writer:
        writer.save(state(5))
        raise KeyError("what ended the block is told")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_from_strangers_is_not_run(tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "it went off")
    path = checkpoint.step_path(tmp_path, 1)
    # The checksum is right, since an attacker can compute it too.
    checkpoint.save({"step": 1, "model": bomb}, path)
    with pytest.raises(CheckpointError, match=rf"{path} is not a complete checkpoint: Weights only load failed"):
        checkpoint.load_for_inference(tmp_path)
    found, warnings = start(tmp_path)
    assert found is None
    assert str(path) in warnings[0]
    torch.save({"format": checkpoint.FORMAT, "version": 1, "model": bomb}, path)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.read(path)
    assert not bomb.path.exists()
    # The bomb does explode if it is run.
    pickle.loads(pickle.dumps(bomb))
    assert bomb.path.exists()


def test_other_peoples_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.step_path(tmp_path, 1)
    path.parent.mkdir()
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="DeepSkip did not write it"):
        checkpoint.read(path)
    checkpoint.save({"format": "another"}, path)
    with pytest.raises(CheckpointError, match="not written by DeepSkip"):
        checkpoint.read(path)
    checkpoint.save({"version": checkpoint.VERSION + 1}, path)
    # This checkpoint is not broken, so a training must not ignore it and start again.
    with pytest.raises(CheckpointTooNew, match=f"reads up to {checkpoint.VERSION}"):
        start(tmp_path)


def test_for_inference_the_best_before_the_newest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load_for_inference(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.load_for_inference(tmp_path)
    checkpoint.save(model(3, 1) | {"step": 20}, checkpoint.step_path(tmp_path, 20))
    assert checkpoint.load_for_inference(tmp_path)["step"] == 20
    checkpoint.save(model(3, 1) | {"step": 10}, tmp_path / checkpoint.FOLDER / checkpoint.BEST)
    assert checkpoint.load_for_inference(str(tmp_path))["step"] == 10
    assert checkpoint.load_for_inference(checkpoint.step_path(tmp_path, 20))["step"] == 20
