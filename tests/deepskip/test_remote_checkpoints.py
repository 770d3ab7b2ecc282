"""Checkpoints in an object store, served by moto's S3 server."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from test_trainer import config, losses

import deepskip
from deepskip import checkpoint
from deepskip.checkpoint import CheckpointError, CheckpointNotWritten
from deepskip.checkpoint_writer import CheckpointWriter
from deepskip.data_shards import storage
from deepskip.ranks import agreed_start
from tests.jobs.serving import state as model


def test_a_training_on_s3_is_the_training_on_disk(tmp_path: Path, s3: Any) -> None:
    expected, summary = losses(tmp_path, config())
    url = "s3://bucket/runs/coins"
    first, _ = losses(url, config(), stop_at=4)
    # This is half of an upload that a store shows, or a bad disk behind it.
    data = bytearray(s3.cat_file("bucket/runs/coins/checkpoints/step-00000004.pt"))
    data[len(data) // 2] ^= 4
    s3.pipe_file("bucket/runs/coins/checkpoints/step-00000004.pt", bytes(data))
    second, resumed = losses(url, config())
    assert (list(first), list(second)) == ([1, 2, 3, 4], [4, 5, 6])
    assert first | second == expected
    assert resumed["val"] == pytest.approx(summary["val"], rel=0, abs=0, nan_ok=True)
    found = storage.names(f"{url}/checkpoints")
    assert found == ["best.pt", "step-00000004.pt.broken", "step-00000005.pt", "step-00000006.pt"]
    local, remote = deepskip.load(tmp_path).network, deepskip.load(url).network
    for one, other in zip(local.state_dict().values(), remote.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_others_write_there_too(s3: Any) -> None:
    run = "s3://bucket/runs/two"
    with CheckpointWriter(run, 2) as writer:
        for step in (1, 2, 3):
            writer.save(model(3, 1) | {"step": step}, best=step == 1)
    assert [storage.name(path) for path in checkpoint.step_paths(run)] == ["step-00000003.pt", "step-00000002.pt"]
    # fsspec caches listings.
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file("bucket/runs/two/checkpoints/step-00000009.pt", bytes(checkpoint.pack({"step": 9})))
    state = agreed_start(run, 0, 1, torch.device("cpu"), pytest.fail)
    assert state is not None
    assert state["step"] == 9
    assert checkpoint.load_for_inference(run)["step"] == 1
    assert checkpoint.load_for_inference(checkpoint.step_path(run, 2))["step"] == 2
    with pytest.raises(CheckpointError, match="s3://bucket/runs/none does not exist"):
        checkpoint.load_for_inference("s3://bucket/runs/none")


def test_a_store_that_is_away_is_no_empty_one(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = "s3://bucket/runs/away"
    checkpoint.save({"step": 1}, checkpoint.step_path(run, 1))
    store, _ = storage.filesystem(run)
    tries: list[str] = []

    def away(path: str, *_: Any, **__: Any) -> None:
        tries.append(path)
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    for name in ("cat_file", "pipe_file"):
        monkeypatch.setattr(store, name, away)
    with pytest.raises(
        OSError, match=rf"step-00000001\.pt cannot be reached: {storage.TRIES} tries.*Connection refused"
    ):
        agreed_start(run, 0, 1, torch.device("cpu"), pytest.fail)
    assert len(tries) == storage.TRIES
    with (
        pytest.raises(
            CheckpointNotWritten,
            match=r"step-00000002\.pt could not be written: .*6 tries.*Connection refused",
        ),
        CheckpointWriter(run, 2, 1) as writer,
    ):
        writer.save({"step": 2})
    monkeypatch.undo()
    with (
        pytest.raises(CheckpointNotWritten, match="bucket does not exist"),
        CheckpointWriter("s3://nowhere/run", 2) as writer,
    ):
        writer.save({"step": 2})
    with pytest.raises(OSError, match="is not a URL that files can be at"):
        storage.read_bytes("nonsense://x/y")


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    checkpoint.save({"step": 1}, checkpoint.step_path(f"file://{tmp_path}", 1))
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-00000001.pt"]
