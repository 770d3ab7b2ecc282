"""All networks work with the same commands: they are trained, resumed, used, exported and served."""

import asyncio
import io
import json
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import deepskip
from deepskip import checkpoint
from deepskip.config import Config
from deepskip.jobs import export, predict
from deepskip.jobs.serving.model import Model
from deepskip.networks import REGISTRY
from deepskip.training_step import TrainingStep
from tests.deepskip.networks.test_networks import OTHERS, settings_of
from tests.deepskip.test_trainer import DATA, assert_same_state, batch_of, config, losses

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(name: str, steps: int = 3) -> Config:
    settings = config(steps)
    settings.model = Config().model
    for key, value in settings_of(name).items():
        setattr(settings.model, key, value)
    settings.optim.optimizer = "adamw" if name == "mask_rcnn" else "muon"
    return settings


@pytest.mark.parametrize("name", [*REGISTRY, *OTHERS])
def test_trained_killed_resumed_and_predicted_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    whole, _ = losses(tmp_path / "whole", config_of(name))
    first, _ = losses(tmp_path / "run", config_of(name), stop_at=2)
    # Another seed stands for random numbers drawn in the meantime.
    torch.manual_seed(99)
    second, summary = losses(tmp_path / "run", config_of(name))
    assert first | second == whole
    assert_same_state(tmp_path / "whole", tmp_path / "run")
    assert summary["val"]["images"] == 5

    model = deepskip.load(tmp_path / "run")
    assert (
        type(model.network).__name__ == type(TrainingStep(config_of(name), DATA, torch.device("cpu")).network).__name__
    )
    image = np.random.default_rng(0).normal(size=(40, 56, 2)).astype(np.float32)
    np.save(tmp_path / "some.npy", image)
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--images", str(tmp_path / "some.npy"), "--out", str(out)]
    predict.main([*arguments, "--probabilities", "true", "--flips", "true", "--overlays", "false"])
    found = np.load(out / "probabilities" / "some.npy")
    expected = model.predict_proba(image, flips=True)[..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if name == "mask_rcnn":
        with pytest.raises(SystemExit):
            export.main(["--model", str(tmp_path / "run"), "--out", str(tmp_path / "exported")])
        assert "run cannot be exported: Mask R-CNN computes on as many boxes as it finds" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smp:Unet:resnet18", "pspnet"])
def test_exported(name: str, tmp_path: Path) -> None:
    """Export at sizes that are no multiples; `deepskip export` itself compares each file with the model."""
    losses(tmp_path / "run", config_of(name, 1))
    export.main(["--model", str(tmp_path / "run"), "--out", str(tmp_path / "exported")])
    card = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert card["network"]["network"] == name
    assert all(one < 1e-4 for sizes in card["difference_from_pytorch"].values() for one in sizes.values())


def test_large_images_in_tiles_nearly_give_the_whole_images_result(tmp_path: Path) -> None:
    """Check that no seam is visible; other networks see as far as whole images, so their tiles are not exact."""
    losses(tmp_path / "run", config_of("unet", 2))
    image = np.random.default_rng(0).integers(0, 255, (500, 460, 2)).astype(np.uint8)
    np.save(tmp_path / "some.npy", image)
    arguments = [
        "--checkpoint",
        str(tmp_path / "run"),
        "--images",
        str(tmp_path / "some.npy"),
        "--probabilities",
        "true",
    ]
    found = []
    for tile in ("384", "512"):
        predict.main([*arguments, "--out", str(tmp_path / tile), "--tile", tile, "--overlays", "false"])
        found.append(np.load(tmp_path / tile / "probabilities" / "some.npy"))
    assert found[0].shape == (500, 460)
    assert np.abs(found[0] - found[1]).mean() < 0.01


def two_ranks(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    training = TrainingStep(config_of("mask_rcnn"), DATA, torch.device("cpu"), 2)
    training.distribute()
    training.network.train()
    found = []
    for step in range(2):
        # The second rank has no sample that counts in the last step.
        weights = [1.0, 1.0] if rank == 0 or step == 0 else [0.0, 0.0]
        batch = batch_of([10 * step + 2 * rank, 10 * step + 2 * rank + 1], weights, size=32)
        found.append(training(batch).loss)
    torch.save({"losses": found, "state": training.network.state_dict()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_loss_of_the_networks_own_over_two_ranks(tmp_path: Path) -> None:
    """Check that ranks keep equal weights and return their mean loss, even if one has nothing to learn from."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(two_ranks, (port, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["losses"] == other["losses"]
    trained = [name for name, value in one["state"].items() if value.is_floating_point() and "running" not in name]
    assert trained
    assert all(torch.equal(one["state"][name], other["state"][name]) for name in trained)
    assert all(loss.isfinite() for loss in one["losses"])


def test_settings_travel_in_the_checkpoint(tmp_path: Path) -> None:
    losses(tmp_path / "run", config_of("unet3plus", 1))
    state: dict[str, Any] = deepskip.load(tmp_path / "run").state
    assert state["config"]["model"] == asdict(config_of("unet3plus", 1).model)


@pytest.mark.parametrize("name", ["smp:Unet:resnet18", "mask_rcnn", "nnunet"])
def test_served(name: str, tmp_path: Path) -> None:
    losses(tmp_path / "run", config_of(name, 1))
    image = np.random.default_rng(0).normal(size=(40, 56, 2)).astype(np.float32)
    body = io.BytesIO()
    np.save(body, image)
    replica = Model(checkpoint.load_for_inference(tmp_path / "run"), "cpu", 10_000, 1, 0, 1)
    answer = asyncio.run(replica.segment(body.getvalue(), "npy", "mask"))
    assert answer.status == 200, answer.reason
    predictor = deepskip.load(tmp_path / "run")
    sure = np.abs(predictor.predict_proba(image)[..., 0] - 0.5) > 1e-4
    mask = np.asarray(Image.open(io.BytesIO(answer.body)))
    np.testing.assert_array_equal(mask[sure], 255 * predictor.predict(image)[sure])
