"""Untrusted checkpoints are refused with a message before anything large is unpacked or built."""

import contextlib
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
from safetensors import torch as safetensors

import deepskip
from deepskip import checkpoint, weight_files
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


def refused(path: Path, data: bytes) -> str:
    """Return what is wrong if a file is neither used nor refused by the one error."""
    path.write_bytes(data)
    try:
        checkpoint.load_for_inference(path)
    except checkpoint.CheckpointError:
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_weights_that_say_what_cannot_be(trained: State, tmp_path: Path) -> None:
    path, made = tmp_path / "model.safetensors", {}
    told = weight_files.pack(trained)
    # Stored in full, this one is an ordinary weight.
    for name in FORGED.keys() - {"a weight told to be many"}:
        forged = copy.deepcopy(trained)
        FORGED[name](forged)
        # The others cannot be said in JSON, or are no tensors.
        with contextlib.suppress(TypeError, KeyError, AttributeError, ValueError, RuntimeError):
            made[name] = weight_files.pack(forged)
    # The pickle has no place in such a file.
    assert made.pop("a pickle") == told
    assert len(made) > 25
    deep = b'{"__metadata__":{"deepskip":"' + b"[" * 10**5 + b'"}}'
    made["a deep list"] = len(deep).to_bytes(8, "little") + deep
    made["a long header"] = (2**40).to_bytes(8, "little") + told[8:]
    made["weights of eight bits"] = safetensors.save(
        {name: x.to(torch.float8_e4m3fn) for name, x in trained["model"].items()}, {"deepskip": "{}"}
    )

    def all_of_them() -> str:
        for name, data in made.items():
            path.write_bytes(data)
            try:
                checkpoint.load_for_inference(path)
            except checkpoint.CheckpointError as error:
                if "model.safetensors" in str(error):
                    continue
                return f"{name}: {error}"
            return f"{name} is taken"
        return ""

    outcome = forked.run(all_of_them, seconds=forked.HANG_SECONDS)
    assert (outcome.error, outcome.killed, outcome.said) == ("", 0, "''"), outcome
    assert outcome.megabytes < 300


def test_damaged_weights(trained: State, tmp_path: Path) -> None:
    whole, path = weight_files.pack(trained), tmp_path / "model.safetensors"
    length = int.from_bytes(whole[:8], "little")

    def many() -> str:
        for seed in range(2000):
            rng = random.Random(seed)
            data = bytearray(whole)
            for _ in range(rng.choice([1, 2, 8])):
                at = rng.choice([rng.randrange(8 + length), rng.randrange(8), rng.randrange(len(data))])
                data[at] = rng.choice([0, 255, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))])
            if rng.random() < 0.1:
                del data[rng.randrange(len(data)) :]
            if wrong := refused(path, bytes(data)):
                return f"seed {seed}: {wrong}"
        return ""

    outcome = forked.run(many, seconds=2 * forked.HANG_SECONDS)
    assert (outcome.error, outcome.killed, outcome.said) == ("", 0, "''"), outcome
    assert outcome.megabytes < 300


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
            if wrong := refused(path, signed(bytes(data))):
                return f"seed {seed}: {wrong}"
        return ""

    for first in range(0, 2000, 250):
        outcome = forked.run(lambda first=first: many(first), seconds=2 * forked.HANG_SECONDS)
        assert (outcome.error, outcome.killed, outcome.said) == ("", 0, "''"), f"from seed {first}: {outcome}"
        assert outcome.megabytes < 1000
