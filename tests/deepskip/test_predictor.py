from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepskip
from deepskip import checkpoint, inference
from deepskip.config import Config
from deepskip.data_shards.preparation import resize_longest_side


def state_of(in_channels: int, classes: int, norm: str = "batch", **preparation: Any) -> dict[str, Any]:
    config = Config()
    config.model.levels, config.model.base_channels, config.model.norm = 3, 4, norm  # type: ignore[assignment]
    torch.manual_seed(in_channels)
    network = deepskip.DeepSkipUNet(in_channels, classes, 4, 3, norm=norm)
    # The head gives about as much foreground as background.
    torch.nn.init.normal_(network.head.weight)
    with torch.no_grad():
        logits = network.eval()(torch.randn(1, in_channels, 64, 64))
        network.head.bias -= logits.mean((0, 2, 3))  # type: ignore[operator]
    data = {"in_channels": in_channels, "num_classes": classes, "mean": [0.0] * in_channels, "std": [1.0] * in_channels}
    data["preparation"] = {"bands": None, "longest_side": None} | preparation
    return {"config": asdict(config), "data": data, "model": network.state_dict(), "ema": None, "step": 7}


def by_hand(model: deepskip.Predictor, image_HWC: np.ndarray) -> np.ndarray:
    """Return the network's own probabilities (V, H, W) in fp64."""
    x = torch.from_numpy(image_HWC.transpose(2, 0, 1).astype(np.float64))[None]
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True)
    with torch.inference_mode():
        logits = model.network.double()(x)
        model.network.float()
    return (logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1))[0].numpy()


@pytest.mark.parametrize(("bands", "classes"), [(3, 1), (5, 3), (1, 1)])
def test_arrays_and_tensors_one_and_several(tmp_path: Path, bands: int, classes: int) -> None:
    checkpoint.save(state_of(bands, classes), tmp_path / "some.pt")
    model = deepskip.load(tmp_path / "some.pt")
    assert (model.bands, model.num_classes, model.state["step"]) == (bands, classes, 7)
    images = np.random.default_rng(0).integers(0, 256, (2, 37, 53, bands)).astype(np.uint8)
    proba = np.stack([by_hand(model, image) for image in images])
    labels = (proba[:, 0] > 0.5 if classes == 1 else proba.argmax(1)).astype(np.uint8)
    assert 0.1 < (labels != 0).mean() < 0.9
    sure = np.abs(proba[:, 0] - 0.5) > 1e-4 if classes == 1 else np.ptp(np.sort(proba, 1)[:, -2:], 1) > 1e-4

    tensors = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    for given, several in ((images, labels), (tensors, torch.from_numpy(labels))):
        assert type(model(given)) is type(given)
        assert (model(given) == several)[sure].all()
        assert (model.predict(given[1]) == several[1])[sure[1]].all()
        assert model.predict(given[0]).shape == (37, 53)
        assert str(model(given[0]).dtype).endswith("uint8")
    np.testing.assert_allclose(model.predict_proba(images), proba.transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(tensors[0]), proba[0], atol=1e-5)
    np.testing.assert_allclose(model.probabilities(tensors), proba, atol=1e-5)
    if classes == 1:
        np.testing.assert_array_equal(model.predict(images, threshold=0.8), model.predict_proba(images)[..., 0] > 0.8)
    if bands == 1:
        np.testing.assert_array_equal(model(images[0, ..., 0]), model(images[0]))


def test_many_images_go_through_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deepskip.Predictor(state_of(3, 1))
    images = np.random.default_rng(0).random((5, 24, 20, 3))
    whole = model.predict_proba(images)
    monkeypatch.setattr(inference, "WHOLE_IMAGE_PIXELS", 2 * 24 * 20)
    np.testing.assert_allclose(model.predict_proba(images), whole, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_large_images_are_shrunk_as_the_training_images_were(dtype: type) -> None:
    model = deepskip.Predictor(state_of(3, 1, longest_side=48))
    image = (np.random.default_rng(0).random((70, 101, 3)) * 255).astype(dtype)
    small, _ = resize_longest_side(image, None, 48)
    found = inference.torch.nn.functional.interpolate(
        torch.from_numpy(by_hand(model, small))[None], size=(70, 101), mode="bilinear"
    )[0]
    np.testing.assert_allclose(model.predict_proba(image)[..., 0], found[0], atol=2e-3)
    assert model.predict(torch.from_numpy(image.transpose(2, 0, 1).copy())).shape == (70, 101)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_the_bands_that_the_network_sees_are_taken(dtype: type) -> None:
    image = (np.random.default_rng(0).random((24, 20, 9)) * 4000).astype(dtype)
    tensor = torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1).copy())
    model = deepskip.Predictor(state_of(3, 1, chosen=[7, 0, 4], of=9))
    assert (model.bands, model.image_bands, model.chosen) == (3, 9, [7, 0, 4])
    few = np.ascontiguousarray(image[..., [7, 0, 4]])
    expected = by_hand(model, few)[0]
    np.testing.assert_allclose(model.predict_proba(image)[..., 0], expected, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(tensor[None])[0, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(model.predict_proba(few, chosen=True), model.predict_proba(image))
    with pytest.raises(ValueError, match=r"\(24, 20, 3\); the model takes arrays \(height, width, 9\)"):
        model(few)
    # Bands that the network does not see may hold anything.
    if dtype == np.float32:
        image[..., 1] = np.nan
        np.testing.assert_allclose(model.predict_proba(image)[..., 0], expected, atol=1e-5)
        image = np.nan_to_num(image)
    # Bands are numbered after resampling.
    model = deepskip.Predictor(state_of(2, 1, bands=3, chosen=[2, 0], of=3))
    thirds = image.astype(np.float64).reshape(24, 20, 3, 3).mean(3)
    thirds = (thirds if dtype == np.float32 else np.rint(thirds)).astype(dtype)[..., [2, 0]]
    expected = by_hand(model, thirds)[0]
    np.testing.assert_allclose(model.predict_proba(image)[..., 0], expected, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(thirds, chosen=True)[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"chosen": [0, 1, 9], "of": 9}, "must be a list of bands, 0 to 8"),
        ({"chosen": [0, 1, 1], "of": 9}, "must name 3 different bands"),
        ({"chosen": [0, 1], "of": 9}, "must name 3 different bands"),
        ({"chosen": "012", "of": 9}, "must be a list of bands"),
        ({"chosen": [0, 1, 2]}, "preparation.of is None"),
    ],
)
def test_a_checkpoint_with_an_impossible_choice_of_bands(tmp_path: Path, told: dict[str, Any], said: str) -> None:
    checkpoint.save(state_of(3, 1, **told), tmp_path / "odd.pt")
    with pytest.raises(checkpoint.CheckpointError, match=said):
        deepskip.load(tmp_path / "odd.pt")


