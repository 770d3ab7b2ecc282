"""The GPU run at toy size leaves whole rows, a page of them and its journal."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deepskip.kernels.bench import gpu, gpu_page, gpu_part, gpu_phases, journal

pytestmark = pytest.mark.slow
PHASES = {"machine", "bandwidth", "gate", "launches", "candidates", "contenders", "network", "autotune", "other types"}


def start(folder: Path, seconds: int) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "deepskip.kernels.bench.gpu", "--out", str(folder), "--seconds", str(seconds)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def whole_rows(folder: Path) -> list[dict[str, Any]]:
    rows, broken = journal.read(folder / "rows.jsonl")
    assert broken == 0
    return rows


@pytest.mark.new_launches
def test_every_phase_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(tmp_path, 1000)
    output, _ = process.communicate(timeout=850)
    assert process.returncode == 0, output
    rows = whole_rows(tmp_path)
    assert not [row for row in rows if "failed" in row or "skipped" in row], output
    assert {row["phase"] for row in rows} == PHASES
    gate = [row for row in rows if row["suite"] == "gate"]
    assert gate
    assert all(row["right"] for row in gate if "right" in row)
    assert {row["dtype"] for row in gate if row.get("complete")} == {"torch.float32", "torch.float16"}
    timed = [row for row in rows if "seconds" in row]
    # All timings are kept, not only their median.
    assert all(isinstance(row["seconds"], list) and min(row["seconds"]) > 0 for row in timed)
    assert {row["suite"] for row in timed} == {
        "bandwidth", "launches", "candidates", "stage contenders", "norm contenders", "loss contenders", "network",
    }  # fmt: skip
    counts = tmp_path / "counts.json"
    counts.write_text("[]")
    monkeypatch.setattr(sys, "argv", ["gpu_page", str(tmp_path), "--counts", str(counts)])
    gpu_page.main()
    page = (tmp_path / "page.md").read_text()
    for heading in (
        "Bandwidth",
        "Correctness",
        "Our operators",
        "BCE + Dice, compared",
        "Batch norm and ReLU, compared",
        "The whole network",
        "Shapes of the",
    ):
        assert f"## {heading}" in page
    assert (tmp_path / "network-training-step.svg").stat().st_size > 1000


def test_parts_without_time_say_so_and_a_crash_takes_no_other_with_it(tmp_path: Path) -> None:
    gpu.run_part(gpu.PARTS[0], tmp_path, time.time())
    crash = gpu.Part("deepskip.kernels.bench.no_such_module", ("crash",), 1.0)
    gpu.run_part(crash, tmp_path, time.time() + 60)
    first, second = whole_rows(tmp_path)
    assert first["skipped"] == "no time was left"
    assert "ended with status 1" in second["failed"]
    assert "no_such_module" in (tmp_path / "output.txt").read_text()


@pytest.mark.new_launches
def test_what_is_wrong_beside_float64_is_not_timed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    part = gpu.Part("deepskip.kernels.bench.gpu_phases", ("launches",), 1.0)
    gpu.run_part(part, tmp_path, time.time() + 120)
    assert whole_rows(tmp_path)[0]["skipped"] == "the comparison with float64 did not end"
    about = {"suite": "gate", "dtype": "torch.float32"}
    journal.append(file, about | {"operator": "level 3 stage", "right": False, "error": None, "plain_error": 0.0})
    for operator in ("level 3 norm + ReLU, next", "level 4 stage, next", "conv3 4 -> 4, next"):
        journal.append(file, about | {"operator": operator, "right": False, "error": None, "plain_error": 0.0})
    journal.append(file, about | {"operator": "loss", "right": True})
    journal.append(file, about | {"operator": "all", "complete": True})
    gpu.run_part(part, tmp_path, time.time() + 120)
    timed = [row for row in whole_rows(tmp_path) if "seconds" in row]
    assert timed
    assert all(row["size"].startswith("loss") for row in timed)
    assert "* wrong: level 3 stage, torch.float32: an error of None, of its norm" in gpu_page.page(
        whole_rows(tmp_path), 0, []
    )


def test_an_error_that_is_no_number_is_wrong() -> None:
    exact = [torch.ones(3, dtype=torch.float64)]
    bad = [torch.tensor([1.0, float("nan"), 1.0])]
    row = gpu_phases.judged(torch.float32, bad, [torch.ones(3)], exact)
    assert (row["right"], row["error"]) == (False, None)
    assert gpu_phases.judged(torch.float32, [torch.ones(3)], [torch.ones(3)], exact)["right"]


def test_a_job_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("no such shape")

    file = tmp_path / "rows.jsonl"
    gpu_part.run_job(({"size": "one"}, fail), {"phase": "candidates"}, file)
    gpu_part.run_job(({"size": "two"}, lambda: [{"seconds": [1.0]}, {"seconds": [2.0]}]), {"phase": "candidates"}, file)
    first, *others = whole_rows(tmp_path)
    assert first["failed"] == "ValueError: no such shape"
    assert [row["seconds"] for row in others] == [[1.0], [2.0]]

    def break_card() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        gpu_part.run_job(({"size": "three"}, break_card), {"phase": "candidates"}, file)
    assert "illegal" in whole_rows(tmp_path)[-1]["failed"]


def test_a_row_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    journal.append(file, {"a": 1})
    # A writer that dies during a write leaves this. The next row is not lost with it.
    with file.open("a") as half:
        half.write('{"a": 2, "b"')
    assert [row["a"] for row in journal.read(file)[0]] == [1]
    journal.append(file, {"a": 3})
    rows, broken = journal.read(file)
    assert [row["a"] for row in rows] == [1, 3]
    assert broken == 1
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.append(file, {"a": float("nan")})
    assert all(json.loads(line) for line in file.read_text().splitlines() if '"b"' not in line)


def test_the_page_compares_within_one_run_and_marks_what_is_lost() -> None:
    row = {"suite": "stage contenders", "size": "level 1", "operator": "forward", "phase": "contenders"}
    faster = row | {
        "implementation": "eager",
        "seconds": [0.004, 0.002, 0.003],
        "deepskip_seconds": [0.001, 0.001, 0.5],
    }
    slower = row | {"implementation": "other", "seconds": [0.0005], "deepskip_seconds": [0.001]}
    page = gpu_page.page([faster, slower], 1, [])
    # The medians are 3 ms against 1 ms, and 0.5 ms against 1 ms.
    assert "| level 1: eager, forward | 3.000 (2.000 to 4.000) | 1.000 | 3.00 x |" in page
    assert "| level 1: other, forward | 0.500 (0.500 to 0.500) | 1.000 | **0.50 x** |" in page
    assert "1 rows are incomplete" in page
