"""The training loop on batches made here: no shards, no Ray."""

import contextlib
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deepskip import checkpoint
from deepskip.config import Config, OptimConfig
from deepskip.trainer import Batch, DataInfo, NonFiniteLoss, learning_rate, train

DATA = DataInfo(2, 1, 255, [0.0, 0.0], [1.0, 1.0], {"bands": None, "longest_side": None})


def config(steps: int = 6, norm: str = "batch") -> Config:
    settings = Config()
    settings.model.base_channels, settings.model.levels, settings.model.norm = 4, 3, norm
    settings.optim = OptimConfig(steps=steps, global_batch_size=4, learning_rate=0.01, warmup_steps=2, ema_decay=0.3)
    settings.run.log_every = settings.run.checkpoint_every = 1
    settings.run.validate_every, settings.run.panels = 3, 1
    return settings


def batch_of(numbers: list[int], weights: list[float], size: int = 16) -> Batch:
    images, masks = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        image = torch.randn(2, size, size, generator=generator)
        images.append(image)
        masks.append((image[0] > 0.3).long())
    N = len(numbers)
    return {
        "image": torch.stack(images), "mask": torch.stack(masks), "mean": torch.zeros(N, 2), "std": torch.ones(N, 2),
        "weight": torch.tensor(weights), "epoch": [0] * N, "sample": numbers, "key": [f"key{n}" for n in numbers],
    }  # fmt: skip


def batches(step: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    # 4 samples over 3 ranks: two each, the last two of weight 0
    share = math.ceil(4 / world_size)
    while True:
        places = range(rank * share, (rank + 1) * share)
        yield batch_of([100 * step + p % 4 for p in places], [float(p < 4) for p in places])
        step += 1


def images(rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    for number in range(rank, 5, world_size):
        yield batch_of([10_000 + number], [1.0], size=24)


def losses(
    run: Path, settings: Config, stop_at: int | None = None, **distributed: int
) -> tuple[dict[int, float], dict[str, Any]]:
    seen: dict[int, float] = {}

    def observe(kind: str, step: int, values: dict[str, Any]) -> None:
        if kind == "train":
            seen[step] = values["loss"]
            if step == stop_at:
                raise KeyboardInterrupt

    summary: dict[str, Any] = {}
    with contextlib.suppress(KeyboardInterrupt):
        summary = train(
            settings, DATA, run=run, train_batches=lambda step: batches(step, **distributed),
            validation_images=lambda: images(**distributed), observe=observe, **distributed,
        )  # fmt: skip
    return seen, summary


def test_learning_rate_is_torchs_warm_up_and_cosine() -> None:
    optim = OptimConfig(steps=50, warmup_steps=10, learning_rate=0.3, final_learning_rate=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 10, 1.0, total_iters=9),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.03),
    ]
    expected = []
    for step in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 9:
            schedulers[0].step()
        elif step == 9:
            optimizer.param_groups[0]["lr"] = 0.3
        else:
            schedulers[1].step()
    np.testing.assert_allclose([learning_rate(optim, step) for step in range(50)], expected, rtol=1e-6)


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    unbroken, summary = losses(tmp_path / "unbroken", config())
    first, _ = losses(tmp_path / "broken", config(), stop_at=5)
    second, resumed = losses(tmp_path / "broken", config())
    # the observer stopped it before checkpoint 5 was written
    assert (list(first), list(second)) == ([1, 2, 3, 4, 5], [5, 6])
    assert first | second == unbroken
    assert resumed["val"] == pytest.approx(summary["val"], rel=0, abs=0, nan_ok=True)
    one, other = (checkpoint.newest(tmp_path / name)[0] for name in ("unbroken", "broken"))
    assert one is not None
    assert other is not None
    for part in ("model", "ema"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), (part, name)


def test_summary_and_best_checkpoint(tmp_path: Path) -> None:
    _, summary = losses(tmp_path, config(steps=48))
    assert summary["steps"] == 48
    assert summary["parameters"] > summary["conv_weights"] > 0
    best = checkpoint.load_for_inference(tmp_path)
    assert best["best"] == pytest.approx(summary["val"], rel=0, abs=0, nan_ok=True)
    assert summary["val"]["iou"] > 0.1
    assert best["step"] == summary["val"]["step"]
    assert best["optimizer"] is None


def test_non_finite_loss_names_step_and_samples(tmp_path: Path) -> None:
    def poisoned(step: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(step), step):
            if number == 3:
                batch["image"][1] = torch.nan
            yield batch

    settings = config()
    settings.run.checkpoint_every = settings.run.log_every = 2
    with pytest.raises(NonFiniteLoss, match=r"loss of step 4 is nan.*key300, key301, key302, key303"):
        train(settings, DATA, run=tmp_path, train_batches=poisoned, validation_images=images)
    state, _ = checkpoint.newest(tmp_path)
    assert state is not None
    assert state["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def one_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    seen, summary = losses(Path(folder), config(norm="group"), rank=rank, world_size=world_size)
    if rank == 0:
        torch.save((seen, summary["val"]), Path(folder) / "result.pt")
    dist.destroy_process_group()
    # gloo's threads now and then abort an interpreter that shuts down, when all is done
    os._exit(0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_training_on_several_workers(world_size: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (world_size, port, str(tmp_path)), nprocs=world_size)
    seen, validation = torch.load(tmp_path / "result.pt")
    alone, summary = losses(tmp_path / "alone", config(norm="group"))
    assert list(seen) == list(alone)
    np.testing.assert_allclose(list(seen.values()), list(alone.values()), rtol=1e-4)
    assert validation == pytest.approx(summary["val"], rel=1e-3, nan_ok=True)
