"""A training whose disk is full ends with a message, and resumes from its last checkpoint when there is room."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest

from deepskip import checkpoint
from deepskip.data_shards.commands import pack_coins

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], check=False)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up_ends_the_training_with_its_last_checkpoint_whole(disk: Path, tmp_path: Path) -> None:
    pack_coins(tmp_path / "data", {"train": 8, "val": 2})
    settings = {
        "model.base_channels": 4,
        "model.levels": 3,
        "data.path": tmp_path / "data",
        "data.crop": 32,
        "optim.steps": 400,
        "optim.global_batch_size": 2,
        "run.name": "small",
        "run.storage": disk,
        "run.checkpoint_every": 5,
        "run.validate_every": 400,
        "run.panels": 0,
        "cluster.workers": 1,
    }
    command = [sys.executable, "-m", "deepskip.jobs.train", *(f"--{key}={value}" for key, value in settings.items())]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    options = {"env": variables | {"HOME": str(tmp_path)}, "cwd": tmp_path, "text": True}
    filler = disk / "filler"

    def fill() -> None:
        while not (disk / "small" / "checkpoints" / "step-00000020.pt").exists():
            time.sleep(0.02)
        for chunk in (65536, 512, 1):
            with suppress(OSError), filler.open("ab", buffering=0) as file:
                while file.write(b"0" * chunk):
                    continue

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    done = subprocess.run([*command], capture_output=True, timeout=200, check=False, **options)
    assert done.returncode != 0
    assert "disk" in done.stderr
    assert "full" in done.stderr or "No space left" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    state, faults = checkpoint.newest(disk / "small")
    assert state is not None
    assert faults == []
    assert 20 <= state["step"] < 400
    filler.unlink()
    done = subprocess.run([*command], capture_output=True, timeout=200, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step {state['step'] + 5}/400" in done.stdout
    run_id = json.loads((disk / "small" / "run.json").read_text())["mlflow_run_id"]
    client = mlflow.MlflowClient(f"sqlite:///{disk / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(5, 401, 5))
