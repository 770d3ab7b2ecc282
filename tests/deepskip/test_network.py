import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip import DeepSkipUNet


@pytest.mark.parametrize(("bands", "height", "width"), [(1, 16, 16), (3, 33, 50), (207, 80, 81), (512, 1, 7)])
def test_any_bands_and_size(bands: int, height: int, width: int) -> None:
    network = DeepSkipUNet(bands, 4).eval()
    with torch.inference_mode():
        assert network(torch.randn(1, bands, height, width)).shape == (1, 4, height, width)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_decoder_is_equation_1(mode: str) -> None:
    """Compute the whole decoder from its weights, in float64, by nested loops over eq. 1."""
    torch.manual_seed(0)
    B = 4
    network = DeepSkipUNet(2, 1, base_channels=4, levels=B, upsample=mode).double().eval()
    maps: list[Tensor] = []
    for level in network.encoder:
        level.register_forward_hook(lambda module, inputs, output: maps.append(output))
    x = torch.randn(2, 2, 32, 48, dtype=torch.float64)
    with torch.inference_mode():
        expected = network(x)
        weights = network.state_dict()
        E = dict(enumerate(maps, 1))

        def up(y: Tensor, size: torch.Size) -> Tensor:
            align = False if mode == "bilinear" else None
            return F.interpolate(y, size=size, mode=mode, align_corners=align)

        def cbr(y: Tensor, name: str) -> Tensor:
            y = F.conv2d(y, weights[f"{name}.0.weight"], padding=1)
            mean, var = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
            return F.batch_norm(y, mean, var, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"]).relu()

        D = {B: E[B]}
        for u in range(B - 1, 0, -1):
            size = E[u].shape[-2:]
            inputs = [E[u]] + [up(E[j], size) for j in range(u + 1, B)] + [up(D[u + 1], size)]
            branches = [
                F.conv2d(y, weights[f"decoder.{u - 1}.branches.{i}.weight"], padding=1) for i, y in enumerate(inputs)
            ]
            assert len(branches) == B - u + 1
            merged = cbr(torch.cat(branches, 1), f"decoder.{u - 1}.merge.0")
            D[u] = cbr(merged, f"decoder.{u - 1}.merge.1")
        logits = F.conv2d(D[1], weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(expected, logits, rtol=1e-12, atol=1e-12)


def test_padding_repeats_the_edge() -> None:
    network = DeepSkipUNet(1, 1, levels=3).eval()
    x = torch.randn(1, 1, 13, 18)
    with torch.inference_mode():
        padded = network(F.pad(x, (0, 2, 0, 3), mode="replicate"))
        torch.testing.assert_close(network(x), padded[..., :13, :18])


def enlarging(side: int, times: int) -> np.ndarray:
    """Return the matrix (times * side, side) that enlarges a row bilinearly, from the distances of pixel centres."""
    matrix = np.zeros((times * side, side))
    for i in range(times * side):
        centre = min(max((i + 0.5) / times - 0.5, 0), side - 1)
        for j in range(side):
            matrix[i, j] = max(0, 1 - abs(centre - j))
    return matrix


@pytest.mark.parametrize("times", [2, 3])
def test_enlarge_is_a_larger_image_and_the_mean_of_its_logits(times: int) -> None:
    network = DeepSkipUNet(2, 3, base_channels=2, levels=3, enlarge=times).double().eval()
    plain = DeepSkipUNet(2, 3, base_channels=2, levels=3).double().eval()
    network.head.weight.data.normal_()
    plain.load_state_dict(network.state_dict())
    H, W = 11, 9
    x = torch.randn(2, 2, H, W, dtype=torch.float64)
    rows, columns = enlarging(H, times), enlarging(W, times)
    larger = np.einsum("ah,nchw,bw->ncab", rows, x.numpy(), columns)
    with torch.inference_mode():
        logits = plain(torch.from_numpy(larger)).reshape(2, 3, H, times, W, times).mean((3, 5))
        torch.testing.assert_close(network(x), logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("enlarge", [1, 2])
def test_exported_program_takes_any_size(enlarge: int) -> None:
    network = DeepSkipUNet(3, 2, base_channels=4, levels=3, enlarge=enlarge).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        network, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    ).module()
    for shape in ((1, 3, 32, 32), (3, 3, 45, 70), (2, 3, 64, 33)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program(x), network(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0, "num_classes": 1}, "in_channels is 0"),
        ({"in_channels": 3, "num_classes": 1, "levels": 7}, "levels is 7; it must be 3 to 6"),
        ({"in_channels": 3, "num_classes": 1, "encoder": "vgg"}, "encoder is 'vgg'"),
        ({"in_channels": 3, "num_classes": 1, "upsample": "cubic"}, "upsample is 'cubic'"),
        ({"in_channels": 3, "num_classes": 1, "norm": "layer"}, "norm is 'layer'"),
        ({"in_channels": 3, "num_classes": 1, "enlarge": 5}, "enlarge is 5; it must be 1 to 4"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepSkipUNet(**arguments)
