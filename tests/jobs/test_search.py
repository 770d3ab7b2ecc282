"""The search for a row's values: what Ray Tune reports is what a training gives; tests never read; goes on where it stopped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from jobs.comparison.cell import Cell, run_cell, train
from jobs.comparison.rows import Grid, Row, faults_of, in_category
from jobs.comparison.samples import load
from jobs.comparison.search import Search, faults_of_space, main
from tests.jobs.squares import write_squares

CONFIG = """
networks:
  deepskip: {label: Ours, group: ours, loss: bce_dice, optimizer: muon, learning_rate: 0.004, ema_decay: 0.5}
categories: [squares]
steps: 4
batch_size: 2
validations: 2
device: cpu
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category of bright squares, 32 x 32, and a config of one row."""
    made = tmp_path_factory.mktemp("search")
    write_squares(made)
    (made / "compare.yaml").write_text(CONFIG)
    return made


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "compare.yaml"), "--data", str(folder), "--out", str(folder / "out"), *more]


ROW = Row("Ours", "ours", loss="bce_dice", optimizer="muon", learning_rate=0.004, ema_decay=0.5)


@pytest.mark.usefixtures("one_thread")
def test_training_never_reads_the_test_split(folder: Path) -> None:
    whole = load(folder / "squares.npz", torch.device("cpu"))
    without = replace(whole, splits={name: part for name, part in whole.splits.items() if name != "test"})
    cell = Cell("squares", "deepskip", 0, 4, 2, 2)
    seen: list[tuple[int, float]] = []
    trained = train(ROW, without, cell, lambda step, iou: seen.append((step, iou)))
    record, _ = run_cell(ROW, whole, cell, False)
    assert [step for step, _ in seen] == [2, 4]
    assert [iou for _, iou in seen] == list(np.maximum.accumulate([p["iou"] for p in trained.curves["validation"]]))
    assert record["validation"]["iou"] == pytest.approx(seen[-1][1], abs=1e-9)
    assert record["best_step"] == trained.best_step


@pytest.mark.timeout(300)
def test_search_finds_the_best_of_its_trials_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = arguments(
        folder, "--workers", "2", "--trials", "3", "--space", "{alpha: [0.3, 0.9], learning_rate: [0.001, 0.02]}"
    )
    main(asked)
    ray.shutdown()
    printed = capsys.readouterr().out
    [path] = (folder / "out/search/squares").glob("*.json")
    record = json.loads(path.read_text())
    assert len(record["trials"]) == 3
    assert all(0.3 <= each["values"]["alpha"] <= 0.9 for each in record["trials"])
    assert record["best"]["iou"] == max(each["iou"] for each in record["trials"])
    # the row's own values are among them, and each trial is the comparison's own training
    assert record["before"]["values"] == {"alpha": 0.5, "learning_rate": 0.004}
    data = load(folder / "squares.npz", torch.device("cpu"))
    for each in (record["before"], record["best"]):
        row = replace(ROW, **each["values"])
        seen: list[float] = []
        train(row, data, Cell("squares", "deepskip", 0, 4, 2, 2), lambda step, iou, seen=seen: seen.append(iou))
        assert each["iou"] == pytest.approx(seen[each["steps"] // 2 - 1], abs=0.01)
    alpha = float(f"{record['best']['values']['alpha']:.3g}")
    assert f"alpha: {alpha}" in printed

    before = path.stat().st_mtime_ns
    main(asked)
    # nothing was left to start it for
    assert not ray.is_initialized()
    assert path.stat().st_mtime_ns == before
    assert capsys.readouterr().out == printed


def test_values_of_a_category_are_its_own(folder: Path) -> None:
    row = replace(ROW, by_category={"squares": {"alpha": 0.9}})
    assert in_category(row, "squares").alpha == 0.9
    assert in_category(row, "coins") == row
    grid = Grid({"deepskip": row}, ["squares"], str(folder))
    assert faults_of(grid) == []
    wrong = replace(row, by_category={"squares": {"alpha": 1.5, "enlarge": 2.0, "threshold": 0.5}})
    assert faults_of(replace(grid, networks={"deepskip": wrong})) == [
        "networks.deepskip.by_category.squares.enlarge is 2.0; it must be 1 to 4, a whole number",
        "networks.deepskip.by_category.squares.alpha is 1.5; it must be 0 to 1",
        "networks.deepskip.by_category.squares has threshold; it may have alpha, beta, learning_rate, momentum, "
        "weight_decay, ema_decay, foreground_crops, copy_paste, enlarge",
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"trials": 0}, "trials is 0; it must be 1 or more"),
        ({"network": "unet"}, "network: there is no 'unet'; the grid has deepskip"),
        ({"space": {}}, "space is empty"),
        ({"space": {"steps": [1, 2]}}, "space has steps; it may have alpha"),
        ({"space": {"alpha": [0.5, 1.5]}}, "space.alpha is [0.5, 1.5]; it must be [lowest, highest], both 0 to 1"),
        ({"space": {"beta": [0.0, 1.0]}}, "space.beta is [0.0, 1.0]; it must be [lowest, highest], both above 0"),
        ({"space": {"alpha": [0.5]}}, "space.alpha is [0.5]"),
    ],
)
def test_bad_searches_are_named(changed: dict[str, object], words: str) -> None:
    [fault] = faults_of_space(replace(Search({"deepskip": ROW}), **changed))  # type: ignore[arg-type]
    assert fault.startswith(words)
