"""The messages that a training prints."""

import io
import math
from pathlib import Path
from typing import Any

import pytest

from deepskip.config import Config
from deepskip.jobs import report
from deepskip.jobs.runs import Run
from deepskip.jobs.training.console import Console
from deepskip.jobs.training.events import Measured


def test_the_command_that_trains_further_names_each_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "my own.yaml", "--run.name", "old", "--optim.steps=160", "--data.crop", "64"]
    config = Config()
    config.optim.steps = 160
    report.print_next_steps(config, Run(Path("runs/new"), None, io.StringIO()), "sqlite:///x.db", argv)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume:")]
    assert line.endswith("deepskip train --config 'my own.yaml' --data.crop 64 --run.name new --optim.steps 320")


def summary(**validation: float | None) -> dict[str, Any]:
    metrics = dict.fromkeys(report.METRICS, 0.25) | {"step": 40} | validation
    return {"name": "mine", "val": metrics, "steps": 40, "parameters": 1200, "conv_weights": 1000, "seconds": 3.0}


def test_the_table_has_the_best_threshold_where_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(summary(iou=0.0, iou_best_threshold=0.9213, best_threshold=0.1) | {"images_per_second": 51.26})
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("  IoU                     0.0000")
    assert lines[place + 1] == "  IoU, best threshold     0.9213 at 0.10"
    assert "  images/s                51.3" in lines
    # The summaries are of classes, of an earlier version, and of a split without foreground.
    for none in ({}, {"iou_best_threshold": None, "best_threshold": 0.5}, {"iou_best_threshold": math.nan}):
        report.print_table(summary(**none) | {"images_per_second": 51.26})
        assert "best threshold" not in capsys.readouterr().out


def test_a_training_that_did_no_steps_has_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table(summary() | {"images_per_second": 0.0})
    lines = capsys.readouterr().out.splitlines()
    assert "  images/s                -" in lines
    assert "0.0" not in "".join(lines)


def test_a_validation_that_misleads_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(Config(), Run(tmp_path, None, io.StringIO()), None)
    speed = {"loss": 0.3, "images_per_second": 9.0, "seconds_left": 1.0}

    def said(trained: float | None, at_half: float, best: float) -> str:
        training = speed if trained is None else speed | {"iou": trained, "dice": 0.8}
        console.take(Measured("train", 40, training, 0))
        capsys.readouterr()
        console.take(Measured("validation", 40, {"iou": at_half, "iou_best_threshold": best, "best_threshold": 0.1}, 0))
        return capsys.readouterr().out

    # Here training is bad too, no threshold is good, 0.5 is good, training has no IoU, or there is nothing to find.
    for values in ((0.4, 0.0, 0.9), (0.8, 0.0, 0.4), (0.8, 0.5, 0.9), (None, 0.0, 0.9), (0.8, math.nan, math.nan)):
        assert said(*values) == ""
    (line,) = said(0.81, 0.0, 0.92).splitlines()
    assert line.startswith(
        "warning: validation after step 40 has IoU 0.000 at threshold 0.5, but 0.920 at 0.10, and training has 0.810"
    )
    assert said(0.81, 0.0, 0.92) == ""


def test_the_progress_line_of_a_stream() -> None:
    values = {"loss": 0.5, "dice": 0.25, "images_per_second": 81.25}
    assert report.progress_line(7, None, values) == "step 7  loss 0.5000  Dice 0.250  81.2 images/s"
    stream = {"stream/iou": 0.8125, "stream/lag_seconds": 2.04, "stream/samples_behind": 64.0, "stream/generation": 3}
    assert report.progress_line(7, 9, values | stream | {"seconds_left": 61.0}) == (
        "step 7/9  loss 0.5000  Dice 0.250  81.2 images/s  IoU of new 0.812  lag 2.0 s  64 behind  1:01 left"
    )
