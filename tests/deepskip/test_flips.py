"""Flips at test time equal probabilities averaged by hand in fp64; test_tiling covers tiles."""

import numpy as np
import pytest
import torch
from torch import nn

import deepskip
from deepskip.flips import mean_logits
from tests.deepskip.test_predictor import state_of

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(network: nn.Module, image_CHW: np.ndarray) -> np.ndarray:
    """Return mean probabilities (V, H, W) in fp64 of a normalised image, whose edge pads it to a multiple of 4."""
    _, H, W = image_CHW.shape
    padded = np.pad(image_CHW, ((0, 0), (0, -H % 4), (0, -W % 4)), mode="edge")
    total = np.zeros(())
    for down in (1, -1):
        for across in (1, -1):
            turned = np.ascontiguousarray(padded[:, ::down, ::across])
            with torch.inference_mode():
                z = network(torch.from_numpy(turned)[None])[0].numpy()
            p = 1 / (1 + np.exp(-z)) if len(z) == 1 else np.exp(z) / np.exp(z).sum(0)
            total = total + p[:, ::down, ::across]
    return (total / 4)[:, :H, :W]


@pytest.mark.parametrize("classes", [1, 3])
def test_probabilities_are_the_mean_of_four(classes: int) -> None:
    model = deepskip.Predictor(state_of(2, classes))
    image = np.random.default_rng(0).normal(5, 2, (37, 54, 2))
    plain = model.predict_proba(image)
    flipped, labels = model.predict_proba(image, flips=True), model.predict(image, threshold=0.6, flips=True)
    normal = (image - image.mean((0, 1))) / image.std((0, 1))
    expected = by_hand(model.network.double(), normal.transpose(2, 0, 1)).transpose(1, 2, 0)
    np.testing.assert_allclose(flipped, expected, atol=1e-5)
    assert np.abs(flipped - plain).max() > 0.01
    np.testing.assert_array_equal(labels, flipped[..., 0] > 0.6 if classes == 1 else flipped.argmax(2))


def test_a_probability_next_to_one_keeps_its_distance() -> None:
    class Bright(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return 200 * image

    # sigmoid(40) is 1 in fp32.
    logits = mean_logits(Bright(), torch.full((1, 1, 4, 4), 0.2))
    torch.testing.assert_close(logits, torch.full((1, 1, 4, 4), 40.0))
    assert torch.isfinite(mean_logits(Bright(), torch.randn(1, 1, 8, 8))).all()
