"""Every kernel is built for GPUs that are not here, and none keeps registers in memory."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("suite", "count"), [("bce_dice", 82), ("deep_skip", 28)])
def test_every_variant_builds_without_a_gpu_and_spills_nothing(suite: str, count: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.bench.builds", suite],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("sm_")]
    # architecture, variant, registers, spilled bytes, shared bytes
    assert {row[0] for row in rows} == {"sm_80", "sm_90"}
    assert len({(row[0], row[1]) for row in rows}) == 2 * count
    assert all(int(row[-2]) == 0 for row in rows), done.stdout
    assert all(0 < int(row[-3]) <= 255 for row in rows)
    assert all(int(row[-1]) <= 227 * 1024 for row in rows)
