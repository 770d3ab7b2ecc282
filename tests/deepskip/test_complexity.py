import itertools

import pytest
from torch import nn

from deepskip import DeepSkipUNet
from deepskip.complexity import conv_weights, convolution_weights


def built(network: nn.Module) -> int:
    return sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("encoder", ["vgg16", "resnet34"])
@pytest.mark.parametrize("levels", [3, 4, 5, 6])
def test_equals_the_built_network(encoder: str, levels: int) -> None:
    for in_channels, num_classes, base_channels in itertools.product((1, 3, 207), (1, 12), (4, 8, 12)):
        network = DeepSkipUNet(in_channels, num_classes, base_channels, levels, encoder)
        expected = conv_weights(in_channels, num_classes, base_channels, levels, encoder)
        assert expected == built(network) == convolution_weights(network)


@pytest.mark.parametrize(("encoder", "expected"), [("vgg16", 644_192), ("resnet34", 1_677_472)])
def test_the_papers_setting(encoder: str, expected: int) -> None:
    assert conv_weights(3, 1, 8, 5, encoder) == expected


def test_all_parameters_of_the_papers_setting() -> None:
    assert sum(p.numel() for p in DeepSkipUNet(3, 1).parameters()) == 645_665


def test_unknown_encoder() -> None:
    with pytest.raises(ValueError, match=r"encoder is 'vgg'.*vgg16, resnet34"):
        conv_weights(3, 1, encoder="vgg")
