"""The models that are installed with DeepSkip are those of their page, and score what it says."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import deepskip
from deepskip import weight_files
from deepskip.data_shards.commands import pack_coins
from deepskip.jobs import cli

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def rows() -> dict[str, dict[str, str]]:
    """Return the cells of the page's table by model, then by row."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    names = PAGE.read_text().split("| | ", 1)[1].split(" |\n", 1)[0].split(" | ")
    return {name: {line[0]: line[1 + at] for line in lines[2:] if len(line) > at + 1} for at, name in enumerate(names)}


def test_the_files_are_those_of_the_page() -> None:
    assert rows().keys() == weight_files.installed().keys()
    for name, path in weight_files.installed().items():
        data = path.read_bytes()
        assert hashlib.sha256(data).hexdigest() == rows()[name]["SHA-256"].strip("`"), name
        assert len(data) < 3e6
        # Nothing of the machine that trained it.
        assert not re.search(rb"/(home|root|tmp|work)/", data[:100_000])


def test_coins_scores_what_its_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pack_coins(Path("data/coins"), {"train": 1, "val": 1, "test": 100})
    cli.main(["evaluate", "--model", "coins", "--data", "data/coins/test", "--out", "report", "--track", "none"])
    found = json.loads(Path("report/report.json").read_text())["metrics"]
    for label, metric in {"IoU": "iou", "Dice": "dice", "object recall": "object_recall"}.items():
        assert f"{found[metric]:.3f}" == rows()["coins"][f"{label}, test split"], label


def test_each_predicts_and_a_path_of_the_same_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in weight_files.installed():
        assert deepskip.load(name).predict(np.zeros((40, 30, 3), np.uint8)).shape == (40, 30)
    Path("coins").mkdir()
    with pytest.raises(deepskip.checkpoint.CheckpointError, match="coins holds no checkpoint"):
        deepskip.load("coins")
    with pytest.raises(deepskip.checkpoint.CheckpointError, match=r"or a model that comes with DeepSkip \(coins, "):
        deepskip.load("coin")
