"""The training loop runs on batches made here, without shards or Ray."""

import contextlib
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from deepskip import checkpoint, ranks
from deepskip.config import Config, OptimConfig
from deepskip.data_shards.order import rank_block
from deepskip.evaluation import evaluate
from deepskip.trainer import Batch, DataInfo, NonFiniteLoss, Preempted, Record, learning_rate, train
from deepskip.training_step import OtherSettings, TrainingStep

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
    # There are 4 samples on 3 ranks, two each. The last two have weight 0.
    share = math.ceil(4 / world_size)
    while True:
        places = range(rank * share, (rank + 1) * share)
        yield batch_of([100 * step + p % 4 for p in places], [float(p < 4) for p in places])
        step += 1


def images(rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    for number in rank_block(5, rank, world_size):
        yield batch_of([10_000 + number], [1.0], size=24)


def losses(
    run: Path | str,
    settings: Config,
    stop_at: int | None = None,
    stop_requested: Callable[[], bool] | None = None,
    validations: dict[int, float] | None = None,
    **distributed: int,
) -> tuple[dict[int, float], dict[str, Any]]:
    seen: dict[int, float] = {}

    def observe(kind: str, step: int, values: dict[str, Any]) -> None:
        assert distributed.get("rank", 0) == 0
        if kind == "train":
            seen[step] = values["loss"]
        elif kind == "validation" and validations is not None:
            validations[step] = values["loss"]

    def share(step: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(step, **distributed), step):
            # The training is killed before it begins the next step.
            if number == stop_at:
                raise KeyboardInterrupt
            yield batch

    summary: dict[str, Any] = {}
    with contextlib.suppress(KeyboardInterrupt, Preempted):
        summary = train(
            settings, DATA, run=run, train_batches=share, validation_images=lambda: images(**distributed),
            observe=observe, stop_requested=stop_requested, **distributed,
        )  # fmt: skip
    return seen, summary


def assert_same_state(one: Path, other: Path) -> None:
    states = [checkpoint.newest(run)[0] for run in (one, other)]
    assert states[0] is not None
    assert states[1] is not None
    left, right = (flat(state) for state in states)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[name]), name
        elif name != "/seconds":
            # Here, nan equals nan.
            assert value == right[name] or (value != value and right[name] != right[name]), name


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {key: item for part in value for key, item in flat(value[part], f"{name}/{part}").items()}


@pytest.mark.parametrize("norm", ["batch", "instance-batch"])
def test_a_compiled_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    compile_it, modes = torch.compile, []

    def traced(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        modes.append(mode)
        # Inductor needs a C++ compiler, which not all machines have.
        return compile_it(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    plain, _ = losses(tmp_path / "plain", config(norm=norm))
    settings = config(norm=norm)
    settings.run.compile = "max-autotune"
    compiled, _ = losses(tmp_path / "compiled", settings)
    assert modes == ["max-autotune"]
    assert compiled == pytest.approx(plain, rel=1e-4)
    states = [checkpoint.newest(tmp_path / name)[0] for name in ("plain", "compiled")]
    assert states[0] is not None
    assert states[1] is not None
    assert list(states[0]["model"]) == list(states[1]["model"])


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
    # Without an end, the rate after the warm-up stays.
    optim = OptimConfig(steps=None, warmup_steps=10, learning_rate=0.3, schedule="constant")
    expected[10:] = [0.3] * 40
    np.testing.assert_allclose([learning_rate(optim, step) for step in range(50)], expected, rtol=1e-6)


def test_the_step_schedule_is_torchs_multi_step() -> None:
    optim = OptimConfig(steps=40, warmup_steps=0, learning_rate=5e-4, schedule="step")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 30], 0.1)
    expected = []
    for _ in range(40):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose([learning_rate(optim, step) for step in range(40)], expected, rtol=1e-12)


