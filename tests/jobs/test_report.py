"""What a training prints at its end."""

import io
from pathlib import Path

import pytest

from deepskip.config import Config
from deepskip.jobs import report
from deepskip.jobs.runs import Run


def test_the_command_that_trains_further_names_each_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "my own.yaml", "--run.name", "old", "--optim.steps=160", "--data.crop", "64"]
    config = Config()
    config.optim.steps = 160
    report.print_next_steps(config, Run(Path("runs/new"), None, io.StringIO()), "sqlite:///x.db", argv)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume:")]
    assert line.endswith("deepskip train --config 'my own.yaml' --data.crop 64 --run.name new --optim.steps 320")
