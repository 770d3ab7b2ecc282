"""The files that jobs.predict writes for each kind of input equal the network on the whole image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.features
import scipy.ndimage
import tifffile
import zarr
from PIL import Image
from pycocotools.coco import COCO
from rasterio.transform import Affine

import deepskip
from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.index import load_index
from deepskip.data_shards.preparation import resample_bands, resize_longest_side
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from deepskip.jobs import polygons, predict
from deepskip.jobs.prediction import rasters
from deepskip.jobs.prediction.inputs import sample_bytes
from tests.jobs.prediction.models import save_model

pytestmark = pytest.mark.usefixtures("one_thread")
# Tiles of the network in these tests overlap by 96.
TILE = ["--tile", "192"]


@pytest.fixture(autouse=True)
def without_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def picture(height: int, width: int, bands: int, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    """Return a picture of blobs of several sizes on a slope."""
    rng = np.random.default_rng(seed)
    noise = scipy.ndimage.gaussian_filter(rng.standard_normal((height, width, bands)), (4, 4, 0))
    image = 120 + 60 * noise / noise.std() + np.linspace(-20, 20, width)[:, None]
    return np.clip(image, 1, 254).astype(dtype)


def run(*arguments: str | Path) -> None:
    predict.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("three") / "run", 3)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("five") / "run", 5, num_classes=3)


def test_pictures(three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    segmenter = deepskip.load(three)
    pictures = {"a": picture(70, 50, 3), "deeper/b": picture(70, 50, 3, seed=1), "c": picture(31, 200, 3, seed=2)}
    for name, image in pictures.items():
        Image.fromarray(image).save(images / f"{name}.png")
    Image.fromarray(picture(40, 60, 3)).save(images / "d.jpg")
    pictures["d"] = np.asarray(Image.open(images / "d.jpg"))
    pictures["e"] = picture(40, 60, 3, seed=3)
    Image.fromarray(pictures["e"]).save(images / "e.bmp")
    for name in ("notes.txt", "deeper/a.xml", "deeper/b.xml", "a.pgw"):
        (images / name).touch()
    run("--checkpoint", three, "--images", images, "--out", tmp_path / "out", "--probabilities", "true", *TILE)
    assert f"skipped in {images}, since only" in (said := capsys.readouterr().out)
    assert ": 2 .xml, 1 .txt\n" in said
    for name, image in pictures.items():
        expected = segmenter.predict(image)
        assert 0.02 < expected.mean() < 0.98
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out/masks/{name}.png")), expected * 255)
        p = np.load(tmp_path / f"out/probabilities/{name}.npy")
        np.testing.assert_allclose(p, segmenter.predict_proba(image)[..., 0], atol=1e-5)
        assert Image.open(tmp_path / f"out/overlays/{name}.png").size == (image.shape[1], image.shape[0])


def test_arrays_in_tiles(five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No image is small enough to be read whole.
    monkeypatch.setattr(rasters, "WHOLE_BYTES", 0)
    image = picture(301, 333, 5, np.uint16) * 7
    images = tmp_path / "images"
    images.mkdir()
    np.save(images / "rows.npy", image)
    np.save(images / "columns.npy", np.asfortranarray(image.astype(">f4")))
    np.savez(images / "packed.npz", image=image)
    bands_last = zarr.create_array(images / "last.zarr", shape=image.shape, chunks=(100, 90, 5), dtype=image.dtype)
    bands_last[:] = image
    group = zarr.open_group(images / "first.zarr", mode="w")
    shape = image.transpose(2, 0, 1).shape
    group.create_array("data", shape=shape, chunks=(5, 64, 64), dtype=image.dtype)[:] = image.transpose(2, 0, 1)
    options = {"photometric": "minisblack", "metadata": None}
    tifffile.imwrite(images / "plain.tif", image, planarconfig="contig", **options)
    tifffile.imwrite(
        images / "strips.tiff", image, planarconfig="contig", compression="lzw", rowsperstrip=16, **options
    )
    tifffile.imwrite(
        images / "planes.tif",
        image.transpose(2, 0, 1),
        planarconfig="separate",
        tile=(64, 64),
        compression="zlib",
        **options,
    )
    run(
        "--checkpoint",
        five,
        "--images",
        images,
        "--out",
        tmp_path / "out",
        "--probabilities",
        "true",
        "--overlays",
        "false",
        *TILE,
    )
    segmenter = deepskip.load(five)
    expected, p_VHW = segmenter.predict(image), segmenter.predict_proba(image).transpose(2, 0, 1)
    assert all((expected == label).any() for label in range(3))
    found = {
        "rows.npy": np.load,
        "columns.npy": np.load,
        "packed.npz": lambda path: np.load(path)["mask"],
        "last.zarr": lambda path: zarr.open_array(path)[:],
        "first.zarr": lambda path: zarr.open_array(path)[:],
        "plain.tif": tifffile.imread,
        "strips.tiff": tifffile.imread,
        "planes.tif": tifffile.imread,
    }
    unsure = np.sort(p_VHW, 0)[-1] - np.sort(p_VHW, 0)[-2] < 1e-4
    for name, read in found.items():
        mask = read(tmp_path / "out" / "masks" / name)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask[~unsure], expected[~unsure], err_msg=name)
    assert unsure.mean() < 0.001
    for name, read in (("rows.npy", np.load), ("plain.tif", tifffile.imread), ("last.zarr", found["last.zarr"])):
        np.testing.assert_allclose(
            read(tmp_path / "out" / "probabilities" / name), np.moveaxis(p_VHW, 0, -1), atol=1e-5, err_msg=name
        )


def test_flips_of_small_images_and_of_tiles(five: Path, tmp_path: Path) -> None:
    images = {"small": picture(50, 61, 5), "large": picture(230, 250, 5, seed=1)}
    for name, image in images.items():
        np.save(tmp_path / f"{name}.npy", image)
    for place in ("once", "again"):
        settings = [
            "--out",
            tmp_path / "out",
            "--probabilities",
            "true",
            "--flips",
            str(place == "again").lower(),
            *TILE,
        ]
        run("--checkpoint", five, "--images", tmp_path / "small.npy", tmp_path / "large.npy", *settings)
        for name, image in images.items():
            expected = deepskip.load(five).predict_proba(image, flips=place == "again")
            # Settings that make other outputs compute them again.
            found = np.load(tmp_path / f"out/probabilities/{name}.npy")
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"{place}, {name}")


def test_results_are_no_images_and_images_keep_their_names(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Objects with longer outlines than the server traces.
    monkeypatch.setattr(polygons, "MAX_SIDES", 7)
    for name in ("Zürich Nord.PNG", "a.jpg"):
        Image.fromarray(picture(60, 90, 3)).save(tmp_path / name)
    words = ["--model", three, "--polygons", "coco", "--overlays", "true"]
    run(*words, "--images", ".", "--out", "predictions")
    first = json.loads((tmp_path / "predictions" / "coco.json").read_text())
    assert sorted(image["file_name"] for image in first["images"]) == ["Zürich Nord.PNG", "a.jpg"]
    assert first["annotations"]
    run(*words, "--images", ".", "--out", "predictions")
    assert "2 of 2 images are done already" in capsys.readouterr().out
    run(*words, "--images", "Zürich Nord.PNG", "--out", "predictions")
    assert "1 of 1 images are done already" in capsys.readouterr().out
    run(*words, "--images", ".", "--out", "others")
    assert "2 of 2 images segmented" in capsys.readouterr().out
    # Another model cannot read an image that this one could.
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        run(*words, "--images", ".", "--out", "predictions", "--threshold", "0.4")
    last = json.loads((tmp_path / "predictions" / "coco.json").read_text())
    assert [image["file_name"] for image in last["images"]] == ["Zürich Nord.PNG"]
    assert sorted(path.name for path in (tmp_path / "predictions" / "masks").iterdir()) == ["Zürich Nord.png"]


def test_a_geotiff_keeps_its_place(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rasters, "WHOLE_BYTES", 0)
    image = picture(600, 700, 3)
    transform = Affine(0.5, 0, 432100, 0, -0.5, 5412300)
    profile = {"driver": "GTiff", "height": 600, "width": 700, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    with rasterio.open(tmp_path / "map.tif", "w", transform=transform, **profile, **tiles) as file:
        file.write(image.transpose(2, 0, 1))
    out = tmp_path / "out"
    run("--checkpoint", three, "--images", tmp_path / "map.tif", "--out", out, "--polygons", "geojson", *TILE)
    expected = deepskip.load(three).predict(image)
    with rasterio.open(out / "masks" / "map.tif") as file:
        assert file.crs == "EPSG:32633"
        assert file.transform == transform
        assert file.block_shapes == [(512, 512)]
        mask = file.read(1)
    assert (mask != expected).mean() < 1e-4
    # If rasterio draws the polygons onto the same map, they are the mask.
    found = json.loads((out / "polygons" / "map.geojson").read_text())
    assert found["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    drawn = rasterio.features.rasterize([f["geometry"] for f in found["features"]], (600, 700), transform=transform)
    np.testing.assert_array_equal(drawn, mask)
    _, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    assert len(found["features"]) == count > 20
    assert sum(f["properties"]["area"] for f in found["features"]) == mask.sum()


def test_a_fourth_band_is_no_transparency_for_a_model_of_four(three: Path, tmp_path: Path) -> None:
    image = picture(60, 80, 4)
    with rasterio.open(tmp_path / "x.tif", "w", driver="GTiff", height=60, width=80, count=4, dtype="uint8") as file:
        file.write(image.transpose(2, 0, 1))
        assert file.colorinterp[3].name == "alpha"
    for model, bands in ((save_model(tmp_path / "four", 4), 4), (three, 3)):
        run("--checkpoint", model, "--images", tmp_path / "x.tif", "--out", tmp_path / f"out{bands}")
        mask = tifffile.imread(tmp_path / f"out{bands}" / "masks" / "x.tif")
        np.testing.assert_array_equal(mask, deepskip.load(model).predict(image[..., :bands]))


def test_coco_of_whole_objects_across_tiles(five: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", picture(500, 260, 5))
    np.save(tmp_path / "y.npy", picture(60, 40, 5, seed=1))
    out = tmp_path / "out"
    run(
        "--checkpoint",
        five,
        "--images",
        tmp_path / "x.npy",
        tmp_path / "y.npy",
        "--out",
        out,
        "--polygons",
        "coco",
        *TILE,
    )
    coco = COCO(str(out / "coco.json"))
    assert {number: kind["name"] for number, kind in coco.cats.items()} == {1: "rust", 2: "dust"}
    for number, name in ((1, "x"), (2, "y")):
        mask = np.load(out / "masks" / f"{name}.npy")
        assert coco.imgs[number]["file_name"].startswith(name)
        drawn = np.zeros_like(mask)
        count = 0
        for annotation in coco.loadAnns(coco.getAnnIds(number)):
            here = coco.annToMask(annotation).astype(bool)
            assert here.sum() == annotation["area"]
            assert not drawn[here].any()
            drawn[here] = annotation["category_id"]
            count += 1
        np.testing.assert_array_equal(drawn, mask)
        assert count == sum(scipy.ndimage.label(mask == label, np.ones((3, 3)))[1] for label in (1, 2))


def test_shards_by_their_keys(three: Path, tmp_path: Path) -> None:
    pack_coins(tmp_path / "coins", {"val": 3})
    out = tmp_path / "out"
    run("--checkpoint", three, "--images", tmp_path / "coins" / "val", "--out", out, "--overlays", "false")
    index = load_index(tmp_path / "coins" / "val")
    segmenter = deepskip.load(three)
    keys = index.keys([0, 1, 2])
    for number, key in enumerate(keys):
        (tmp_path / "sample.png").write_bytes(sample_bytes(str(tmp_path / "coins" / "val"), number))
        image = np.asarray(Image.open(tmp_path / "sample.png"))
        mask = np.asarray(Image.open(out / "masks" / f"{key}.png"))
        np.testing.assert_array_equal(mask, segmenter.predict(image) * 255)
    assert not (out / "overlays").exists()


def test_shards_of_images_in_tiles(five: Path, tmp_path: Path) -> None:
    image = picture(100, 70, 5, np.uint16)
    write_shards([Sample("a", image, np.zeros((100, 70), np.uint8))], tmp_path / "val", num_classes=3, tile=32)
    run("--checkpoint", five, "--images", tmp_path / "val", "--out", tmp_path / "out", "--overlays", "false")
    found = tifffile.imread(tmp_path / "out" / "masks" / "a.tif")
    np.testing.assert_array_equal(found, deepskip.load(five).predict(image))


def test_urls(three: Path, tmp_path: Path, s3: Any) -> None:
    images = {name: picture(60, 80, 3, seed=seed) for seed, name in enumerate(("a", "b", "c"))}
    for name in ("a", "b"):
        Image.fromarray(images[name]).save(tmp_path / f"{name}.png")
        s3.put_file(str(tmp_path / f"{name}.png"), f"bucket/images/{name}.png")
    array = zarr.create_array(tmp_path / "c.zarr", shape=(60, 80, 3), chunks=(32, 32, 3), dtype="uint8")
    array[:] = images["c"]
    s3.put(str(tmp_path / "c.zarr"), "bucket/c.zarr", recursive=True)
    pack_coins(tmp_path / "coins", {"val": 1})
    s3.put(str(tmp_path / "coins" / "val"), "bucket/shards", recursive=True)
    out = tmp_path / "out"
    places = ["s3://bucket/images", "s3://bucket/c.zarr", "s3://bucket/shards"]
    run("--checkpoint", three, "--images", *places, "--out", out)
    segmenter = deepskip.load(three)
    for name in ("a", "b"):
        mask = np.asarray(Image.open(out / "masks" / f"{name}.png"))
        np.testing.assert_array_equal(mask, segmenter.predict(images[name]) * 255)
    np.testing.assert_array_equal(zarr.open_array(out / "masks" / "c.zarr")[:], segmenter.predict(images["c"]))
    run("--checkpoint", three, "--images", tmp_path / "coins" / "val", "--out", tmp_path / "here")
    (key,) = load_index(tmp_path / "coins" / "val").keys([0])
    assert (out / "masks" / f"{key}.png").read_bytes() == (tmp_path / "here" / "masks" / f"{key}.png").read_bytes()


def test_images_are_prepared_as_the_training_data_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "run", 4, normalize="dataset", longest_side=100)
    cube = picture(210, 150, 9, np.uint16)
    np.save(tmp_path / "cube.npy", cube)
    segmenter = deepskip.load(model)
    small, _ = resize_longest_side(resample_bands(cube, 4), None, 100)
    p = segmenter.predict_proba(small)[..., 0]
    expected = np.asarray(Image.fromarray(p).resize((150, 210), Image.Resampling.BILINEAR)) > 0.5
    arguments = ["--checkpoint", model, "--images", tmp_path / "cube.npy", "--overlays", "false"]
    run(*arguments, "--out", tmp_path / "whole")
    monkeypatch.setattr(rasters, "WHOLE_BYTES", 0)
    run(*arguments, "--out", tmp_path / "streamed")
    whole, streamed = (np.load(tmp_path / name / "masks" / "cube.npy") for name in ("whole", "streamed"))
    assert (whole != expected).mean() < 0.002
    # Bands are averaged before rows are shrunk in one case, and after in the other. Integers are rounded in between.
    assert (streamed != whole).mean() < 0.01


@pytest.mark.parametrize("longest_side", [None, 100])
def test_the_networks_bands_are_taken_of_each_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest_side: int | None
) -> None:
    told = {"chosen": [7, 0, 4, 3], "of": 9}
    model = save_model(tmp_path / "run", 4, longest_side=longest_side, **told)
    cube = picture(210, 150, 9, np.float32)
    np.save(tmp_path / "cube.npy", cube)
    expected = deepskip.load(model).predict_proba(cube)
    # The same network on these bands alone.
    alone = deepskip.load(save_model(tmp_path / "alone", 4, longest_side=longest_side))
    np.testing.assert_allclose(expected, alone.predict_proba(cube[..., [7, 0, 4, 3]]), atol=1e-5)
    arguments = ["--checkpoint", model, "--images", tmp_path / "cube.npy", "--overlays", "false", *TILE]
    for name in ("whole", "streamed"):
        run(*arguments, "--out", tmp_path / name, "--probabilities", "true")
        found = np.load(tmp_path / name / "probabilities" / "cube.npy")
        np.testing.assert_allclose(found, expected[..., 0], atol=1e-4)
        monkeypatch.setattr(rasters, "WHOLE_BYTES", 0)


def test_bad_images_are_named_and_the_rest_goes_on(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(picture(40, 40, 3)).save(images / "good.png")
    (images / "cut.png").write_bytes((images / "good.png").read_bytes()[:300])
    np.save(images / "bands.npy", picture(40, 40, 4))
    monkeypatch.setattr(rasters, "WHOLE_BYTES", 0)
    hole = picture(300, 300, 3, np.float32)
    hole[250, 17] = np.nan
    np.save(images / "hole.npy", hole)
    (images / "text.tif").write_text("no image")
    (images / "empty.zarr").mkdir()
    with pytest.raises(SystemExit) as ended:
        run("--checkpoint", three, "--images", images, "--out", tmp_path / "out", *TILE)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "1 of 6 images segmented" in said.out
    for part in (
        "cut.png the png file does not decode",
        "bands.npy has 4 bands; the model takes 3",
        "hole.npy has values that are nan or infinite in rows",
        "text.tif the tif file does not decode",
        "empty.zarr is not a readable Zarr array",
        "5 of 6 images could not be segmented",
    ):
        assert part in said.err, said.err
    written = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(written) == ["good.json", "good.png", "good.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "nowhere"], "--images: nowhere does not exist"),
        (["--images", "empty"], "--images: empty holds no images (png, jpg"),
        (["--images", "twins"], "would both be written to a"),
        (["--checkpoint", "twins", "--images", "one"], "model: twins holds no checkpoint"),
        (["--images", "one", "--tile", "64"], "--tile is 64; with this model it must be 128 or more"),
        (["--images", "one", "--out", "s3://bucket/out"], "out is s3://bucket/out; it must be a folder"),
        (["--images", "one", "--out", "./one"], "error: --out: one is the folder of the images"),
        (["--images", "one", "--threshold", "2"], "threshold is 2.0; it must be 0 to 1"),
        (["--images", "one", "--polygons", "svg"], "polygons"),
        (["--images", "one", "--tiles", "64"], "unknown setting tiles"),
    ],
)
def test_bad_settings_are_said(
    three: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, names in (("empty", []), ("twins", ["a.png", "a.jpg"]), ("one", ["a.png"])):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(picture(20, 20, 3)).save(tmp_path / folder / name)
    with pytest.raises(SystemExit) as ended:
        run("--checkpoint", three, "--out", "out", *arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
