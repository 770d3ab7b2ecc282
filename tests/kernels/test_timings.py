"""On a GPU the new launches are taken where a stored timing says that they are faster, and nowhere else."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deepskip import kernels
from deepskip.kernels import backend, deep_skip_triton, timings
from deepskip.kernels.bench import cases, gpu_norms, gpu_phases, store_timings
from deepskip.kernels.bench.gpu_part import REAL, Run
from deepskip.kernels.timings import Timing

CARD = "NVIDIA Test 1"


def run_rows(faster: float) -> list[dict[str, Any]]:
    """Return the rows that a run of the real sizes leaves if every new launch is faster by a factor."""
    run = Run(torch.device("cpu"), REAL, time.time() + 1, {}, frozenset())
    rows: list[dict[str, Any]] = [{"suite": "environment", "device": "cuda", "name": CARD}]
    for suffix in ("", gpu_phases.NEXT):
        seconds = [1.0, 9.0, 1.0] if not suffix else [1 / faster] * 3
        for name, *_ in gpu_phases.levels(run, suffix):
            for operator in ("stage forward", "stage forward + backward"):
                rows.append({"suite": "launches", "size": name, "operator": operator, "seconds": seconds})
    for name, _ in gpu_phases.losses(run):
        rows.append({"suite": "launches", "size": f"loss, {name}", "operator": "loss + gradient", "seconds": [1.0]})
    for name, _ in gpu_phases.next_losses(run):
        row = {"suite": "launches", "size": f"loss, {name}", "operator": "loss + gradient"}
        rows.append(row | {"seconds": [1 / faster]})
    for size in REAL.convolutions:
        operator = f"{gpu_phases.convolution_name(size)}, forward + backward"
        row = {"suite": "launches", "size": "x".join(map(str, size)), "operator": operator}
        rows.append(row | {"seconds": [1 / faster], "plain_seconds": [1.0]})
    for name, *_ in gpu_norms.sizes(run):
        row = {"suite": "norm contenders", "size": name, "operator": "forward + backward"}
        rows.append(row | {"seconds": [1.0], "deepskip_seconds": [1 / faster]})
    return rows


def test_every_size_of_a_run_is_stored_under_the_name_that_the_operators_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run_rows(2.0)))
    file = tmp_path / "timings.json"
    timings.save({"another": {"bce_dice 1": [Timing(100, 3.0)]}}, file)
    monkeypatch.setattr(sys, "argv", ["store_timings", str(tmp_path), "--file", str(file)])
    assert store_timings.main() == 0
    stored = timings.load(file)
    assert stored["another"] == {"bce_dice 1": [Timing(100, 3.0)]}
    # Levels 1 and 2 have 5 and 4 maps; norms have no further name.
    names = {"deep_skip 8 x 5", "deep_skip 16 x 4", "bce_dice 1"}
    names |= {"conv3 8 to 8", "conv3 40 to 8", "conv3 3 to 8"} | {f"batch_norm_relu {8 << u}" for u in range(4)}
    assert stored[CARD].keys() == names
    assert stored[CARD]["deep_skip 16 x 4"] == [(8 * 512 * 512, 2.0), (16 * 256 * 256, 2.0)][::-1]
    asked: list[str] = []
    monkeypatch.setattr(backend, "uses_next", lambda name, x: asked.append(name) or False)
    monkeypatch.setattr(backend, "implementation", lambda x: "triton")
    monkeypatch.setattr(deep_skip_triton, "deep_skip", lambda inputs, weights, mode: inputs[0])
    for u in (1, 2):
        inputs, weights = cases.level_inputs(u, 1, 16, 16, torch.float32, torch.channels_last, torch.device("cpu"))
        kernels.deep_skip(inputs, weights)
    assert asked == ["deep_skip 8 x 5", "deep_skip 16 x 4"]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [(24, False), (25, True), (100, True), (399, True), (400, False), (1000, False), (4001, False)],
)
def test_near_a_timed_size(pixels: int, expected: bool) -> None:
    # At 100 pixels the new launches win, at 1000 they do not by enough.
    found = {CARD: {"bce_dice 1": [Timing(100, 1.1), Timing(1000, 1.02)]}}
    assert timings.next_wins(CARD, "bce_dice 1", pixels, found) is (expected and pixels < 250)
    only = {CARD: {"bce_dice 1": [Timing(100, 1.1)]}}
    assert timings.next_wins(CARD, "bce_dice 1", pixels, only) is (25 <= pixels <= 400)
    assert not timings.next_wins("another", "bce_dice 1", pixels, only)
    assert not timings.next_wins(CARD, "bce_dice 2", pixels, only)


def test_only_auto_asks_and_only_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "_stored", lambda: {CARD: {"bce_dice 2": [Timing(48, 1.5)]}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: CARD)
    backend._gpu_name.cache_clear()
    x = torch.zeros(3, 2, 4, 4)
    on_gpu = cast(Tensor, SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0), numel=x.numel, shape=x.shape))
    assert (backend.uses_next("bce_dice 2", on_gpu), backend.uses_next("bce_dice 2", x)) == (True, False)
    for name, expected in (("triton", False), ("next", True)):
        with backend.chosen(name):
            assert backend.uses_next("bce_dice 2", on_gpu) is expected
    backend._gpu_name.cache_clear()
