"""A step in parts has the gradient of the whole in float64, and on one worker the batch norm of the most workers."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from deepskip import networks
from deepskip.config import Config, check_values, part_size
from deepskip.training_step import TrainingStep
from tests.deepskip.test_trainer import DATA, batch_of, batches, config, on_ranks

WEIGHTS = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
VOTES = torch.zeros(1)


def double(norm: str, micro_batch: int | None) -> TrainingStep:
    settings = config(norm=norm)
    settings.optim.micro_batch, settings.loss.overlap = micro_batch, "iou"
    training = TrainingStep(settings, DATA, torch.device("cpu"))
    training.network.double()
    return training


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = batch_of(list(range(7)), WEIGHTS.tolist())
    return batch["image"].double(), batch["mask"], batch["weight"]


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_with_group_norm_the_gradient_is_that_of_the_whole(size: int) -> None:
    whole, parts = double("group", None), double("group", size)
    expected, found = (training.gradients(*inputs(), VOTES) for training in (whole, parts))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    assert_same_gradients(whole.network, parts.network)


@pytest.mark.parametrize("norm", ["batch", "instance-batch"])
def test_with_batch_norm_each_part_has_its_own_statistics(norm: str) -> None:
    training, apart = double(norm, 3), double(norm, None)
    training.gradients(*inputs(), VOTES)
    # The same by autograd alone, with the graphs of all parts at once.
    slices = list(zip(*(each.split(3) for each in inputs()), strict=True))
    sums, statistics = [], []
    for image, mask, weight in slices:
        statistics.append([buffer.clone() for buffer in apart.network.buffers()])
        sums.append(apart.criterion.sums(apart.network(image), mask, weight))
    apart.criterion.from_sums(torch.stack(sums).sum(0)).loss.backward()
    assert_same_gradients(apart.network, training.network)
    # Running statistics are updated once, by the first part.
    for found, expected in zip(training.network.buffers(), statistics[1], strict=True):
        torch.testing.assert_close(found, expected)


class Dropping(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))


def test_random_numbers_are_the_same_in_both_passes() -> None:
    torch.manual_seed(1)
    with mock.patch.object(networks, "build", side_effect=lambda *_: Dropping()):
        training, apart = double("batch", 2), double("batch", None)
    training.seed()
    training.gradients(*inputs(), VOTES)
    apart.seed()
    slices = zip(*(each.split(2) for each in inputs()), strict=True)
    sums = [apart.criterion.sums(apart.network(image), mask, weight) for image, mask, weight in slices]
    apart.criterion.from_sums(torch.stack(sums).sum(0)).loss.backward()
    assert_same_gradients(apart.network, training.network)


def test_only_one_part_is_kept_for_the_backward_pass() -> None:
    training, kept, most = double("group", 2), [0], [0]
    forward = training.forward

    class Alive:
        def __init__(self, x: torch.Tensor) -> None:
            # With its graph, a result that is kept would hold itself.
            self.x = x.detach()
            kept[0] += 1
            most[0] = max(most[0], kept[0])

        def __del__(self) -> None:
            kept[0] -= 1

    def alone(image: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(Alive, lambda alive: alive.x):
            return forward(image)

    forward(inputs()[0][:2])
    with mock.patch.object(training, "forward", alone):
        alone(inputs()[0][:2])
        one, most[0] = most[0], 0
        assert (kept[0], one > 0) == (0, True)
        training.gradients(*inputs(), VOTES)
    assert (kept[0], most[0]) == (0, one)


def steps_of(settings: Config, rank: int = 0, world_size: int = 1) -> list[float]:
    training = TrainingStep(settings, DATA, torch.device("cpu"), world_size)
    training.distribute()
    found = [training(batch).loss.item() for _, batch in zip(range(4), batches(0, rank, world_size), strict=False)]
    statistics = [x for name, x in training.network.state_dict().items() if "running" in name]
    return found + [float(x.sum()) for x in statistics]


def cases() -> dict[str, Config]:
    found = {"group": config(norm="group"), "batch": config()}
    found["group"].optim.micro_batch = 1
    found["batch"].optim.micro_batch, found["batch"].cluster.workers = "auto", (1, 2)
    return found


def on_a_rank(folder: Path, rank: int, world_size: int) -> Any:
    return {name: steps_of(settings, rank, world_size) for name, settings in cases().items()}


@pytest.mark.slow
def test_one_worker_in_parts_trains_as_two(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, on_a_rank)
    for name, settings in cases().items():
        assert steps_of(settings) == pytest.approx(first[name], rel=1e-4)
        assert second[name][:4] == first[name][:4]
    # Without parts, batch norm has other statistics on one worker.
    assert steps_of(config()) != pytest.approx(first["batch"], rel=1e-3)


def test_settings() -> None:
    settings = Config()
    settings.optim.micro_batch, settings.model.norm, settings.optim.global_batch_size = "auto", "sync-batch", 10
    with pytest.raises(ValueError, match=r"so set cluster.workers: \[fewest, most\]\n.*normalised together"):
        check_values(settings)
    settings.cluster.workers, settings.model.norm = (1, 4), "batch"
    check_values(settings)
    settings.run.compile = "max-autotune"
    with pytest.raises(ValueError, match="whose CUDA graphs overwrite the gradients of an earlier part"):
        check_values(settings)
    settings.run.compile = "none"
    assert part_size(settings) == 3
    settings.optim.micro_batch = 0
    with pytest.raises(ValueError, match=r"optim\.micro_batch is 0; it must be 1 or more"):
        check_values(settings)
