"""A person drops an image on the page, in a real browser: `make test-browser`."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser import chromium, drop
from tests.jobs.bad_requests import npy, picture, png
from tests.jobs.serving import Server, serving

pytestmark = pytest.mark.browser

WORD = "20-letters-or-so-long"
# This script reads the pixels of the picture that is shown.
PIXELS = """() => {
  const picture = document.getElementById("picture"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  return [canvas.height, canvas.width, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page"), token=WORD) as started:
        yield started


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with chromium() as browser:
        opened = browser.new_page()
        faults: list[str] = []
        opened.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        opened.on("pageerror", lambda error: faults.append(str(error)))
        elsewhere: list[str] = []
        opened.on("request", lambda request: elsewhere.append(request.url))
        opened.goto(f"http://127.0.0.1:{server.port}/")
        opened.faults = faults
        yield opened
        own = (f"http://127.0.0.1:{server.port}/", "blob:", "data:")
        assert all(url.startswith(own) for url in elsewhere), elsewhere


def test_an_image_is_dropped_and_its_overlay_seen(page: Any, server: Server, tmp_path: Path) -> None:
    image = picture(90, 120, seed=4)
    page.fill("#token", WORD)
    said = drop(page, png(image), "blobs.png")
    right = {"Authorization": f"Bearer {WORD}"}
    expected = server.predict(png(image), "overlay", **right)
    assert said.startswith(f"blobs.png: {expected.headers['deepskip-objects']} object")
    page.evaluate("() => document.getElementById('picture').decode()")
    assert page.locator("#picture").is_visible()
    height, width, values = page.evaluate(PIXELS)
    shown = np.array(values, np.uint8).reshape(height, width, 4)[..., :3]
    np.testing.assert_array_equal(shown, np.asarray(Image.open(io.BytesIO(expected.body))))
    assert (shown != image).any()
    # The saved file is what the server returns.
    for button, name in (("#mask", "blobs.mask.png"), ("#polygons", "blobs.geojson")):
        with page.expect_download() as saving:
            page.click(button)
        assert saving.value.suggested_filename == name
        saving.value.save_as(tmp_path / name)
    mask = np.asarray(Image.open(tmp_path / "blobs.mask.png"))
    assert mask.shape == (90, 120)
    assert len(json.loads((tmp_path / "blobs.geojson").read_text())["features"]) == int(
        expected.headers["deepskip-objects"]
    )
    # This file is of a kind that no browser shows.
    assert drop(page, npy(picture(30, 40)), "array.npy").startswith("array.npy: ")
    assert page.faults == []


def test_the_page_says_what_is_wrong(page: Any) -> None:
    # The browser itself logs answers of 400 and more.
    assert "401: the token is missing" in drop(page, png(picture()), "blobs.png")
    page.fill("#token", WORD)
    assert "422: the image: has 5 bands; the model takes 3" in drop(page, npy(picture(bands=5)), "cube.npy")
    assert "415" in drop(page, b"<svg onload=alert(1)>", "<img src=x onerror=alert(1)>.png")
    assert page.locator("#picture").is_hidden()
    assert all("Failed to load resource" in fault for fault in page.faults), page.faults
