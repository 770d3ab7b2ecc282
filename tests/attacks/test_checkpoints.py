"""Untrusted checkpoints are refused with a message before anything large is unpacked or built."""

import copy
import hashlib
import io
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepskip
from deepskip import checkpoint
from tests.attacks import forked
from tests.jobs.serving import state

NAN = float("nan")
State = dict[str, Any]


class Evil:
    """A pickle that runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch PWNED",)


def put(*path: Any) -> Callable[[State], Any]:
    """Return a function that sets a value: put("data", "std", [0.0])."""

    def change(made: State) -> None:
        place: Any = made
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return change


def drop(*path: Any) -> Callable[[State], Any]:
    """Return a function that removes a value."""

    def change(made: State) -> None:
        place: Any = made
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def first_weight(value: Callable[[torch.Tensor], Any]) -> Callable[[State], Any]:
    """Return a function that changes the first weight."""

    def change(made: State) -> None:
        name = next(iter(made["model"]))
        made["model"][name] = value(made["model"][name])

    return change


FORGED: dict[str, Callable[[State], Any]] = {
    "a pickle": put("x", Evil()),
    "no data": drop("data"),
    "no config": drop("config"),
    "no model": drop("model"),
    "data that are nothing": put("data", None),
    "config that is a list": put("config", []),
    "model that is a number": put("model", 1),
    "no model section": drop("config", "model"),
    "no normalisation": drop("config", "data", "normalize"),
    "a strange normalisation": put("config", "data", "normalize", "os.system"),
    "ten million bands": put("data", "in_channels", 10**7),
    "-1 bands": put("data", "in_channels", -1),
    "half a band": put("data", "in_channels", 0.5),
    "4000 bands": put("data", "in_channels", 4000),
    "a true band": put("data", "in_channels", True),
    "no classes": put("data", "num_classes", 0),
    "milliards of classes": put("data", "num_classes", 10**9),
    "60 levels": put("config", "model", "levels", 60),
    "a million channels": put("config", "model", "base_channels", 10**6),
    "1024 channels": put("config", "model", "base_channels", 1024),
    "levels as text": put("config", "model", "levels", "3"),
    "a strange norm": put("config", "model", "norm", "os.system"),
    "enlarged a million times": put("config", "model", "enlarge", 10**6),
    "a strange network": put("config", "model", "network", "os.system"),
    "a network that is a list": put("config", "model", "network", []),
    "another network": put("config", "model", "network", "unet"),
    "wide layers": lambda made: made["config"]["model"].update(network="unet", options={"features": [10**9] * 6}),
    "many blocks": lambda made: made["config"]["model"].update(network="h_dense_unet", options={"blocks": [10**6] * 4}),
    "a short mean": put("data", "mean", [0.0]),
    "a mean of text": put("data", "mean", "abc"),
    "a mean that is nan": put("data", "mean", [NAN] * 3),
    "deviations of 0": put("data", "std", [0.0] * 3),
    "a negative deviation": put("data", "std", [1.0, -1.0, 1.0]),
    "an infinite deviation": put("data", "std", [float("inf")] * 3),
    "preparation that is text": put("data", "preparation", "x"),
    "0 as the longest side": put("data", "preparation", {"bands": None, "longest_side": 0}),
    "milliards of bands to prepare": put("data", "preparation", {"bands": 10**9, "longest_side": None}),
    "a weight that is nan": first_weight(lambda weight: weight.fill_(NAN)),
    "a weight that is infinite": first_weight(lambda weight: weight / 0),
    "a weight missing": lambda made: made["model"].pop(next(iter(made["model"]))),
    "a weight more": put("model", "x", torch.zeros(3)),
    "a weight that is text": first_weight(lambda weight: "x"),
    "a weight of another shape": first_weight(lambda weight: weight[:1]),
    "a weight told to be many": first_weight(lambda weight: torch.zeros(1).expand(weight.shape)),
    "a weight of ten milliards": first_weight(lambda weight: torch.zeros(1).expand(10**10)),
    "a sparse weight": first_weight(lambda weight: weight.to_sparse()),
    "an average that is text": put("ema", "x"),
    "an average that is nan": lambda made: made.update(
        ema={name: weight * NAN for name, weight in made["model"].items()}
    ),
}


def signed(body: bytes) -> bytes:
    """Add a valid checksum to a zip, as an attacker can compute it too."""
    data = bytearray(body)
    data[-2:] = (71).to_bytes(2, "little")
    data += b"sha256:"
    return bytes(data + hashlib.sha256(data).hexdigest().encode())


@pytest.fixture(scope="module")
def trained() -> State:
    return state(3, 1) | {"step": 1, "best": None, "mlflow_run_id": None}


def use(path: Path) -> int:
    """Load a model and return its number of bands."""
    return deepskip.load(path).bands


@pytest.mark.parametrize("name", FORGED)
def test_a_checkpoint_that_says_what_cannot_be(
    name: str, trained: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = copy.deepcopy(trained)
    FORGED[name](made)
    path = Path("model.pt")
    path.write_bytes(checkpoint.pack(made))
    outcome = forked.run(lambda: use(path))
    assert not outcome.killed
    assert outcome.error == "CheckpointError", f"{outcome.error}: {outcome.said}"
    assert "model.pt" in outcome.said
    assert outcome.megabytes < 300
    assert not Path("PWNED").exists()


def test_a_checkpoint_whose_parts_are_packed(trained: State, tmp_path: Path) -> None:
    whole = bytes(checkpoint.pack(trained))
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(out, "w", method) as packed:
            for part in archive.infolist():
                data = archive.read(part)
                packed.writestr(part.filename, bytes(10**8) if part.filename.endswith("/data/0") else data)
        path = tmp_path / "model.pt"
        path.write_bytes(signed(out.getvalue()))
        assert path.stat().st_size < 10**6
        outcome = forked.run(lambda path=path: use(path))
        assert (outcome.error, outcome.killed) == ("CheckpointError", 0)
        assert "unpack to more than its" in outcome.said
        assert outcome.megabytes < 64


def test_damaged_checkpoints_of_a_right_checksum(trained: State, tmp_path: Path) -> None:
    body = bytes(checkpoint.pack(trained))[:-71]
    path = tmp_path / "model.pt"

    def many(first: int) -> str:
        for seed in range(first, first + 250):
            rng = random.Random(seed)
            data = bytearray(body)
            for _ in range(rng.choice([1, 2, 8])):
                # The beginning and the end of the file describe its parts.
                at = rng.choice([rng.randrange(2000), len(data) - 1 - rng.randrange(4000), rng.randrange(len(data))])
                data[at] = rng.choice([0, 255, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))])
            path.write_bytes(signed(bytes(data)))
            try:
                checkpoint.load_for_inference(path)
            except checkpoint.CheckpointError:
                continue
            except Exception as error:
                return f"seed {seed}: {type(error).__name__}: {error}"
        return ""

    for first in range(0, 2000, 250):
        outcome = forked.run(lambda first=first: many(first), seconds=2 * forked.HANG_SECONDS)
        assert (outcome.error, outcome.killed, outcome.said) == ("", 0, "''"), f"from seed {first}: {outcome}"
        assert outcome.megabytes < 1000
