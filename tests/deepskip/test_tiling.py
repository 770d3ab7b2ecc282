"""Tiles equal the whole image, and the overlap covers what gradients show of the network's receptive field."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deepskip
from deepskip import inference
from deepskip.flips import Flipped
from deepskip.tiling import Overlap, enlarged_rows, logits_in_tiles, overlap_of, receptive_radius, spans

pytestmark = pytest.mark.usefixtures("one_thread")


def network_of(bands: int, num_classes: int, **settings: Any) -> deepskip.DeepSkipUNet:
    torch.manual_seed(0)
    network = deepskip.DeepSkipUNet(bands, num_classes, **settings).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(std=0.1)
    network.head.weight.data.normal_()
    return network


@settings(deadline=None, max_examples=200)
@given(
    length=st.integers(1, 3000),
    extra=st.integers(1, 40),
    margin=st.integers(0, 12),
    ramp=st.integers(1, 40),
    multiple=st.sampled_from([1, 4, 16]),
)
def test_spans_cover_every_pixel_once_and_stay_off_their_borders(
    length: int, extra: int, margin: int, ramp: int, multiple: int
) -> None:
    overlap = Overlap(margin * multiple, ramp, multiple)
    tile = overlap.smallest_tile + extra - 1
    found = spans(length, tile, overlap)
    total = np.zeros(length)
    for span in found:
        total[span.first : span.last] += span.weights.numpy()
        assert span.start % multiple == 0
        assert 0 <= span.start <= span.first < span.last <= span.stop <= length
        assert span.stop - span.start <= tile
        # What counts is a margin away from the tile's cut edges, but not from the image's own border.
        assert span.start == 0 or span.first - span.start >= overlap.margin
        assert span.stop == length or span.stop - span.last >= overlap.margin
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_a_tile_that_is_nothing_but_overlap_is_an_error() -> None:
    with pytest.raises(ValueError, match="tile is 96; with this network it must be 128 or more"):
        spans(1000, 96, Overlap(32, 32, 16))


@pytest.mark.parametrize(
    "settings",
    [
        {"levels": 3},
        {"levels": 4, "upsample": "nearest"},
        {"levels": 3, "encoder": "resnet34"},
        {"levels": 5},
        {"levels": 4, "enlarge": 2},
        {"levels": 3, "enlarge": 3},
    ],
)
def test_the_network_sees_no_further_than_the_radius(settings: dict[str, Any]) -> None:
    network = network_of(1, 1, base_channels=1, **settings).double()
    for parameter in network.parameters():
        # Without negative weights, no ReLU cuts off a path through the network.
        parameter.data.abs_()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.zero_()
    radius, multiple = receptive_radius(network), 2 ** (network.levels - 1)
    centre = (radius // multiple + 1) * multiple
    reach = 0
    for pixel in (centre, centre + multiple - 1):
        # One row of columns is enough, since both axes are alike.
        image = torch.ones(1, 1, multiple, 2 * centre + multiple, dtype=torch.float64, requires_grad=True)
        network(image)[0, 0, 0, pixel].backward()
        assert image.grad is not None
        seen = image.grad.abs().sum((0, 1, 2)).nonzero()[:, 0]
        reach = max(reach, pixel - int(seen.min()), int(seen.max()) - pixel)
    assert 0.75 * radius <= reach <= radius
    assert overlap_of(network).margin >= radius


@pytest.mark.parametrize(
    ("encoder", "upsample", "enlarge", "flips"),
    [
        ("vgg16", "bilinear", 1, False),
        ("vgg16", "bilinear", 1, True),
        ("resnet34", "nearest", 1, False),
        ("resnet34", "nearest", 1, True),
        pytest.param("vgg16", "bilinear", 3, False, marks=pytest.mark.slow),
        pytest.param("vgg16", "bilinear", 3, True, marks=pytest.mark.slow),
    ],
)
def test_tiles_equal_the_whole_image(
    monkeypatch: pytest.MonkeyPatch, encoder: str, upsample: str, enlarge: int, flips: bool
) -> None:
    # In fp64, a difference cannot be rounding.
    plain = network_of(2, 3, base_channels=2, levels=3, encoder=encoder, upsample=upsample, enlarge=enlarge).double()
    network = Flipped(plain) if flips else plain
    assert overlap_of(network) == overlap_of(plain)
    # An enlarged image takes nine times as long.
    N, H, W = (2, 331, 407) if enlarge == 1 else (1, 163, 251)
    image = torch.randn(N, 2, H, W, dtype=torch.float64)
    tile = overlap_of(network).smallest_tile + 32
    with torch.inference_mode():
        whole = network(image)
        monkeypatch.setattr(inference, "WHOLE_IMAGE_PIXELS", H * W * enlarge**2 - 1)
        sides: list[int] = []
        plain.encoder[0].register_forward_hook(lambda module, inputs, output: sides.extend(output.shape[-2:]))
        tiled = inference.predict_logits(network, image, enlarge * tile)
    # The first level's input is as large as requested, and no larger.
    assert max(sides) <= enlarge * tile
    assert len(spans(W, tile, overlap_of(network))) > 3
    # The sum of the tiles is in fp32.
    torch.testing.assert_close(tiled, whole.float(), atol=1e-5, rtol=0)


def test_the_papers_network_in_tiles() -> None:
    network = network_of(1, 1, base_channels=2)
    image = torch.randn(1, 1, 430, 470)
    with torch.inference_mode():
        torch.testing.assert_close(logits_in_tiles(network, image, 368), network(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["group", "instance-batch"])
def test_a_norm_of_the_tiles_own_has_no_seam(norm: str) -> None:
    network = network_of(1, 1, base_channels=4, levels=3, norm=norm)
    # With a gradient of brightness, each tile has other statistics.
    image = torch.randn(1, 1, 192, 768) + torch.linspace(-2, 2, 768)
    overlap = overlap_of(network)
    with torch.inference_mode():
        tiled = logits_in_tiles(network, image, overlap.smallest_tile)[0, 0]
    steps = (tiled[:, 1:] - tiled[:, :-1]).mean(0).abs()
    # Columns where a ramp begins or ends look like all others.
    edges = [
        edge
        for span in spans(768, overlap.smallest_tile, overlap)
        for edge in (span.first, span.last)
        if 0 < edge < 768
    ]
    assert len(edges) >= 4
    assert steps[[edge - 1 for edge in edges]].mean() < steps.mean() + 3 * steps.std()


def test_rows_are_enlarged_as_torch_does() -> None:
    small = np.random.default_rng(0).random((2, 13, 7)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(small)[None], size=(50, 61), mode="bilinear", align_corners=False)[0]
    found = np.concatenate([enlarged_rows(small, 50, 61, top, min(top + 16, 50)) for top in range(0, 50, 16)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