def test_the_average_is_that_of_tensorflows_decay_by_steps_in_float64() -> None:
    """Compare with TensorFlow's ExponentialMovingAverage(decay, num_updates), of weights and of buffers."""
    settings = config(steps=40)
    settings.optim.ema_decay = 0.7
    training, stream = TrainingStep(settings, DATA, torch.device("cpu")), batches(0)
    expected: dict[str, np.ndarray] = {}
    decays = []
    for num_updates in range(30):
        training(next(stream))
        # The first average is the weights of the first step.
        decays.append(min(0.7, (1 + num_updates) / (10 + num_updates)) if expected else 0.0)
        for name, value in training.network.state_dict().items():
            new = value.double().numpy()
            expected[name] = expected[name] * decays[-1] + new * (1 - decays[-1]) if name in expected else new.copy()
    assert [round(decays[t], 4) for t in (1, 2, 9, 19, 20, 29)] == [0.1818, 0.25, 0.5263, 0.6897, 0.7, 0.7]
    found = training.averaged.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if found[name].is_floating_point():
            np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-4, atol=1e-6, err_msg=name)
    first = next(iter(expected))
    assert not np.allclose(found[first].numpy(), training.network.state_dict()[first].numpy(), rtol=1e-3)


def test_a_short_trial_validates_what_it_trained(tmp_path: Path) -> None:
    settings = config(steps=40)
    settings.optim.ema_decay, settings.run.validate_every = OptimConfig.ema_decay, 40
    seen, averaged = losses(tmp_path / "averaged", settings)
    settings.optim.ema_decay = 0.0
    seen_without, last = losses(tmp_path / "last", settings)
    # The average changes what is validated, not what is trained.
    assert seen == seen_without
    # With a decay of 0.98 from the first step, the average's IoU would be 0.
    assert last["val"]["iou"] == pytest.approx(0.16, abs=0.03)
    assert averaged["val"]["iou"] == pytest.approx(last["val"]["iou"], abs=0.03)


@pytest.mark.parametrize(
    ("optimizer", "ema_decay", "norm"),
    [("muon", 0.3, "instance-batch"), ("muon", 0.3, "batch"), ("adamw", 0.0, "batch")],
)
def test_killed_twice_it_goes_on_bit_for_bit(tmp_path: Path, optimizer: Any, ema_decay: float, norm: str) -> None:
    settings = config(steps=8, norm=norm)
    settings.optim.optimizer, settings.optim.ema_decay = optimizer, ema_decay
    settings.run.checkpoint_every, settings.run.patience = 2, 5
    unbroken, summary = losses(tmp_path / "unbroken", settings)
    parts = [losses(tmp_path / "broken", settings, stop_at=stop_at) for stop_at in (3, 7, None)]
    # A step after the last checkpoint is done again.
    assert [list(seen) for seen, _ in parts] == [[1, 2, 3], [3, 4, 5, 6, 7], [7, 8]]
    for seen, _ in parts:
        assert seen == {step: unbroken[step] for step in seen}
    assert parts[2][1]["val"] == pytest.approx(summary["val"], rel=0, abs=0, nan_ok=True)
    assert_same_state(tmp_path / "unbroken", tmp_path / "broken")


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings = config(steps=2)
    losses(tmp_path, settings)
    settings.optim.steps, settings.run.log_every, settings.optim.micro_batch = 3, 2, 1
    losses(tmp_path, settings)
    settings.run.seed, settings.loss.beta, settings.model.base_channels = 9, 2.0, 8
    with pytest.raises(
        OtherSettings, match=r"step 3 is .* other settings \(model\.base_channels, loss\.beta, run\.seed\)"
    ):
        losses(tmp_path, settings)


def test_out_of_patience(tmp_path: Path) -> None:
    settings = config(steps=20)
    # Constant weights give a constant IoU.
    settings.optim.learning_rate, settings.optim.ema_decay, settings.model.norm = 0.0, 0.0, "group"
    settings.run.patience, settings.run.validate_every, settings.run.checkpoint_every = 3, 2, 100
    _, summary = losses(tmp_path / "unbroken", settings)
    assert (summary["stopped_early"], summary["steps"], summary["val"]["step"]) == (True, 8, 2)
    state, _ = checkpoint.newest(tmp_path / "unbroken")
    assert state is not None
    assert (state["step"], state["stale"]) == (8, 3)
    # The count of validations without gain is kept, and a finished training stays finished.
    settings.run.checkpoint_every = 1
    losses(tmp_path / "broken", settings, stop_at=5)
    seen, resumed = losses(tmp_path / "broken", settings)
    assert (list(seen), resumed["steps"], resumed["stopped_early"]) == ([6, 7, 8], 8, True)
    seen, again = losses(tmp_path / "broken", settings)
    assert (seen, again["val"]["step"], again["steps"], again["stopped_early"]) == ({}, 2, 8, True)
    settings.run.patience = 0
    assert losses(tmp_path / "broken", settings)[1]["stopped_early"] is False


