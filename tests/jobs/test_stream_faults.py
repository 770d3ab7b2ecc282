"""The short form of `make stream-faults`: a stream is trained on exactly once, whatever breaks."""

import subprocess
import sys
from pathlib import Path

from tests.jobs.growing import ROOT


def test_a_stream_while_its_writer_workers_driver_and_endpoint_break(tmp_path: Path) -> None:
    # tests/jobs/test_following.py compares the losses with those of a training on all of the data at once.
    words = ["-m", "tests.jobs.stream_faults", "--once", "--seed", "3", "--generations", "2", "--pause", "4", "--out"]
    done = subprocess.run([sys.executable, *words, tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "of 3 generations, each trained exactly once in " in done.stdout, said
    for fault in ("S3 cut", "S3 held", "driver killed", "worker killed"):
        assert fault in done.stdout.partition("faults: ")[2], said