@pytest.mark.parametrize("names", [["car"], ["car", 7], "ab", ["car", "bus\x1b[31m"]])
def test_a_checkpoint_with_impossible_names_of_classes(tmp_path: Path, names: Any) -> None:
    state = state_of(3, 3)
    state["data"]["classes"] = ["car", "cellule\u00a0A"]
    checkpoint.save(state, tmp_path / "even.pt")
    assert deepskip.load(tmp_path / "even.pt").class_names == ["car", "cellule\u00a0A"]
    assert deepskip.Predictor(state_of(3, 3)).class_names == ["class 1", "class 2"]
    state["data"]["classes"] = names
    checkpoint.save(state, tmp_path / "odd.pt")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"its classes are not a list of names|names 1 classes besides"
    ):
        deepskip.load(tmp_path / "odd.pt")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_bands_are_brought_to_the_models_as_the_training_images_were(dtype: type) -> None:
    model = deepskip.Predictor(state_of(3, 1, bands=3))
    image = (np.random.default_rng(0).random((24, 20, 6)) * 4000).astype(dtype)
    pairs = image.astype(np.float64).reshape(24, 20, 3, 2).mean(3)
    means = (pairs if dtype == np.float32 else np.rint(pairs)).astype(dtype)
    expected = by_hand(model, means)[0]
    np.testing.assert_allclose(model.predict_proba(image)[..., 0], expected, atol=1e-5)
    tensor = torch.from_numpy(image.astype(np.float32 if dtype == np.float32 else np.int32).transpose(2, 0, 1).copy())
    np.testing.assert_allclose(model.predict_proba(tensor)[0], expected, atol=1e-5)
    # A single band is repeated.
    grey = image[..., 0]
    np.testing.assert_allclose(
        model.predict_proba(grey)[..., 0], by_hand(model, np.repeat(grey[..., None], 3, 2))[0], atol=1e-5
    )
    # These numbers exceed int32.
    if dtype == np.uint16:
        found = model.predict_proba(image.astype(np.int64) * 2**21)[..., 0]
        np.testing.assert_allclose(found, by_hand(model, pairs)[0], atol=1e-4)
    with pytest.raises(ValueError, match=r"\(5,\).*\(height, width, bands\)"):
        model(np.zeros(5))


@pytest.mark.parametrize("told", [None, -9999, 200])
def test_what_a_masked_array_masks_is_missing(told: float | None) -> None:
    model = deepskip.Predictor(state_of(3, 1, nodata=told))  # type: ignore[arg-type]
    image = np.random.default_rng(0).integers(0, 200, (40, 30, 3)).astype(np.uint8)
    missing = np.zeros(image.shape, bool)
    missing[:9] = missing[20:, :5, 1] = True
    # The numbers below a mask are arbitrary.
    masked = np.ma.array(np.where(missing, 255, image), mask=missing)
    wide = np.where(missing, np.nan, image.astype(np.float32))
    np.testing.assert_array_equal(model.predict_proba(masked), model.predict_proba(wide, nodata=np.nan))
    assert not model(masked)[:9].any()
    nothing = np.ma.array(image, mask=False)
    np.testing.assert_array_equal(model.predict_proba(nothing), model.predict_proba(image))


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        (np.ma.array(np.zeros((8, 8, 3), complex), mask=True), TypeError, "complex128"),
        (np.zeros((8, 8, 4)), ValueError, r"\(8, 8, 4\).*\(height, width, 3\)"),
        (np.zeros((8, 8)), ValueError, r"\(8, 8\)"),
        (torch.zeros(8, 8, 3), ValueError, r"\(8, 8, 3\).*\(3, height, width\)"),
        (np.zeros((8, 0, 3)), ValueError, "no pixels"),
        (np.full((8, 8, 3), np.nan), ValueError, "192 values that are nan"),
        (np.full((8, 8, 3), 1e300), ValueError, r"beyond 1e\+15"),
        (torch.tensor([[[np.inf]]] * 3), ValueError, "3 values"),
        (np.zeros((8, 8, 3), complex), TypeError, "complex128"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), TypeError, "complex64"),
        (np.full((8, 8, 3), "a"), TypeError, "<U1"),
        ([[1.0]], TypeError, "is a list; it must be a numpy array or a torch tensor"),
    ],
)
def test_what_is_no_image_of_the_models_is_an_error(image: Any, error: type[Exception], said: str) -> None:
    model = deepskip.Predictor(state_of(3, 1))
    with pytest.raises(error, match=said):
        model(image)