def test_where_there_is_nothing_to_find_the_best_validation_found_nothing() -> None:
    record = Record()
    # nan is 0 / 0, so the split has no true pixel, and none is predicted. 0 is a false alarm.
    seen = [record.take({"iou": iou}, step) for step, iou in enumerate((0.0, math.nan, 0.0, math.nan))]
    assert (seen, record.best, record.validations_since_best) == (
        [True, True, False, False],
        {"iou": ANY, "step": 1},
        2,
    )
    # Of as good ones the one of the lower loss.
    record = Record()
    seen = [record.take({"iou": math.nan, "loss": loss}, step) for step, loss in enumerate((0.5, 0.4, 0.4, 0.9, 0.1))]
    assert seen == [True, True, False, False, True]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_best_checkpoint_that_is_lost_is_replaced(tmp_path: Path, damage: str) -> None:
    settings = config(steps=4)
    settings.run.validate_every = settings.run.checkpoint_every = 2
    # Weights that do not change would never be better.
    settings.optim.learning_rate = 0.0
    losses(tmp_path / "run", settings)
    path, told = tmp_path / "run" / checkpoint.FOLDER / checkpoint.BEST, []
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    settings.optim.steps = 6
    train(
        settings, DATA, run=tmp_path / "run", train_batches=batches, validation_images=images,
        observe=lambda kind, step, values: told.append(values["text"]) if kind == "warning" else None,
    )  # fmt: skip
    assert checkpoint.read_model(path)["step"] == 6
    assert any("the best checkpoint is lost" in text for text in told)


def test_stopped_on_request_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = config()
    settings.run.checkpoint_every = 100
    unbroken, _ = losses(tmp_path / "unbroken", settings)
    asked = iter([False, False, False, True])
    with pytest.raises(Preempted, match="after step 4") as stopped:
        train(
            settings, DATA, run=tmp_path / "broken", train_batches=batches, validation_images=images,
            stop_requested=lambda: next(asked),
        )  # fmt: skip
    assert stopped.value.step == 4
    state, _ = checkpoint.newest(tmp_path / "broken")
    assert state is not None
    assert state["step"] == 4
    # A request at the last step changes nothing, and the training ends as usual.
    asked = iter([False, True])
    seen, summary = losses(tmp_path / "broken", settings, stop_requested=lambda: next(asked))
    assert seen == {step: unbroken[step] for step in (5, 6)}
    assert summary["steps"] == 6
    assert_same_state(tmp_path / "unbroken", tmp_path / "broken")


def test_a_full_disk_ends_the_training_with_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config()
    saved = checkpoint.save

    def full_from_3(state: checkpoint.State, location: Path) -> None:
        if state["step"] >= 3:
            raise OSError(28, "No space left on device")
        saved(state, location)

    monkeypatch.setattr(checkpoint, "save", full_from_3)
    with pytest.raises(checkpoint.CheckpointNotWritten, match=r"step-00000002\.pt, which is complete"):
        losses(tmp_path, settings)
    monkeypatch.undo()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    seen, _ = losses(tmp_path, settings)
    assert list(seen) == [3, 4, 5, 6]


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


def test_weights_that_break_after_a_finite_loss_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    settings.run.checkpoint_every, settings.run.log_every, settings.run.validate_every = 2, 2, 2
    clip, calls = nn.utils.clip_grad_norm_, []

    def overflow_in_step_4(parameters: Any, norm: float) -> None:
        parameters = list(parameters)
        clip(parameters, norm)
        calls.append(None)
        if len(calls) == 4:
            parameters[0].grad[0] = torch.inf

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", overflow_in_step_4)
    with pytest.raises(
        NonFiniteLoss, match=r"step 4, of loss \d.*, made the weights nan.*; its samples: key300, key301"
    ):
        train(settings, DATA, run=tmp_path, train_batches=batches, validation_images=images)
    folder = tmp_path / checkpoint.FOLDER
    assert {path.name for path in folder.iterdir()} <= {"step-00000002.pt", checkpoint.BEST}
    for path in folder.iterdir():
        state = checkpoint.read(path)
        for part in ("model", "ema"):
            assert all(torch.isfinite(tensor).all() for tensor in state[part].values())


