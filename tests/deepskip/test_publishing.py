"""The best model is published under its digest: whole, only if it is better, and never wrong in silence."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import deepskip
from deepskip import checkpoint, publishing
from deepskip.publishing import BrokenPublication, Publisher, read_pointer
from deepskip.trainer import train
from tests.deepskip.test_trainer import DATA, batches, config, images
from tests.jobs.serving import state


def validated(iou: float, step: int = 1) -> dict[str, Any]:
    """Return the state of a small model with a validation, whose weights depend on the step."""
    made = state(3, 1)
    made["model"]["head.bias"] = made["model"]["head.bias"] + step
    return made | {"step": step, "best": {"iou": iou, "step": step}}


def test_a_model_is_published_if_it_is_better_by_the_least_gain(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path, 0.05)
    taken = []
    # The gain counts from the published model, so small steps add up; nan is the best there is.
    for step, iou in enumerate((0.5, 0.54, 0.56, 0.1, 0.62, 0.7, math.nan, 0.9), 1):
        pointer = publisher.publish(validated(iou, step))
        if pointer is not None:
            taken.append(step)
            path = tmp_path / pointer.file
            assert hashlib.sha256(path.read_bytes()).hexdigest() == pointer.sha256
            assert read_pointer(tmp_path) == pointer
            found = publishing.load(tmp_path, pointer.sha256)
            expected = validated(iou, step)["model"]
            assert found["model"].keys() == expected.keys()
            assert all(torch.equal(found["model"][name], expected[name]) for name in expected)
    assert taken == [1, 3, 5, 6, 7]
    # The present one and two before it are kept, and nothing else.
    last = read_pointer(tmp_path)
    assert last is not None
    assert (last.step, last.iou) == (7, None)
    kept = {publishing.name_of(each) for each in (last.sha256, *last.earlier)}
    assert {path.name for path in tmp_path.iterdir()} == {publishing.POINTER, *kept}
    assert len(kept) == 3
    assert publisher.publish(validated(0.5) | {"best": None}) is None


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    assert read_pointer(tmp_path / "none") is None
    pointer = Publisher(tmp_path, 0).publish(validated(0.5))
    assert pointer is not None
    path = tmp_path / pointer.file
    whole = path.read_bytes()
    for wrong, words in ((whole[:-9], "damaged or incomplete"), (whole[:-1] + b"x", "damaged or incomplete")):
        path.write_bytes(wrong)
        with pytest.raises(BrokenPublication, match=words):
            publishing.load(tmp_path, pointer.sha256)
    # A file that is what its name says, but no model.
    other = hashlib.sha256(b"other").hexdigest()
    (tmp_path / publishing.name_of(other)).write_bytes(b"other")
    with pytest.raises(BrokenPublication, match="no complete safetensors file"):
        publishing.load(tmp_path, other)
    path.unlink()
    with pytest.raises(BrokenPublication, match="is missing"):
        publishing.load(tmp_path, pointer.sha256)
    told = json.loads((tmp_path / publishing.POINTER).read_text())
    for change in ({"sha256": "../../x"}, {"version": 2}, {"format": "x"}, {"iou": "x"}, {"earlier": 3}):
        (tmp_path / publishing.POINTER).write_text(json.dumps(told | change))
        with pytest.raises(BrokenPublication, match="is damaged"):
            read_pointer(tmp_path)
    for text in ("", "{", "[]", "9" * 2_000_000):
        (tmp_path / publishing.POINTER).write_text(text)
        with pytest.raises(BrokenPublication, match="is damaged"):
            read_pointer(tmp_path)
    # A damaged pointer is replaced by the next model.
    path.write_bytes(whole)
    assert Publisher(tmp_path, 0).publish(validated(0.1)) is not None
    with pytest.raises(BrokenPublication, match="has bands 3, but the served one 2"):
        publishing.load_like(tmp_path, pointer.sha256, validated(0.5)["data"] | {"in_channels": 2})


def test_a_training_publishes_its_best_also_after_it_died(tmp_path: Path) -> None:
    settings = config()
    settings.run.validate_every = 1
    settings.publish.path = str(tmp_path / "published")
    warnings: list[str] = []

    def observe(kind: str, step: int, values: dict[str, Any]) -> None:
        warnings.extend([values["text"]] if kind == "warning" else [])

    def run() -> None:
        train(
            settings, DATA, run=tmp_path / "run", train_batches=batches, validation_images=images, observe=observe
        )  # fmt: skip

    # A file where the folder should be: the training ends as usual, and says what is wrong.
    (tmp_path / "published").write_text("")
    run()
    assert warnings
    assert "the best model is not published" in warnings[0]
    (tmp_path / "published").unlink()
    run()
    best = checkpoint.read(tmp_path / "run" / checkpoint.FOLDER / checkpoint.BEST)
    pointer = read_pointer(tmp_path / "published")
    assert pointer is not None
    assert (pointer.iou, pointer.step) == (best["best"]["iou"], best["best"]["step"])
    model = deepskip.load(tmp_path / "published" / pointer.file)
    for name, value in (best["ema"] or best["model"]).items():
        assert torch.equal(model.network.state_dict()[name], value), name


def test_a_bucket_is_a_place(s3: Any) -> None:
    first = Publisher("s3://bucket/published", 0).publish(validated(0.5, 1))
    second = Publisher("s3://bucket/published", 0).publish(validated(0.6, 2))
    assert first is not None
    assert read_pointer("s3://bucket/published") == second
    assert publishing.load("s3://bucket/published", first.sha256)["step"] == 1
    assert read_pointer("s3://bucket/nowhere") is None
