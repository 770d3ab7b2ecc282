"""Predictions respect missing values, transparency and orientation of a file, whole and in tiles."""

import base64
import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image

import deepskip
from deepskip import checkpoint
from deepskip.data_shards.pictures import turned
from deepskip.data_shards.sources.folder import pack_folder
from deepskip.jobs import evaluate, predict
from deepskip.jobs.prediction import rasters
from deepskip.jobs.serving.model import Model
from tests.jobs.prediction.models import save_model
from tests.jobs.prediction.test_predict import TILE, picture

pytestmark = pytest.mark.usefixtures("one_thread")
H, W, GAP = 300, 420, 100


@pytest.fixture(autouse=True)
def by_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def run(model: Path, image: Path, out: Path, *words: Any) -> np.ndarray:
    """Predict one TIFF and return its probabilities."""
    arguments = ["--model", model, "--images", image, "--out", out, "--probabilities", "true", *words]
    predict.main([str(argument) for argument in arguments])
    return tifffile.imread(out / "probabilities" / image.name)


def by_hand(model: Path, image_HWC: np.ndarray, how: str) -> np.ndarray:
    """Compute probabilities (H, W) in float64, up to the network, of an image that is nan at missing values."""
    predictor = deepskip.load(model)
    mean, std = np.nanmean(image_HWC, (0, 1)), np.nanstd(image_HWC, (0, 1))
    if how == "dataset":
        mean, std = predictor.segmenter.mean[0].numpy(), predictor.segmenter.std[0].numpy()
    missing = np.isnan(image_HWC)
    normalized = np.where(missing, 0, (image_HWC - mean) / std)
    with torch.inference_mode():
        logits = predictor.network(torch.from_numpy(normalized.transpose(2, 0, 1)[None].astype(np.float32)))
    return np.where(missing.all(2), 0, logits.sigmoid()[0, 0].numpy())


@pytest.mark.parametrize("how", ["image", "dataset"])
@pytest.mark.parametrize("tag", [True, False])
def test_nothing_is_predicted_where_there_is_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, tag: bool
) -> None:
    model = save_model(tmp_path / "run", 3, normalize=how)
    image = picture(H, W, 3, np.float32)
    image[:, :GAP] = -9999
    # Elsewhere, one band of three is missing.
    image[200:230, 300:340, 1] = -9999
    truth = by_hand(model, np.where(image == -9999, np.nan, image).astype(np.float64), how)
    tags = [(42113, "s", 0, "-9999", True)] if tag else []
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extratags=tags)
    words = [] if tag else ["--nodata", "-9999"]
    whole = run(model, tmp_path / "a.tif", tmp_path / "whole", *words)
    np.testing.assert_allclose(whole, truth, atol=1e-4)
    assert (tifffile.imread(tmp_path / "whole" / "masks" / "a.tif")[:, :GAP] == 0).all()
    monkeypatch.setattr(rasters, "WHOLE_BYTES", 0)
    np.testing.assert_allclose(run(model, tmp_path / "a.tif", tmp_path / "tiled", *words, *TILE), truth, atol=1e-4)
    p_HWV = deepskip.load(model).predict_proba(image, nodata=-9999)
    np.testing.assert_allclose(p_HWV[..., 0], truth, atol=1e-4)
    image[image == -9999] = np.nan
    np.testing.assert_allclose(deepskip.load(model).predict_proba(image, nodata=math.nan)[..., 0], truth, atol=1e-4)
    with pytest.raises(ValueError, match=r"nan, infinite or beyond 1e\+15.*nodata=math\.nan"):
        deepskip.load(model).predict(image)


def test_as_many_bands_are_taken_as_the_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(H, W, 4)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extrasamples=["unassalpha"])
    for bands in (3, 4):
        model = save_model(tmp_path / f"run{bands}", bands)
        expected = deepskip.load(model).predict_proba(image[..., :bands])[..., 0]
        for side, words in ((2**26, []), (0, TILE)):
            monkeypatch.setattr(rasters, "WHOLE_BYTES", side)
            found = run(model, tmp_path / "a.tif", tmp_path / f"{bands}-{side}", *words)
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("orientation", [2, 3, 6, 7, 8])
def test_turned_images_have_turned_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int) -> None:
    model, image = save_model(tmp_path / "run", 3), picture(H, W, 3)
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extratags=tags, compression="zlib")
    expected = deepskip.load(model).predict_proba(np.ascontiguousarray(turned(image, orientation)))[..., 0]
    stored = deepskip.load(model).predict_proba(image)[..., 0]
    for side, words in ((2**26, []), (0, TILE)):
        monkeypatch.setattr(rasters, "WHOLE_BYTES", side)
        found = run(model, tmp_path / "a.tif", tmp_path / f"out{side}", *words)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        ignored = run(model, tmp_path / "a.tif", tmp_path / f"as{side}", "--orientation", "ignore", *words)
        np.testing.assert_allclose(ignored, stored, atol=1e-4)