def one_rank(rank: int, world_size: int, port: int, folder: str, work: Callable[[Path, int, int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    result = work(Path(folder), rank, world_size)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads sometimes abort an interpreter that shuts down. By now, all is done.
    os._exit(0)


def on_ranks(world_size: int, folder: Path, work: Callable[[Path, int, int], Any]) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (world_size, port, str(folder), work), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def two_more_steps(folder: Path, rank: int, world_size: int) -> Any:
    more = losses(folder, config(norm="group"), stop_at=2 * world_size, rank=rank, world_size=world_size)
    return *more, evaluated(rank, world_size)


def evaluated(rank: int = 0, world_size: int = 1) -> tuple[dict[str, float], list[str]]:
    """Return the metrics of a network of random weights, and the keys of its panel."""
    training = TrainingStep(config(norm="group"), DATA, torch.device("cpu"))
    metrics, panel = evaluate(
        training.network, training.criterion, 1, 255, images(rank, world_size), torch.device("cpu"), panels=3
    )
    return metrics, [one["key"] for one in panel]


@pytest.mark.slow
def test_the_same_training_on_one_then_two_then_three_workers(tmp_path: Path, one_thread: None) -> None:
    metrics, shown = evaluated()
    assert (metrics["images"], shown) == (5, ["key10000", "key10001", "key10002"])
    alone, summary = losses(tmp_path / "alone", config(norm="group"))
    seen, _ = losses(tmp_path / "run", config(norm="group"), stop_at=2)
    for world_size in (2, 3):
        (more, last, (of_ranks, panel)), *others = on_ranks(world_size, tmp_path / "run", two_more_steps)
        # The same weights have the same metrics, bit for bit, and the same images are shown.
        assert of_ranks == pytest.approx(metrics, rel=0, abs=0, nan_ok=True)
        assert panel == shown
        assert (list(more), [losses for losses, *_ in others]) == (
            [2 * world_size - 1, 2 * world_size],
            [{}] * len(others),
        )
        seen |= more
    assert list(seen) == list(alone)
    np.testing.assert_allclose(list(seen.values()), list(alone.values()), rtol=1e-4)
    assert last["val"] == pytest.approx(summary["val"], rel=1e-3, nan_ok=True)
    # The count is over the images of all ranks.
    assert last["val"]["images"] == 5
    assert last["val"]["iou_best_threshold"] > last["val"]["iou"]


def preempted_by_a_signal(folder: Path, rank: int, world_size: int) -> Any:
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())

    def send() -> bool:
        # The signal goes to one of the two ranks, in its third step.
        calls.append(None)
        if len(calls) == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked.is_set()

    calls: list[None] = []
    settings = config(steps=8)
    settings.run.validate_every, settings.run.checkpoint_every, settings.optim.ema_decay = 2, 100, 0.9
    # Without effect, it is warned of.
    settings.data.poll_seconds = 9.0
    measured: tuple[dict[int, float], dict[int, float]] = ({}, {})

    def part(name: str, validations: dict[int, float], stop: Callable[[], bool] | None = None) -> Any:
        return losses(
            folder / name, settings, stop_requested=stop, validations=validations, rank=rank, world_size=world_size
        )

    unbroken, first = part("unbroken", measured[0]), part("broken", measured[1], send)
    state, _ = checkpoint.newest(folder / "broken")
    assert state is not None
    return unbroken, first, state["step"], part("broken", measured[1]), measured


@pytest.mark.slow
def test_sigterm_to_one_of_two_workers(tmp_path: Path) -> None:
    # With batch norm, the ranks' running statistics differ. Validation must not depend on whose are used.
    results = on_ranks(2, tmp_path, preempted_by_a_signal)
    for _, first, step, _, _ in results:
        assert (step, first[1]) == (3 + ranks.VOTE_STEPS, {})
    unbroken, first, _, second, (expected, found) = results[0]
    assert (list(first[0]), list(second[0])) == ([1, 2, 3, 4, 5], [6, 7, 8])
    assert first[0] | second[0] == unbroken[0]
    assert list(found) == [2, 4, 6, 8]
    assert found == expected
    assert_same_state(tmp_path / "unbroken", tmp_path / "broken")
