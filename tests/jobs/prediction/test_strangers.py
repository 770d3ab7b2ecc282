"""Predictions among files of others: what they made stays, and what their images say about places and values is heard."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image

import deepskip
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.decoding import read_image
from deepskip.data_shards.pictures import Reading, image_of
from deepskip.data_shards.sources.folder import pack_folder
from deepskip.jobs import predict
from deepskip.jobs.options import PredictConfig
from deepskip.jobs.prediction import rasters
from deepskip.jobs.prediction.georeference import of_world_file
from deepskip.jobs.prediction.outputs import Picture
from deepskip.jobs.prediction.rasters import in_memory
from deepskip.jobs.settings import parse_settings
from tests.jobs.prediction.models import save_model

SIDE = 48
RNG = np.random.default_rng(0)


def picture(path: Path, side: int = SIDE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (side, side, 3), np.uint8)).save(path)
    return path


def segment(images: Path, out: Path, *options: str) -> None:
    predict.main(["--model", "coins", "--images", str(images), "--out", str(out), *options])


def test_files_of_others_are_neither_overwritten_nor_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "images" / "a.png")
    drawn = picture(tmp_path / "masks" / "a.png")
    before = drawn.read_bytes()
    with pytest.raises(SystemExit) as ended:
        segment(tmp_path / "images", tmp_path)
    assert ended.value.code == 2
    assert f"{drawn} was not made by a prediction and could be overwritten" in capsys.readouterr().err
    assert drawn.read_bytes() == before
    drawn.unlink()
    others = [tmp_path / "runs" / ".step-1.pt.abcdef01.part", tmp_path / "masks" / ".movie.mkv.part"]
    leftover = tmp_path / "masks" / ".a.png.0123abcd.part"
    for path in (*others, leftover):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    segment(tmp_path / "images", tmp_path)
    assert all(path.exists() for path in others)
    assert not leftover.exists()
    assert Image.open(drawn).size == (SIDE, SIDE)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made_is_an_error(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(SystemExit) as ended:
        segment(tmp_path / "images", tmp_path / place)
    assert ended.value.code == 2
    assert f"error: --out: the folder {tmp_path / place} cannot be made: " in capsys.readouterr().err


def test_the_objects_of_all_images_are_never_those_of_other_settings(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    out = tmp_path / "out"
    segment(tmp_path / "images", out, "--polygons", "coco", "--overlays", "false")
    assert (out / "coco.json").is_file()
    segment(tmp_path / "images", out, "--polygons", "geojson", "--threshold", "0.9", "--overlays", "false")
    assert not (out / "coco.json").exists()


def test_names_that_stand_in_each_others_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "images" / "a.png" / "b.png")
    with pytest.raises(SystemExit):
        segment(tmp_path / "images", tmp_path / "out")
    assert "may have the name of the folder of" in capsys.readouterr().err
    # A name may be as long as a file system allows, and index.json may belong to another program.
    images = tmp_path / "others"
    picture(images / f"{'x' * 240}.png")
    (images / "index.json").write_text("[]")
    segment(images, tmp_path / "out", "--overlays", "false")
    assert [path.stem for path in (tmp_path / "out" / "masks").iterdir()] == ["x" * 240]


@pytest.mark.parametrize("word", ["nan", "NaN", "-inf", "1e3", "-1e20", "-9999"])
def test_numbers_of_the_command_line_are_those_of_python(word: str) -> None:
    for form in ([f"--nodata={word}"], ["--nodata", word]):
        found = parse_settings("predict", PredictConfig, ["--model", "m", "--images", "i", "--out", "o", *form]).nodata
        np.testing.assert_equal(found, float(word))


def test_missing_pixels_of_a_shrunk_image_are_background(tmp_path: Path) -> None:
    model = deepskip.load("coins")
    model.preparation = {**model.preparation, "longest_side": 64}
    image = RNG.integers(0, 255, (150, 200, 3)).astype(np.float32)
    missing = RNG.random((150, 200)) < 0.1
    image[missing] = -9999
    probability = model.predict_proba(image, nodata=-9999)
    assert not probability[missing].any()
    assert probability[~missing].all()


def test_missing_pixels_of_a_shrunk_file_are_background(tmp_path: Path) -> None:
    save_model(tmp_path / "model", bands=3, longest_side=64)
    image = RNG.integers(0, 255, (150, 200, 3)).astype(np.float32)
    missing = RNG.random((150, 200)) < 0.1
    image[missing] = -9999
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", image)
    options = ["--nodata", "-9999", "--probabilities", "true", "--overlays", "false"]
    names = {"--model": "model", "--images": "images", "--out": "out"}
    predict.main([word for option, name in names.items() for word in (option, str(tmp_path / name))] + options)
    probability = np.load(tmp_path / "out" / "probabilities" / "a.npy")
    assert not probability[missing].any()
    assert probability[~missing].all()


@pytest.mark.parametrize("name", ["a.TIF", "a.JPG", "a.PNG", "a.tif"])
def test_a_world_file_of_a_name_in_capitals_is_found(name: str, tmp_path: Path) -> None:
    ending = name[2:].lower()
    (tmp_path / f"a.{ending[0]}{ending[-1]}w").write_text("2\n0\n0\n-2\n500001\n4999999\n")
    assert of_world_file(tmp_path / name).transform == (2, 0, 500000, 0, -2, 5000000)


@pytest.mark.parametrize("kind", ["area", "point", "world_point", "upside_down", "letters"])
def test_the_mask_lies_where_rasterio_sees_the_image(kind: str, tmp_path: Path) -> None:
    keys = [1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2 if "point" in kind else 1, 3072, 0, 1, 32633]
    words = ()
    if kind == "letters":
        words = ((34737, 2, 0, "Projection déformée|".encode() + b"\0", True),)
        keys = [*keys[:3], 4, *keys[4:12], 1026, 34737, len("Projection déformée|".encode()), 0, *keys[12:]]
    scale = (33550, 12, 3, (10.0, -10.0 if kind == "upside_down" else 10.0, 0.0), True)
    ties = (33922, 12, 6, (0.0, 0.0, 0.0, 500000.0, 5000000.0, 0.0), True)
    tags = [(34735, 3, len(keys), tuple(keys), True), *words]
    path = tmp_path / "images" / "a.tif"
    path.parent.mkdir()
    array = RNG.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    if kind == "world_point":
        path.with_suffix(".tfw").write_text("10\n0\n0\n-10\n500005\n4999995\n")
    else:
        tags = [scale, ties, *tags]
    tifffile.imwrite(path, array, photometric="rgb", metadata=None, extratags=tags)
    segment(path.parent, tmp_path / "out", "--overlays", "false", "--polygons", "geojson")
    with rasterio.open(path) as image, rasterio.open(tmp_path / "out" / "masks" / "a.tif") as mask:
        assert mask.transform == image.transform
        assert mask.crs == image.crs
    found = json.loads((tmp_path / "out" / "polygons" / "a.geojson").read_text())
    assert found["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"


def test_an_overlay_keeps_three_of_many_bands() -> None:
    for dtype in (np.uint8, np.uint16, np.float32):
        array = RNG.integers(0, 200, (10, 12, 200)).astype(dtype)
        shown = Picture(in_memory(array))
        shown.rows(0, np.zeros((10, 12), np.uint8))
        np.testing.assert_array_equal(shown.image, array[..., [0, 100, 199]])
        assert shown.image.dtype != np.uint8


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("compress", ["deflate", "jpeg"])
def test_what_the_mask_in_a_tiff_covers_has_no_value(
    compress: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = np.full((SIDE, SIDE), 255, np.uint8)
    valid[:, :20] = 0
    path = tmp_path / "images" / "a.tif"
    path.parent.mkdir()
    size = {"width": SIDE, "height": SIDE, "count": 3, "dtype": "uint8", "blockxsize": 16, "blockysize": 16}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", compress=compress, tiled=True, **size) as file,
    ):
        file.write(RNG.integers(0, 255, (3, SIDE, SIDE), np.uint8))
        file.write_mask(valid)
        file.build_overviews([2])
    segment(path.parent, tmp_path / "out", "--threshold", "1e-9", "--overlays", "false")
    with rasterio.open(tmp_path / "out" / "masks" / "a.tif") as mask:
        np.testing.assert_array_equal(mask.read(1), valid // 255)
    # Read by windows it is the same.
    whole = image_of(read_image("tif", path.read_bytes()), Reading(missing=True))
    monkeypatch.setattr(rasters, "WHOLE_BYTES", 0)
    with rasters.open_raster(path, "tif", 3) as raster:
        np.testing.assert_array_equal(raster.read(slice(3, 40), slice(5, 47)), whole[3:40, 5:47])
    # A training ignores it.
    Image.fromarray(np.ones((SIDE, SIDE), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "masks" / "a.png")
    pack_folder(path.parent, tmp_path / "masks", tmp_path / "data", split_name="train")
    shards = Shards(str(tmp_path / "data" / "train"), normalize="none")
    image, labels = shards.read(shards.index.entries([0])[0])
    np.testing.assert_array_equal(image, whole)
    np.testing.assert_array_equal(labels, np.where(valid, 1, 255))
