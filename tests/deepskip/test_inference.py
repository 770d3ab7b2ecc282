from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deepskip
from deepskip import checkpoint
from deepskip.config import Config
from deepskip.inference import Segmenter, normalized_by_itself, to_labels


class Identity(nn.Module):
    in_channels, num_classes = 3, 1

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


@pytest.mark.parametrize("how", ["image", "dataset", "none"])
def test_normalisation_of_raw_images(how: str) -> None:
    image = np.random.default_rng(0).integers(0, 60000, (40, 30, 3)).astype(np.uint16)
    segmenter = Segmenter(Identity(), 3, how, [30000.0, 1.0, 1.0], [1000.0, 1.0, 1.0])  # type: ignore[arg-type]
    band = image[..., 0].astype(np.float64)
    mean, std = {"image": (band.mean(), band.std()), "dataset": (30000, 1000), "none": (0, 1)}[how]
    expected = 1 / (1 + np.exp(-np.clip((band - mean) / std, -80, 80)))
    found = segmenter(torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))[None])
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 0.3, 60001, 1e-3, -9999.7])
def test_a_constant_band_becomes_0(value: float) -> None:
    # At some of these sizes the mean of equal numbers is rounded to the next number in fp32.
    for H, W in ((100, 120), (256, 256), (513, 1025)):
        x = torch.full((2, 2, H, W), value)
        x[:, 1, 0, 0] *= 2
        found = normalized_by_itself(x)
        assert found[:, 0].count_nonzero() == 0
        wide = x[:, 1].double().numpy()
        np.testing.assert_allclose(found[:, 1], (wide - wide.mean()) / wide.std(), rtol=1e-5, atol=5e-4)


@pytest.mark.parametrize(("offset", "levels"), [(60000, 256), (1e6, 2), (-3e4, 17), (0, 256)])
def test_an_image_of_low_contrast_on_a_large_offset(offset: float, levels: int) -> None:
    # float64 takes the same numbers, which the offset has already rounded
    x = (offset + np.random.default_rng(0).integers(0, levels, (1, 1, 301, 203)) / 256).astype(np.float32)
    x = np.floor(x) if offset == 1e6 else x
    x[..., :7] += 1
    wide = x.astype(np.float64)
    found = normalized_by_itself(torch.from_numpy(x))
    np.testing.assert_allclose(found, (wide - wide.mean()) / wide.std(), atol=2e-5)


def test_labels_of_tensors_and_arrays() -> None:
    one, four = np.array([[[0.5, 0.51, 0.2]]]), np.array([0.1, 0.5, 0.3, 0.1]).reshape(4, 1, 1).repeat(3, 2)
    for kind in (np.asarray, torch.from_numpy):
        assert to_labels(kind(one), 0.5).tolist() == [[False, True, False]]
        assert to_labels(kind(one), 0.1).tolist() == [[True] * 3]
        assert to_labels(kind(four), 0.5).tolist() == [[1, 1, 1]]
        assert to_labels(kind(four[None]), 0.9).tolist() == [[[1, 1, 1]]]


def test_load_gives_back_the_averaged_network(tmp_path: Path) -> None:
    from dataclasses import asdict

    config = Config()
    config.model.levels = 3
    torch.manual_seed(0)
    model, ema = deepskip.DeepSkipUNet(5, 3, levels=3), deepskip.DeepSkipUNet(5, 3, levels=3).eval()
    data = {"in_channels": 5, "num_classes": 3, "mean": [0.0] * 5, "std": [1.0] * 5}
    state = {"config": asdict(config), "data": data, "model": model.state_dict(), "ema": ema.state_dict()}
    checkpoint.save(state, tmp_path / checkpoint.FOLDER / checkpoint.BEST)
    image = np.random.default_rng(0).random((20, 24, 5))
    segmenter = deepskip.load(tmp_path)
    x = torch.from_numpy(image.transpose(2, 0, 1)).float()[None]
    with torch.inference_mode():
        expected = ema((x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True))[0].argmax(0)
    np.testing.assert_array_equal(segmenter.predict(image), expected)
