"""The number format of a training: which is taken, that it stays, and that bf16 is resumed bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deepskip import checkpoint, precision
from tests.deepskip.test_trainer import assert_same_state, config, losses

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "recorded", "device", "able", "taken"),
    [
        (None, None, CPU, True, torch.float32),
        (None, None, GPU, True, torch.bfloat16),
        ("auto", None, CPU, True, torch.bfloat16),
        ("auto", None, CPU, False, torch.float32),
        ("float32", None, GPU, True, torch.float32),
        ("bfloat16", None, CPU, False, torch.bfloat16),
        # A run that began on another machine keeps its format.
        ("auto", "bfloat16", CPU, False, torch.bfloat16),
        ("auto", "float32", CPU, True, torch.float32),
    ],
)
def test_what_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    recorded: str | None,
    device: torch.device,
    able: bool,
    taken: torch.dtype,
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: able)
    said: list[str] = []
    state: Any = None if recorded is None else {"config": {"run": {"precision": recorded}}}
    assert precision.agreed_precision(asked, state, device, 1, said.append) == taken
    # A CPU that imitates bf16 is slow, and says so.
    assert bool(said) == (taken == torch.bfloat16 and not able)
    # Checkpoints of earlier versions have no such entry.
    assert recorded or precision.agreed_precision(asked, {"config": {"run": {}}}, device, 1, said.append) == taken  # type: ignore[typeddict-item]


def test_a_training_in_bf16_resumes_bit_for_bit_and_is_near_that_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(steps=6)
    plain, _ = losses(tmp_path / "plain", settings)
    settings.run.precision = "auto"
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: True)
    unbroken, _ = losses(tmp_path / "unbroken", settings)
    first, _ = losses(tmp_path / "broken", settings, stop_at=3)
    # It resumes on a machine that would have taken fp32.
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    second, _ = losses(tmp_path / "broken", settings)
    assert first | second == unbroken
    assert_same_state(tmp_path / "unbroken", tmp_path / "broken")
    state, _ = checkpoint.newest(tmp_path / "broken")
    assert state is not None
    assert state["config"]["run"]["precision"] == "bfloat16"
    assert unbroken != plain
    assert unbroken == pytest.approx(plain, rel=0.02)
