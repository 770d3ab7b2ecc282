"""Trainings without Ray: in one process without Ray and MLflow installed, under torchrun, from Python."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

import deepskip
from deepskip import checkpoint
from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.index import load_index
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from deepskip.jobs import evaluate, models, report, runs, train
from deepskip.jobs.journal import read_measured
from deepskip.jobs.training import tracked
from deepskip.jobs.training.console import Console
from deepskip.jobs.training.events import Event, Measured
from tests.deepskip.networks.small import SMALL as NETWORK_SIZES

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.base_channels", "4", "--model.levels", "3", "--data.crop", "64", "--optim.steps", "6", "--run.log_every", "1",
    "--optim.warmup_steps", "2", "--run.validate_every", "3", "--run.checkpoint_every", "2", "--cluster.cpus_per_worker", "1",
]  # fmt: skip
# This program runs as on a machine without Ray and MLflow.
WITHOUT = "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None; from deepskip.jobs.train import main; main()"


@pytest.fixture(autouse=True)
def own_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide other tests' tracking servers from these trainings."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def coins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    pack_coins(folder / "coins", {"train": 24, "val": 4})
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def losses(folder: Path) -> dict[tuple[str, int], float]:
    return {(kind, step): values["loss"] for kind, step, values, _ in read_measured(folder / runs.JOURNAL)}


def test_torchruns_ranks_train_together(coins: Path) -> None:
    settings = [
        "--data.path",
        str(coins / "coins"),
        *SMALL,
        "--model.norm",
        "group",
        "--optim.momentum",
        "0",
        "--data.lanes",
        "4",
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "deepskip.jobs.train"]
    two = run([*torchrun, "--run.name", "two", *settings], coins)
    assert two.returncode == 0, two.stdout + two.stderr
    one = run(["-m", "deepskip.jobs.train", "--local", "--run.name", "one", *settings], coins)
    assert one.returncode == 0, one.stdout + one.stderr
    expected = losses(coins / "runs" / "one")
    # The fp32 sums are in another order.
    assert losses(coins / "runs" / "two") == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    # A finished run is not trained again, and the other rank is told so.
    again = run([*torchrun, "--run.name", "two", *settings], coins)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "is finished already" in again.stdout


def test_changed_data_is_refused_and_accepted_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for folder, count in (("data", 8), ("more", 12)):
        pack_coins(tmp_path / folder, {"train": count, "val": 2})
    config = deepskip.Config()
    config.data.path, config.data.crop, config.data.lanes = str(data), 64, "auto"
    config.run.storage, config.run.name, config.run.tracking_uri = str(tmp_path), "mine", "none"
    config.model.base_channels, config.model.levels, config.optim.steps = 4, 3, 2
    deepskip.train(config)
    record = tmp_path / "mine" / runs.RECORD
    first = checkpoint.read(checkpoint.step_path(tmp_path / "mine", 2))["data"]["splits"]
    assert {split: known["samples"] for split, known in first.items()} == {"train": 8, "val": 2}
    assert runs.read_json(record)["lanes"] == 1
    data.rename(tmp_path / "former")
    (tmp_path / "more").rename(data)
    config.optim.steps = 4
    changed = r"was trained on other data \(train has samples 12 instead of 8, other contents, other statistics\)"
    with pytest.raises(ValueError, match=rf"run mine .* {changed}; .* --data\.accept (\w+); choose") as refused:
        deepskip.train(config)
    # Without a record of its own, a run is known by its checkpoint.
    runs.write_json(record, {**runs.read_json(record), "data": None})
    with pytest.raises(ValueError, match=f"the checkpoint of step 2 {changed}"):
        deepskip.train(config)
    [config.data.accept] = re.findall(r"--data\.accept (\w+)", str(refused.value))
    capsys.readouterr()
    assert deepskip.train(config)["steps"] == 4
    assert "warning: resuming at step 2 on changed data: train has samples 12 instead of 8" in capsys.readouterr().out
    # From then on it is the data of the run.
    config.data.accept, config.optim.steps = None, 5
    assert deepskip.train(config)["steps"] == 5
    data.rename(tmp_path / "more")
    (tmp_path / "former").rename(data)
    config.optim.steps = 6
    with pytest.raises(ValueError, match=r"other data \(train has samples 8 instead of 12"):
        deepskip.train(config)


def test_stopped_by_sigterm_it_goes_on_where_it_was(coins: Path) -> None:
    settings = [
        "--local",
        "--data.path",
        str(coins / "coins"),
        *SMALL,
        "--optim.steps",
        "12",
        "--run.checkpoint_every",
        "12",
    ]
    command = [sys.executable, "-c", WITHOUT, "--run.name", "stopped", *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=coins, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    state, _ = checkpoint.newest(coins / "runs" / "stopped")
    assert state is not None
    assert 2 <= state["step"] < 12
    second = run(["-c", WITHOUT, "--run.name", "stopped", *settings], coins)
    assert f"resuming at step {state['step']}" in second.stdout
    whole = run(["-c", WITHOUT, "--run.name", "whole", *settings], coins)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "the run is not tracked" in whole.stdout
    assert json.loads((coins / "runs" / "whole" / "summary.json").read_text())["mlflow_run_id"] is None
    assert losses(coins / "runs" / "stopped") == losses(coins / "runs" / "whole")
    ends = [checkpoint.newest(coins / "runs" / name)[0] for name in ("stopped", "whole")]
    assert [end and end["step"] for end in ends] == [12, 12]
    left, right = (end["ema"] for end in ends if end)
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_ctrl_c_writes_a_checkpoint_and_is_the_callers_again(
    coins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, said = signal.getsignal(signal.SIGINT), Console.take

    def interrupted(self: Console, event: Event) -> None:
        said(self, event)
        if isinstance(event, Measured) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Console, "take", interrupted)
    command = ["--local", "--data.path", str(coins / "coins"), *SMALL, "--optim.steps", "400", "--run.storage"]
    command += [str(tmp_path), "--run.name", "mine", "--run.tracking_uri", "none"]
    with pytest.raises(SystemExit) as ended:
        train.main(command)
    assert ended.value.code == 130
    assert "stopped after step" in capsys.readouterr().out
    state, _ = checkpoint.newest(tmp_path / "mine")
    assert state is not None
    assert 2 <= state["step"] < 400
    assert signal.getsignal(signal.SIGINT) is before


def test_from_python(coins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(coins)
    monkeypatch.setattr("deepskip.jobs.training.tracked.find_spec", lambda name: None)
    config = deepskip.Config()
    config.data.path, config.data.crop, config.run.name = "coins", 64, "python"
    config.run.storage = Path("runs")  # type: ignore[assignment]
    config.model.base_channels, config.model.levels, config.optim.steps = 4, 3, 2
    summary = deepskip.train(config)
    assert summary["steps"] == 2
    assert config.data.path == "coins"
    assert deepskip.train(config) == summary
    config.data.path = "nowhere"
    with pytest.raises(ValueError, match=r"data\.path is .*nowhere"):
        deepskip.train(config)
    config.optim.steps = 0
    with pytest.raises(ValueError, match=r"optim\.steps is 0"):
        deepskip.train(config)


def test_a_training_on_some_bands_is_one_on_a_set_that_has_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    masks = (rng.random((6, 64, 64)) < 0.1).astype(np.uint8)
    images = rng.normal(size=(6, 64, 64, 5)).astype(np.float32) + masks[..., None]
    for name, bands in (("all", range(5)), ("few", [4, 1, 2])):
        for split, part in (("train", slice(4)), ("val", slice(4, 6))):
            made = zip(images[part], masks[part], strict=True)
            samples = (Sample(f"s{i}", image[..., bands], mask) for i, (image, mask) in enumerate(made))
            write_shards(samples, tmp_path / name / split, num_classes=1)
    found, states = {}, {}
    for name in ("all", "few"):
        arguments = ["--local", "--data.path", name, "--run.name", name, *SMALL, "--run.tracking_uri", "none"]
        train.main([*arguments, *(["--data.bands", "[4, 1-2]"] if name == "all" else []), "--data.normalize", "robust"])
        found[name], states[name] = (
            losses(tmp_path / "runs" / name),
            torch.load(tmp_path / "runs" / name / "checkpoints/best.pt"),
        )
    assert found["all"] == found["few"]
    assert all(torch.equal(weight, states["few"]["model"][key]) for key, weight in states["all"]["model"].items())
    assert states["all"]["data"]["preparation"] == {"bands": None, "longest_side": None, "chosen": [4, 1, 2], "of": 5}
    assert states["all"]["data"]["mean"] == states["few"]["data"]["mean"]
    # The evaluation takes the same bands by itself.
    reports = []
    for name in ("all", "few"):
        evaluate.main(["--model", f"runs/{name}", "--out", f"{name}-report", "--track", "none"])
        reports.append(json.loads((tmp_path / f"{name}-report" / "report.json").read_text()))
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[0]["confusion"] == reports[1]["confusion"]
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "runs/all", "--data", "few/val", "--out", "no"])
    assert "3 bands" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--local", "--data.path", "all", "--run.name", "odd", *SMALL, "--data.bands", "[1, 5]"])
    assert "data.bands is [1, 5]: there is no band 5: the images have 5 bands, 0 to 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--local", "--data.path", "all", "--run.name", "all", *SMALL, "--data.bands", "[0, 1-2]"])
    assert "data.bands" in capsys.readouterr().err


def test_a_model_that_mlflow_takes_too_slowly_is_sent_by_the_same_command(
    coins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a run is complete before a slow server has its model; the same command sends the rest later."""
    from deepskip.jobs import tracking

    left = threading.Event()
    monkeypatch.setattr(tracked, "MODEL_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "log_model", lambda *arguments: left.wait(60))
    before = signal.getsignal(signal.SIGTERM)
    command = ["--local", "--data.path", str(coins / "coins"), *SMALL, "--optim.steps", "2"]
    command += ["--run.storage", str(tmp_path), "--run.name", "slow"]
    train.main(command)
    left.set()
    assert signal.getsignal(signal.SIGTERM) is before
    folder = tmp_path / "slow"
    assert "the model was not logged to MLflow: it takes more than 0.2 s" in capsys.readouterr().out
    assert (folder / "summary.json").is_file()
    assert runs.read_json(folder / tracked.UNSENT) == {"model": True}
    # Without MLflow, there is nobody to send it to.
    without = run(["-c", WITHOUT, *command], coins)
    assert without.returncode == 0, without.stdout + without.stderr
    assert "MLflow has not received all of this run, and is not installed here" in without.stdout
    # Another process does not know the first one's server.
    again = run(["-m", "deepskip.jobs.train", *command], coins)
    assert "has now received what was missing" in again.stdout, again.stdout + again.stderr
    assert not (folder / tracked.UNSENT).exists()
    uri, run_id = f"sqlite:///{tmp_path / 'mlflow.db'}", runs.read_json(folder / "run.json")["mlflow_run_id"]
    assert models.load(run_id, tracking_uri=uri).state["step"] == 2
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


def test_what_mlflow_cannot_take_is_not_tried_for_ever(
    coins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a model without a graph (Mask R-CNN) is not logged; an untracked part keeps the former MLflow run."""
    settings = json.dumps({"size": "paper"} | NETWORK_SIZES["mask_rcnn"])
    command = ["--local", "--data.path", str(coins / "coins"), "--data.crop", "64", "--run.storage", str(tmp_path)]
    command += [
        "--run.name",
        "boxes",
        "--model.network",
        "mask_rcnn",
        "--model.options",
        settings,
        "--optim.optimizer",
        "adamw",
    ]
    command += ["--optim.global_batch_size", "2", "--cluster.cpus_per_worker", "1"]
    train.main([*command, "--optim.steps", "1"])
    out = capsys.readouterr().out
    assert "step 1/1  loss" in out
    assert "Dice" not in out[: out.index("validation after")]
    assert "the model was not logged to MLflow: Mask R-CNN computes on as many boxes as it finds" in out
    assert not (tmp_path / "boxes" / tracked.UNSENT).exists()
    run_id = runs.read_json(tmp_path / "boxes" / "run.json")["mlflow_run_id"]
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(run_id).info.status == "FINISHED"
    train.main([*command, "--optim.steps", "2", "--run.tracking_uri", "none"])
    assert runs.read_json(tmp_path / "boxes" / "run.json")["mlflow_run_id"] == run_id


def test_interrupted_in_a_notebook_it_goes_on_in_the_same_process(
    coins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = deepskip.Config()
    config.data.path, config.data.crop, config.run.storage = str(coins / "coins"), 64, str(tmp_path)
    config.model.base_channels, config.model.levels, config.optim.steps = 4, 3, 3
    config.run.tracking_uri, config.run.checkpoint_every, config.run.log_every = "none", 1, 1
    line = report.progress_line

    def interrupted(step: int, *arguments: Any) -> str:
        if step == 2:
            raise KeyboardInterrupt
        return line(step, *arguments)

    monkeypatch.setattr(report, "progress_line", interrupted)
    # IPython holds the last exception in this way, with the frames that it passed.
    with pytest.raises(KeyboardInterrupt) as held:
        deepskip.train(config)
    monkeypatch.setattr(report, "progress_line", line)
    assert deepskip.train(config)["name"] == "train"
    assert held.value is not None
    assert [folder.name for folder in tmp_path.iterdir()] == ["train"]
    # A thread cannot listen for signals.
    config.run.name = "thread"
    thread = threading.Thread(target=deepskip.train, args=[config])
    thread.start()
    thread.join()
    assert (tmp_path / "thread" / "summary.json").is_file()


def test_samples_that_any_rank_skips_are_listed(coins: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    pack_coins(folder, {"train": 8, "val": 2})
    shard = next((folder / "train").glob("*.tar"))
    index = load_index(folder / "train")
    data = bytearray(shard.read_bytes())
    for number in (1, 6):
        place = index.entries([number])[0].image.offset
        data[place + 40] ^= 255
    shard.write_bytes(data)
    found = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "deepskip.jobs.train",
         "--data.path", "bad",
         *SMALL, "--optim.steps", "2", "--data.on_bad_sample", "skip", "--run.tracking_uri", "none",
         "--run.storage", str(tmp_path), "--run.name", "skips"], tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    lines = (tmp_path / "skips" / "bad_samples.jsonl").read_text().splitlines()
    keys = {json.loads(line)["key"] for line in lines}
    assert keys == {entry.key for entry in index.entries([1, 6])}
    # Every rank names the shard alike, or the audit cannot find it.
    assert {json.loads(line)["shard"] for line in lines} == {str(shard)}
    assert json.loads((tmp_path / "skips" / "summary.json").read_text())["bad_samples"] == 2


def test_validation_normalises_by_the_training_set_as_evaluate_does(tmp_path: Path) -> None:
    def brightened(by: int, count: int) -> Iterator[Sample]:
        rng = np.random.default_rng(count)
        for number in range(count):
            mask = np.zeros((32, 32), np.uint8)
            row, column = rng.integers(4, 20, 2)
            mask[row : row + 8, column : column + 8] = 1
            image = rng.normal(60 + by, 8, (32, 32, 3)) + 40 * mask[..., None]
            yield Sample(f"s{number}", image.clip(0, 255).astype(np.uint8), mask)

    # By its own statistics the brighter validation set would look like the training set.
    for split, by, count in (("train", 0, 24), ("val", 60, 8)):
        write_shards(brightened(by, count), tmp_path / "data" / split, num_classes=1, samples_per_shard=12)
    config = deepskip.Config()
    config.data.path, config.data.crop, config.data.normalize = str(tmp_path / "data"), 32, "dataset"
    config.model.base_channels, config.model.levels, config.optim.steps = 4, 3, 60
    config.run.storage, config.run.name, config.run.tracking_uri = str(tmp_path), "bright", "none"
    summary = deepskip.train(config)
    words = ["--model", str(tmp_path / "bright"), "--data", str(tmp_path / "data" / "val"), "--track", "none"]
    evaluate.main([*words, "--out", str(tmp_path / "report")])
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {key: summary["val"][key] for key in ("iou", "precision", "pd")} == {
        key: pytest.approx(found["metrics"][key], rel=1e-6) for key in ("iou", "precision", "pd")
    }
