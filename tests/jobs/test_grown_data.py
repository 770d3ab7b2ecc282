"""A training whose data grows meanwhile is resumed on what it began with; a new one takes everything."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import deepskip
from deepskip.data_shards.appending import append_split
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from deepskip.jobs import runs
from deepskip.jobs.journal import read_measured


def packed(folder: Path, first: int, count: int) -> Path:
    rng = np.random.default_rng(first)
    samples = [
        Sample(f"s{i}", rng.integers(0, 255, (64, 64, 3), np.uint8), (rng.random((64, 64)) < 0.1).astype(np.uint8))
        for i in range(first, first + count)
    ]
    write_shards(samples, folder, num_classes=1, samples_per_shard=3)
    return folder


def test_a_run_resumes_on_the_generations_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    packed(tmp_path / "data" / "train", 0, 8)
    packed(tmp_path / "data" / "val", 100, 2)
    shutil.copytree(tmp_path / "data", tmp_path / "grown")
    config = deepskip.Config()
    config.data.crop, config.model.base_channels, config.model.levels, config.optim.global_batch_size = 64, 4, 3, 4
    config.run.storage, config.run.tracking_uri, config.run.name, config.run.log_every = (
        str(tmp_path),
        "none",
        "mine",
        1,
    )
    losses = {}
    for name in ("data", "grown"):
        config.data.path, config.run.name = str(tmp_path / name), name
        config.optim.steps = 2
        deepskip.train(config)
        if name == "grown":
            for number, first in enumerate((200, 300)):
                for split in ("train", "val"):
                    more = packed(tmp_path / f"{split}-{number}", first, 3)
                    append_split(str(tmp_path / name / split), more)
        capsys.readouterr()
        config.optim.steps = 5
        deepskip.train(config)
        said = capsys.readouterr().out
        assert ("train has 3 generations; the run resumes on the 1 that it began with" in said) == (name == "grown")
        losses[name] = [
            (kind, step, each["loss"]) for kind, step, each, _ in read_measured(tmp_path / name / runs.JOURNAL)
        ]
    assert losses["data"] == losses["grown"]
    assert len(losses["data"]) > 5
    # A new run is trained on all three.
    config.run.name, config.optim.steps = "new", 1
    deepskip.train(config)
    data = runs.read_record(tmp_path / "new")["data"]
    assert (data["train"]["samples"], runs.generations_of(tmp_path / "new")) == (14, {"train": 3, "val": 3})
    # What it began with is gone: another chain is other data.
    (tmp_path / "grown" / "train" / "manifest" / "00000002.json").unlink()
    config.optim.steps = 2
    with pytest.raises(ValueError, match="train has samples 11 instead of 14"):
        deepskip.train(config)
