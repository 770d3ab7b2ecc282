"""Evaluations on coins and on five bands with classes equal those computed from the model's masks."""

import csv
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image

import deepskip
from deepskip import checkpoint
from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.order import Slot
from deepskip.data_shards.origin import Origin
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from deepskip.jobs import evaluate, tracking
from deepskip.jobs.training.share import data_info
from tests.deepskip.test_predictor import state_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a folder to work in: coins, classes of five bands, a model for each, and the MLflow run of one."""
    folder = tmp_path_factory.mktemp("user")
    pack_coins(folder / "data" / "coins", {"val": 8})
    rng = np.random.default_rng(0)
    samples = []
    for number in range(6):
        mask = np.kron(rng.integers(0, 3, (6, 5)) * (rng.random((6, 5)) < 0.4), np.ones((7, 9))).astype(np.uint8)
        image = rng.normal(size=(*mask.shape, 5)).astype(np.float32) + mask[..., None]
        mask[rng.random(mask.shape) < 0.05] = 255
        samples.append(Sample(f"scene-{number}", image, mask))
    for name, origin in (("scenes", ("road", "roof")), ("other", ("roof", "road"))):
        write_shards(iter(samples), folder / "data" / name / "test", num_classes=3, origin=Origin(classes=origin))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (folder / "runs").mkdir()
        uri = tracking.tracking_uri(folder / "runs", None)
        run_id = tracking.start_run(uri, folder / "runs", "deepskip", "coins", None, {"optim": {"steps": 1}})
        for name, bands, classes in (("coins", 3, 1), ("scenes", 5, 3)):
            state = state_of(bands, classes) | {"mlflow_run_id": run_id if name == "coins" else None}
            state["config"]["data"]["path"] = str(folder / "data" / name)
            if classes > 1:
                index = load_index(folder / "data" / name / "test")
                state["data"]["classes"] = data_info(index, {}, "image").classes
            checkpoint.save(state, folder / "runs" / name / checkpoint.FOLDER / checkpoint.BEST)
        yield folder


def images_of(folder: Path, classes: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    shards = Shards(folder, "none", num_classes=classes)
    batches = [shards[[Slot(0, number, 1)]] for number in range(len(shards))]
    return [(b["key"][0], b["image"][0].permute(1, 2, 0).numpy(), b["mask"][0].numpy()) for b in batches]


def test_coins_into_the_trainings_own_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["--model", "runs/coins", "--worst", "3", "--threshold", "0.4"])
    folder = home / "evaluations" / "coins" / "val"
    report = json.loads((folder / "report.json").read_text())
    printed = capsys.readouterr().out

    model = deepskip.load("runs/coins")
    tp = fp = fn = 0
    by_key = {}
    images = images_of(home / "data" / "coins" / "val", 1)
    for key, image, mask in images:
        guess = model.predict(image, threshold=0.4) == 1
        truth = mask == 1
        tp, fp, fn = tp + (guess & truth).sum(), fp + (guess & ~truth).sum(), fn + (~guess & truth).sum()
        by_key[key] = (guess & truth).sum() / (guess | truth).sum()
    metrics = report["metrics"]
    assert metrics["iou"] == pytest.approx(tp / (tp + fp + fn), rel=1e-6)
    assert metrics["precision"] == pytest.approx(tp / (tp + fp), rel=1e-6)
    assert metrics["recall"] == pytest.approx(tp / (tp + fn), rel=1e-6)
    assert metrics["niou"] == pytest.approx(np.mean(list(by_key.values())))
    assert 0 <= metrics["pd"] <= 1
    assert report["confusion"][1] == [fn, tp]
    assert report["confusion"][0][1] == fp
    assert (report["data"]["images"], report["threshold"], report["model"]["step"]) == (8, 0.4, 7)
    # Compare the curve's point at that threshold. The best threshold is at least as good as all points.
    (scores,) = report["classes"]
    place = scores["curve"]["thresholds"].index(0.3984375)
    assert scores["curve"]["recall"][place] == pytest.approx(metrics["recall"], abs=0.02)
    assert scores["at_best_threshold"]["iou"] >= max(metrics["iou"], *filter(None, scores["curve"]["iou"])) - 1e-9

    worst = sorted(by_key, key=lambda key: by_key[key])[:3]
    assert [row["key"] for row in report["worst"]] == worst
    with (folder / "samples.csv").open() as file:
        rows = {row["key"]: float(row["iou"]) for row in csv.DictReader(file)}
    assert rows == pytest.approx(by_key)
    for name in ("worst.png", "precision-recall.png", "by-size.png", "confusion.png"):
        assert min(Image.open(folder / name).size) > 300

    assert f"IoU                     {metrics['iou']:.4f}" in printed
    client = mlflow.MlflowClient(tracking.tracking_uri(home / "runs", None))
    run = client.get_run(report["model"]["mlflow_run_id"])
    assert run.data.metrics["eval-val/iou"] == metrics["iou"]
    assert run.data.metrics["eval-val/best_threshold"] == scores["best_threshold"]
    logged = {item.path for item in client.list_artifacts(run.info.run_id, "evaluations/val")}
    assert {"evaluations/val/report.json", "evaluations/val/worst.png"} <= logged


def test_classes_of_five_bands_by_a_checkpoint_file_into_a_new_run(home: Path) -> None:
    arguments = ["--model", "runs/scenes/checkpoints/best.pt", "--data", "data/scenes/test", "--out", "report"]
    evaluate.main([*arguments, "--size_edges", "[64, 100]", "--track", "new", "--flips", "true"])
    report = json.loads((home / "report" / "report.json").read_text())
    model = deepskip.load("runs/scenes")
    counts = np.zeros((3, 3), np.int64)
    for _, image, mask in images_of(home / "data" / "scenes" / "test", 3):
        counted = mask != 255
        np.add.at(counts, (mask[counted], model.predict(image, flips=True)[counted]), 1)
    assert report["confusion"] == counts.tolist()
    right = counts.diagonal()
    ious = right / (counts.sum(0) + counts.sum(1) - right)
    assert [scores["iou"] for scores in report["classes"]] == pytest.approx(ious[1:])
    assert [scores["name"] for scores in report["classes"]] == ["road", "roof"]
    assert report["metrics"]["iou"] == pytest.approx(ious[1:].mean(), rel=1e-6)
    assert [(size["from"], size["to"]) for size in report["by_size"]] == [(0, 64), (64, 100), (100, None)]
    assert (report["threshold"], report["flips"]) == (None, True)
    client = mlflow.MlflowClient(tracking.tracking_uri(home / "runs", None))
    (run,) = client.search_runs(
        [client.get_experiment_by_name("deepskip").experiment_id], "attributes.run_name = 'scenes-on-test-flips'"
    )
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval-test-flips/class-2/average_precision"] == report["classes"][1]["average_precision"]
    assert run.data.params["evaluate.data"] == "data/scenes/test"


def test_a_report_on_other_data_is_kept(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "runs/coins", "--track", "none", "--out", "reports"]
    evaluate.main([*words, "--data", "data/coins/val"])
    shutil.copytree("data/coins/val", "data/elsewhere/val")
    with pytest.raises(SystemExit):
        evaluate.main([*words, "--data", "data/elsewhere/val"])
    assert "reports, which holds the report on data/coins/val; give --out another folder" in capsys.readouterr().err
    evaluate.main([*words, "--data", str(home / "data" / "coins" / "val")])


def test_a_report_is_kept_until_the_same_model_has_a_new_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--track", "none", "--out", "kept", "--data", "data/coins/val"]
    evaluate.main([*words, "--model", "runs/coins"])
    before = {path.name: path.read_bytes() for path in (home / "kept").iterdir()}
    state = state_of(3, 1)
    state["model"]["head.bias"] += 1
    checkpoint.save(state, home / "runs" / "other" / checkpoint.FOLDER / checkpoint.BEST)
    with pytest.raises(SystemExit):
        evaluate.main([*words, "--model", "runs/other"])
    assert "kept, which holds the report of another model, runs/coins; give --out" in capsys.readouterr().err
    shutil.copytree("data/coins/val", "data/damaged/val")
    for shard in (home / "data" / "damaged" / "val").glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    shutil.move("data/coins/val", "data/whole")
    shutil.move("data/damaged/val", "data/coins/val")
    with pytest.raises(SystemExit):
        evaluate.main([*words, "--model", "runs/coins"])
    shutil.rmtree("data/coins/val")
    shutil.move("data/whole", "data/coins/val")
    assert {path.name: path.read_bytes() for path in (home / "kept").iterdir()} == before
    # the same weights by another name; pictures that the new report lacks go
    evaluate.main([*words, "--model", str(home / "runs/coins/checkpoints/best.pt"), "--worst", "0"])
    assert {path.name for path in (home / "kept").iterdir()} == before.keys() - {"worst.png"}


def test_a_full_disk_is_named_with_the_cure(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(evaluate.runs, "write_json", full)
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "runs/coins", "--track", "none", "--out", "full"])
    said = "error: out is full: the disk is full at full/report.json. Free some space, and the same command resumes.\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_bad_sample_ends_it_or_is_left_out_and_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_coins(home / "data" / "bad", {"val": 4})
    index = load_index(home / "data" / "bad" / "val")
    entry = index.entries([2])[0]
    shard = home / "data" / "bad" / "val" / index.shards[0].name
    data = bytearray(shard.read_bytes())
    data[entry.mask.offset + 30] ^= 1
    shard.write_bytes(data)
    options = ["--model", "runs/coins", "--data", "data/bad/val", "--out", "bad", "--track", "none"]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(options)
    assert stopped.value.code == 2
    assert f"sample {entry.key}: has other bytes" in capsys.readouterr().err
    # No file is left that looks whole.
    assert not list((home / "bad").iterdir())
    evaluate.main([*options, "--on_bad_sample", "skip"])
    report = json.loads((home / "bad" / "report.json").read_text())
    assert report["data"]["images"] == 3
    assert [sample["key"] for sample in report["data"]["bad_samples"]] == [entry.key]
    assert "1 samples were skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "runs/none"], "error: model: runs/none does not exist"),
        (["--model", "runs/coins", "--data", "nowhere"], "error: data is nowhere: no shards at"),
        (
            ["--model", "runs/coins", "--data", "data/scenes/test"],
            "with 5 bands and num_classes 3; the model takes 3 bands and has num_classes 1",
        ),
        (
            ["--model", "runs/scenes", "--data", "data/other/test"],
            "error: data is data/other/test: the classes are 1 roof, 2 road, but 1 road, 2 roof in the model",
        ),
        (["--model", "runs/coins", "--threshold", "1.5"], "error: threshold is 1.5"),
        (["--model", "runs/coins", "--size_edges", "[9, 4]"], "error: size_edges is [9, 4]"),
        (["--model", "runs/coins", "--thresholds", "1"], "unknown setting thresholds (did you mean threshold"),
        (["--model", "runs/coins", "--device", "moon"], "error: device is 'moon'"),
        (["--model", "runs/coins", "--device", "meta"], "error: device is 'meta', which computes nothing"),
        (["--model", "runs/coins", "--out", ""], "error: out is empty; name a folder"),
        (
            ["--model", "runs/coins", "--out", "runs/mlflow.db"],
            "error: out is runs/mlflow.db, but runs/mlflow.db is a file",
        ),
        ([], "model"),
    ],
)
def test_bad_input_is_said_at_once(
    home: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert all(line.startswith("error: ") for line in errors.splitlines())
