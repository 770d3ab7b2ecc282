"""Outlines lie at their place on a map, and have its description, as in rasterio."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine

from deepskip.jobs import predict
from tests.jobs.prediction.models import save_model
from tests.jobs.prediction.test_predict import picture

pytestmark = pytest.mark.usefixtures("one_thread")
PLACE = Affine(0.5, 0.1, 500000.0, 0.05, -0.5, 5600000.0)
LAEA = CRS.from_proj4("+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84 +units=m")


@pytest.fixture(autouse=True)
def without_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def geotiff(path: Path, image: np.ndarray, **place: Any) -> None:
    H, W, _ = image.shape
    gcps = place.pop("gcps", None)
    with rasterio.open(
        path, "w", driver="GTiff", width=W, height=H, count=3, dtype="uint8", photometric="RGB", **place
    ) as file:
        if gcps:
            file.gcps = gcps
        file.write(np.moveaxis(image, 2, 0))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_outlines_lie_on_their_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, images = picture(60, 80, 3), tmp_path / "images"
    images.mkdir()
    geotiff(images / "code.tif", image, crs="EPSG:32633", transform=PLACE)
    geotiff(images / "words.tif", image, crs=LAEA, transform=PLACE)
    geotiff(images / "none.tif", image, transform=PLACE)
    corners = [(0, 0), (0, 80), (60, 0), (60, 80)]
    points = [GroundControlPoint(r, c, *(PLACE * (c, r))) for r, c in corners]
    geotiff(images / "points.tif", image, gcps=(points, CRS.from_epsg(32633)))
    x, y = PLACE * (0.5, 0.5)
    for name, ending in (("world.tif", "tfw"), ("picture.png", "pgw"), ("other.png", "wld")):
        Image.fromarray(image).save(images / name)
        text = "\n".join(map(str, (PLACE.a, PLACE.d, PLACE.b, PLACE.e, x, y)))
        (images / name).with_suffix(f".{ending}").write_text(text)
    words = ["--images", images, "--out", tmp_path / "out", "--polygons", "geojson", "--overlays", "false"]
    predict.main([str(word) for word in ("--model", save_model(tmp_path / "run", 3), *words)])
    said = capsys.readouterr().out
    names = ("code", "words", "none", "points", "world", "picture", "other")
    found = {name: json.loads((tmp_path / "out" / "polygons" / f"{name}.geojson").read_text()) for name in names}

    def ring(name: str) -> np.ndarray:
        geometry = found[name]["features"][0]["geometry"]
        rings = geometry["coordinates"] if geometry["type"] == "Polygon" else geometry["coordinates"][0]
        return np.array(sorted(map(tuple, rings[0])))

    pixels = ring("points")
    expected = np.array(sorted(PLACE * (x, y) for x, y in pixels))
    for name in names:
        if name != "points":
            np.testing.assert_allclose(ring(name), expected, rtol=1e-9, err_msg=name)
    assert found["code"]["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    assert CRS.from_user_input(found["words"]["crs"]["properties"]["name"]) == LAEA
    assert all("crs" not in found[name] for name in ("none", "points", "world", "picture", "other"))
    assert "note: 3 images, such as other: each is georeferenced by a world file" in said
    assert "note: 1 images, such as none: each is georeferenced but names no coordinate system" in said
    assert "note: 1 images, such as points: each is georeferenced by ground control points only" in said
    for name in ("code", "words", "none", "world"):
        with rasterio.open(tmp_path / "out" / "masks" / f"{name}.tif") as mask:
            np.testing.assert_allclose(tuple(mask.transform)[:6], tuple(PLACE)[:6], rtol=1e-12, err_msg=name)
    with rasterio.open(tmp_path / "out" / "masks" / "words.tif") as mask:
        assert mask.crs == LAEA
    with rasterio.open(tmp_path / "out" / "masks" / "picture.png") as mask:
        np.testing.assert_allclose(tuple(mask.transform)[:6], tuple(PLACE)[:6], rtol=1e-12)
