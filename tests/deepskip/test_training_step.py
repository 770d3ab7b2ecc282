"""A single training step: how it handles a batch, and how many operators it starts."""

import math
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

from deepskip import augment, kernels
from deepskip.bench import step_launches
from deepskip.config import AugmentConfig, Config
from deepskip.notices import warn_at_start, warn_of_validation
from deepskip.ranks import StopVote
from deepskip.training_step import DataInfo, TrainingStep, has_own_statistics, overlap_counts
from tests.deepskip.test_trainer import on_ranks

DATA = DataInfo(2, 1, 255, [0.0, 0.0], [1.0, 1.0], {})


def batch_of(labels: torch.dtype, H: int = 12) -> dict:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 2, (3, H, H), generator=generator)
    mask[:, :2] = 255
    return {
        "image": torch.randint(0, 255, (3, 2, H, H), dtype=torch.uint8, generator=generator),
        "mask": mask.to(labels), "mean": torch.full((3, 2), 100.0), "std": torch.full((3, 2), 50.0),
        "weight": torch.tensor([1.0, 1.0, 0.0]), "epoch": [0, 0, 1], "sample": [4, 5, 6],
    }  # fmt: skip


def small(augment: AugmentConfig | None = None) -> TrainingStep:
    config = Config()
    config.model.base_channels, config.model.levels = 4, 3
    config.augment = augment or AugmentConfig()
    return TrainingStep(config, DATA, torch.device("cpu"))


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(rotate=20, scale=0.2)])
def test_labels_stay_bytes_up_to_the_loss_and_change_nothing(augment: AugmentConfig) -> None:
    # Label 255, shifted by one, would be 0 in a byte.
    masks, results = [], []
    for labels in (torch.uint8, torch.int64):
        training, batch = small(augment), batch_of(labels)
        _, mask = training.prepare(batch)
        assert mask.dtype == labels
        assert (mask == 255).any()
        masks.append(mask.long())
        results.append([training(batch) for _ in range(2)])
    assert torch.equal(*masks)
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("V", [1, 3])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int64])
def test_overlap_by_hand(V: int, labels: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(3, V, 5, 7, generator=generator)
    mask = torch.randint(0, max(2, V), (3, 5, 7), generator=generator).to(labels)
    mask[:, 1] = 255
    weight = torch.tensor([1.0, 0.0, 0.5])
    expected = [0, 0, 0]
    for n in (0, 2):
        for y in range(5):
            for x in range(7):
                true = int(mask[n, y, x])
                guess = int(logits[n, 0, y, x] > 0) if V == 1 else int(logits[n, :, y, x].argmax())
                if true != 255:
                    expected[0] += guess == true != 0
                    expected[1] += guess not in (true, 0)
                    expected[2] += true not in (guess, 0)
    assert overlap_counts(logits, mask, weight, 255).tolist() == expected


def test_draws_that_came_with_the_batch_are_used_and_are_the_same() -> None:
    settings = AugmentConfig(rotate=20, brightness=0.1)
    training, batch = small(settings), batch_of(torch.uint8)
    own = training.prepare(batch)
    entries = augment.loader_entries(settings, training.config.run.seed, 2, batch["epoch"], batch["sample"])
    with mock.patch.object(augment, "draw", side_effect=AssertionError):
        come = training.prepare(batch | entries)
    assert all(torch.equal(one, other) for one, other in zip(own, come, strict=True))


def test_the_moving_average_takes_counters_as_they_are() -> None:
    training, batch = small(), batch_of(torch.uint8)
    for _ in range(3):
        training(batch)
    counters = {name: x for name, x in training.averaged.named_buffers() if not x.is_floating_point()}
    assert counters
    assert all(int(x) == 3 for x in counters.values())


def test_a_step_starts_no_more_operators_than_it_did() -> None:
    found = {name: step_launches.count(config) for name, config in step_launches.configs().items()}
    # Counted on torch 2.11. Before, there were 78 for the average with two waits, 107 for the augmentation and 276 for
    # Muon.
    most = {"normalise and augment": 20, "clip": 8, "moving average": 3, "optimizer": 230}
    for phase, limit in most.items():
        assert sum(found["default"][phase].operators.values()) <= limit, found["default"][phase]
    for mine in found.values():
        for phase in ("normalise and augment", "clip", "moving average"):
            assert mine[phase].waits == 0, phase
    assert found["default"]["optimizer"].waits == 0


COLLECTIVES = ("allreduce_", "broadcast_", "allgather_")


def counted_steps(folder: Path, rank: int, world_size: int) -> dict[str, Counter[str]]:
    # The forms for CPUs read numbers, which are on the host there.
    kernels.backend.choose("reference")
    found = {}
    for norm in ("batch", "sync-batch"):
        config = Config()
        config.model.norm = norm
        training = TrainingStep(config, DataInfo(3, 1, 255, [0.0] * 3, [1.0] * 3, {}), torch.device("cpu"), world_size)
        training.distribute()
        vote = StopVote(lambda: False, world_size)
        for step in range(4):
            with step_launches.Operators() as operators:
                training(step_launches.make_batch(config, step), vote.asked)
            with step_launches.Operators() as voting:
                vote(training.votes)
        names = (*COLLECTIVES, *step_launches.WAITS)
        found[norm] = Counter({name: operators.seen[name] for name in names if operators.seen[name]})
        # An outcome that has arrived is read, and nothing else is done.
        assert voting.seen == {"_local_scalar_dense": 1}
    return found


@pytest.mark.slow
def test_the_collectives_and_waits_of_a_step(tmp_path: Path) -> None:
    # Before, there were six: two broadcasts of buffers, the sums of the loss, two buckets and the vote.
    for found in on_ranks(2, tmp_path, counted_steps):
        assert found["batch"] == {"allreduce_": 3}
        # Each of the 18 norms has one collective forward and one backward.
        assert found["sync-batch"] == {"allreduce_": 3 + 18, "allgather_": 18}


def test_only_statistics_of_norms_stay_with_their_rank() -> None:
    assert has_own_statistics(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1)))
    assert not has_own_statistics(torch.nn.utils.spectral_norm(torch.nn.Conv2d(1, 1, 1)))


@pytest.mark.parametrize(("samples", "follow", "said"), [(7, False, 1), (8, False, 0), (7, True, 0)])
def test_a_batch_of_more_samples_than_there_are_is_warned_of(samples: int, follow: bool, said: int) -> None:
    config, told = Config(), list[str]()
    config.data.follow = follow
    data = DataInfo(3, 1, 255, [0.0] * 3, [1.0] * 3, {}, {"train": {"samples": samples}})
    warn_at_start(TrainingStep(config, data, torch.device("cpu")), False, told.append)
    expected = "optim.global_batch_size is 8, but there are 7 training samples: a step repeats some of them"
    assert told == [expected] * said


def test_settings_and_data_that_change_nothing_are_warned_of() -> None:
    config, told = Config(), list[str]()
    config.model.network, config.loss.alpha = "mask_rcnn", 0.9
    config.optim.optimizer = "adamw"
    data = DataInfo(3, 1, 255, [0.0] * 3, [1.0] * 3, {})
    warn_at_start(TrainingStep(config, data, torch.device("cpu")), False, told.append)
    assert told == ["model.network is mask_rcnn, which has its own loss: the settings of loss change nothing"]
    warn_of_validation({"iou": 0.0}, told.append)
    assert len(told) == 1
    warn_of_validation({"iou": math.nan}, told.append)
    assert "no pixel of the validation split is foreground, or all are ignored" in told[1]
