"""A training starts from the weights of another model, apart from layers of other bands or classes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepskip import weight_files
from deepskip.config import Config, LossConfig, ModelConfig, OptimConfig
from deepskip.initial_weights import OtherNetwork, differences
from deepskip.training_step import DataInfo, TrainingStep

COINS = weight_files.installed()["coins"]


def started(
    in_channels: int, num_classes: int, weights: str = "coins", **model: object
) -> tuple[TrainingStep, list[str]]:
    config = Config(model=ModelConfig(**model), optim=OptimConfig(steps=1), loss=LossConfig())  # type: ignore[arg-type]
    data = DataInfo(in_channels, num_classes, 255, [0.0] * in_channels, [1.0] * in_channels, {})
    training = TrainingStep(config, data, torch.device("cpu"))
    return training, training.start_from(weights)


def test_weights_and_moving_averages_are_those_of_the_file() -> None:
    stored = load_file(COINS)
    training, left = started(3, 1)
    assert left == []
    for network in (training.network, training.averaged):
        found = network.state_dict()
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_layers_of_other_bands_and_classes_stay_random() -> None:
    stored = load_file(COINS)
    training, left = started(7, 4)
    found = training.network.state_dict()
    # The first convolution, and the last one with its bias.
    assert sorted(list(found[name].shape) for name in left) == sorted([[8, 7, 3, 3], [4, 8, 1, 1], [4]])
    assert all(torch.equal(found[name], stored[name]) for name in stored if name not in left)
    assert all(torch.equal(training.averaged.state_dict()[name], found[name]) for name in found)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"base_channels": 4}, "is 8 x 16 x 3 x 3 there and 4 x 8 x 3 x 3 here"),
        ({"levels": 4}, "there and missing here"),
    ],
)
def test_another_network_is_refused(model: dict[str, object], words: str) -> None:
    with pytest.raises(OtherNetwork, match=rf"coins is the model of another network: .*{words}.*levels 5"):
        started(3, 1, **model)


def test_a_model_that_was_trained_otherwise_is_told() -> None:
    config = Config()
    assert differences("coins", config, None, []) == []
    config.model.enlarge, config.data.normalize = 2, "none"
    assert differences("coins", config, [0, 4, 2], []) == [
        f"coins was trained with {name}: its weights may not fit"
        for name in (
            "model.enlarge 1, this is with 2",
            "data.normalize image, this is with none",
            "data.bands None, this is with [0, 4, 2]",
        )
    ]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"none\.safetensors does not exist"):
        started(3, 1, str(tmp_path / "none.safetensors"))
