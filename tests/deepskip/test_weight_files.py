"""Weights as safetensors: they are read by the format's own rules, and give the model that they were made of."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepskip
from deepskip import checkpoint, weight_files
from deepskip.jobs import cli
from deepskip.jobs.report import METRICS
from tests.jobs.serving import state

# Nothing was predicted, so precision is 0 / 0.
BEST = dict.fromkeys(METRICS, 0.5) | {"precision": math.nan, "step": 30}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    made = state(5, 1) | {"step": 40, "best": BEST, "mlflow_run_id": "f" * 32}
    made["ema"] = {name: x * 0.9 if x.is_floating_point() else x for name, x in made["model"].items()}
    made["config"]["data"] |= {"path": "/home/you/data/mine", "cache_dir": "/home/you/cache"}
    made["config"]["run"]["name"] = "mine"
    return made


def test_it_is_the_same_model(trained: dict[str, Any], tmp_path: Path) -> None:
    checkpoint.save(trained, tmp_path / "model.pt")
    (tmp_path / "model.safetensors").write_bytes(weight_files.pack(trained))
    image = np.random.default_rng(0).integers(0, 255, (37, 50, 5), np.uint8)
    expected, found = (deepskip.load(tmp_path / name) for name in ("model.pt", "model.safetensors"))
    np.testing.assert_array_equal(found.predict_proba(image), expected.predict_proba(image))
    assert found.state["step"] == 40
    assert found.state["best"] == pytest.approx(BEST, rel=0, abs=0, nan_ok=True)
    # The folders of a machine stay there.
    assert found.state["config"]["data"]["path"] == "mine"
    assert weight_files.without_folders(str(Path.cwd() / "data" / "coins")) == "data/coins"
    assert weight_files.without_folders("s3://bucket/coins") == "s3://bucket/coins"


def test_the_bytes_are_safetensors_by_hand(trained: dict[str, Any]) -> None:
    data = weight_files.pack(trained)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert b"/home" not in data[: 8 + length]
    assert header.pop("__metadata__")["format"] == "pt"
    assert header.keys() == trained["ema"].keys()
    kinds = {"F32": "<f4", "I64": "<i8"}
    for name, told in header.items():
        first, last = told["data_offsets"]
        values = np.frombuffer(data[8 + length + first : 8 + length + last], kinds[told["dtype"]])
        # The averages are stored, not the last weights.
        np.testing.assert_array_equal(values.reshape(told["shape"]), trained["ema"][name].numpy())


def test_weights_that_share_memory_are_both_stored(trained: dict[str, Any]) -> None:
    shared = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    found = weight_files.unpack(weight_files.pack(trained | {"ema": {"one": shared, "other": shared[:, 1:]}}))["model"]
    assert torch.equal(found["one"], shared)
    assert torch.equal(found["other"], shared[:, 1:])


def test_what_is_not_such_a_file(trained: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save

    path = tmp_path / "model.safetensors"
    whole = weight_files.pack(trained)
    changed = bytearray(whole)
    changed[-3] ^= 1
    swapped = {**trained, "ema": trained["ema"] | {"head.bias": trained["ema"]["head.bias"] * math.inf}}
    cases = {
        "is no complete safetensors file": whole[:-1],
        r"its bytes changed since it was written \(sha256 differs\)": bytes(changed),
        "was not written by DeepSkip": save({"x": torch.zeros(1)}),
        r"has version 2; this DeepSkip reads up to 1": whole.replace(b'\\"version\\": 1', b'\\"version\\": 2'),
        "contains no usable model: .*head.bias": weight_files.pack(swapped),
    }
    for said, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(checkpoint.CheckpointError, match=rf"model\.safetensors.* {said}"):
            deepskip.load(path)


def test_exported_and_used_by_every_command(trained: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint.save(trained, folder / "best.pt")
    out = tmp_path / "exported"
    cli.main(["export", "--model", str(folder.parent), "--formats", "[safetensors]", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.json", "model.safetensors"]
    assert json.loads((out / "model.json").read_text())["difference_from_pytorch"]["model.safetensors"] == {
        "1 x 97 x 61": 0.0, "2 x 33 x 130": 0.0, "3 x 65 x 47": 0.0,
    }  # fmt: skip
    np.save(tmp_path / "image.npy", np.random.default_rng(0).integers(0, 255, (40, 40, 5), np.uint8))
    words = ["--images", str(tmp_path / "image.npy"), "--out", str(tmp_path / "masks")]
    cli.main(["predict", "--model", str(out / "model.safetensors"), *words])
    assert len(list((tmp_path / "masks" / "masks").iterdir())) == 1
