"""SIGTERM to a worker or to the job leaves a checkpoint of that step, and the training resumes after it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from deepskip.data_shards.commands import pack_coins


def test_sigterm_to_a_worker_and_to_the_job(tmp_path: Path) -> None:
    pack_coins(tmp_path / "data" / "coins", {"train": 16, "val": 2})
    steps = 60
    settings = ["--model.base_channels", "4", "--model.levels", "3", "--cluster.workers", "2"]
    settings += ["--optim.steps", str(steps)]
    settings += ["--run.log_every", "1", "--run.validate_every", "1000", "--run.checkpoint_every", "1000"]
    settings += ["--run.tracking_uri", "none", "--run.panels", "0"]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    output, done = "", []
    for status in (128 + signal.SIGTERM, 0):
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "deepskip.jobs.train", *settings],
            cwd=tmp_path, env=variables | {"HOME": str(tmp_path)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        starts = 0
        for line in process.stdout:
            output += line
            # The output is shown if this takes too long.
            sys.stdout.write(line)
            starts += line.startswith("resuming at step")
            if found := re.match(r"step (\d+)/", line):
                done.append(int(found[1]))
                if len(done) == 3:
                    family = psutil.Process(process.pid).children(recursive=True)
                    workers = sorted((p for p in family if "RayTrainWorker" in p.name()), key=lambda p: p.pid)
                    assert len(workers) == 2
                    workers[1].terminate()
                elif starts and status:
                    process.terminate()
                    starts = 0
        assert process.wait(60) == status, output
    # Only checkpoints made on the signals can join the parts without a gap or a repeated step.
    assert done == list(range(1, steps + 1)), output
    assert len(re.findall(r"warning: stopped after step \d+ as requested; its checkpoint is written", output)) == 2