@pytest.mark.parametrize("how", ["image", "dataset"])
def test_zarr_and_shards_and_a_server_and_an_evaluation_leave_the_same_out(tmp_path: Path, how: str) -> None:
    model = save_model(tmp_path / "run", 3, normalize=how)
    image = picture(H, W, 3, np.float32)
    image[:, :GAP] = -9999
    truth = by_hand(model, np.where(image == -9999, np.nan, image).astype(np.float64), how)
    array = zarr.create_array(tmp_path / "a.zarr", shape=image.shape, chunks=(100, 90, 3), dtype=image.dtype)
    array[:] = image
    # As xarray writes it into Zarr 3: eight bytes of a float64.
    array.attrs["_FillValue"] = base64.b64encode(struct.pack("<d", -9999)).decode() if how == "image" else -9999
    words = ["--probabilities", "true", "--model", str(model), "--out", str(tmp_path / "out")]
    predict.main(["--images", str(tmp_path / "a.zarr"), *words, *TILE])
    found = zarr.open_array(tmp_path / "out" / "probabilities" / "a.zarr", mode="r")
    np.testing.assert_allclose(found[:], truth, atol=1e-4)

    (tmp_path / "i").mkdir()
    (tmp_path / "m").mkdir()
    for name in "ab":
        tifffile.imwrite(
            tmp_path / "i" / f"{name}.tif", image, photometric="rgb", extratags=[(42113, "s", 0, "-9999", True)]
        )
        Image.fromarray((truth >= 0.5).astype(np.uint8) * 255).save(tmp_path / "m" / f"{name}.png")
    pack_folder(tmp_path / "i", tmp_path / "m", tmp_path / "set", val_share=0.5)
    predict.main(["--images", str(tmp_path / "set" / "val"), *words])
    (shown,) = (tmp_path / "out" / "probabilities").glob("*.tif")
    np.testing.assert_allclose(tifffile.imread(shown), truth, atol=1e-4)
    report = tmp_path / "report"
    evaluate.main(
        ["--model", str(model), "--data", str(tmp_path / "set" / "val"), "--out", str(report), "--track", "none"]
    )
    # The masks are the predictions.
    assert json.loads((report / "report.json").read_text())["metrics"]["iou"] == 1

    state = checkpoint.read_model(model / checkpoint.FOLDER / checkpoint.BEST)
    state["data"]["preparation"] = {"bands": None, "longest_side": None, "nodata": -9999}
    served = Model(state, "cpu", 10**6, 4, 0.0, 1).loaded
    prepared = served.predictor.prepared(served.read(tif_of(image), "tif"))
    np.testing.assert_allclose(served.forward([prepared])[0][0], truth, atol=1e-4)


def test_values_that_no_file_declares_as_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, image = save_model(tmp_path / "run", 3), picture(H, W, 3, np.float32)
    image[:, :GAP] = -9999
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    run(model, tmp_path / "a.tif", tmp_path / "out")
    note = "has values of -9999, far from all others, which may mean no data: --nodata=-9999"
    assert note in capsys.readouterr().out
    for side, words in ((2**26, []), (0, TILE)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rasters, "WHOLE_BYTES", side)
            run(model, tmp_path / "a.tif", tmp_path / f"out{side}", *words)
            assert note in capsys.readouterr().out
            for value in (-3.4028234663852886e38, 1e20):
                image[:, :GAP] = value
                tifffile.imwrite(tmp_path / "b.tif", image, photometric="rgb")
                with pytest.raises(SystemExit):
                    run(model, tmp_path / "b.tif", tmp_path / f"out{side}", *words)
                assert "has values beyond 1e+15" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"beyond 1e\+15"):
        deepskip.load(model).predict(image)


def test_single_bits_and_the_names_of_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bits = save_model(tmp_path / "run", 1), picture(H, W, 1)[..., 0] > 120
    tifffile.imwrite(tmp_path / "a.tif", bits, compression="zlib")
    expected = deepskip.load(model).predict_proba(bits.astype(np.uint8)[..., None])[..., 0]
    for side, words in ((2**26, []), (0, TILE)):
        monkeypatch.setattr(rasters, "WHOLE_BYTES", side)
        found = run(model, tmp_path / "a.tif", tmp_path / f"out{side}", *words)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    for names, order in (
        (("band", "latitude", "longitude"), "CHW"), (("lat", "lon", "band"), "HWC"), (("band", "y", "x"), "CHW"),
        (("time", "rows", "columns"), "CHW"), (("height", "width", "c"), "HWC"),
    ):  # fmt: skip
        array = zarr.create_array(
            tmp_path / f"{'-'.join(names)}.zarr", shape=(3, 8, 9), dtype="u1", dimension_names=names
        )
        assert rasters.zarr_axes(array, None) == order


def tif_of(image_HWC: np.ndarray) -> bytes:
    """Return the bytes of a TIFF that says nothing about its values."""
    file = io.BytesIO()
    tifffile.imwrite(file, image_HWC, photometric="rgb")
    return file.getvalue()
