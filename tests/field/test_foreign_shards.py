"""Shards of other tools are read like folders, as the index says, by all readers."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from deepskip.data_shards.command_line import main
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.inspection import contents, preview, verify
from deepskip.data_shards.labels import Values
from deepskip.data_shards.pictures import Reading
from tests.field.folders import Scene, iou, scene


def tif(image: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


def picture(array: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def shard(folder: Path, image: Any, mask: Any) -> dict[str, Scene]:
    """Write a shard of three samples, whose image and mask are (ending, function of the scene)."""
    folder.mkdir()
    made = {f"k{n}": scene(n) for n in range(3)}
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key, found in made.items():
            for ending, data in ((image[0], image[1](found)), (mask[0], mask[1](found))):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return made


def read(folder: Path) -> dict[str, Scene]:
    shards = Shards(folder)
    assert list(verify(folder)) == []
    items = [(entry.key, shards.whole(entry)) for entry in shards.index.entries([0, 1, 2])]
    return {key: (item.image, item.mask) for key, item in items}


def index(folder: Path, *words: str) -> None:
    main(["index", str(folder), "--workers", "1", *words])


def test_transparency_and_lossy_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    four = ("tif", lambda found: tif(np.dstack([found[0], found[0][..., 0]]), photometric="rgb", extrasamples=[2]))
    made = shard(folder, four, ("mask.jpg", lambda found: picture(found[1] * 255, "JPEG", quality=75)))
    with pytest.raises(SystemExit):
        index(folder)
    assert "--threshold 128" in capsys.readouterr().err
    index(folder, "--threshold", "128")
    assert "a band flagged as transparency in 3 images is kept: in 3 it holds data" in capsys.readouterr().out
    found = load_index(folder)
    assert (found.bands, found.reading) == (4, Reading("keep"))
    assert found.labels is not None
    assert found.labels.values == Values(threshold=128)
    stacked = np.concatenate([found_image.reshape(-1, 3) for found_image, _ in made.values()])
    np.testing.assert_allclose(found.mean, [*stacked.mean(0), stacked[:, 0].mean()])
    for key, (image, mask) in read(folder).items():
        np.testing.assert_array_equal(image[..., :3], made[key][0])
        assert iou(mask, made[key][1]) > 0.97
    index(folder, "--threshold", "128", "--alpha", "drop")
    assert {image.shape[2] for image, _ in read(folder).values()} == {3}
    np.testing.assert_allclose(load_index(folder).mean, stacked.mean(0))


@pytest.mark.parametrize("tag", [True, False])
def test_no_values(tmp_path: Path, tag: bool) -> None:
    def image(found: Scene) -> bytes:
        grey = found[0][..., :2].astype(np.int16)
        grey[:, :20] = -9999
        tags = [(42113, "s", 0, "-9999", True)] if tag else []
        return tif(grey, photometric="minisblack", planarconfig="contig", extratags=tags)

    folder = tmp_path / "set"
    made = shard(folder, ("tif", image), ("png", lambda found: picture(found[1] * 255, "PNG")))
    index(folder, *([] if tag else ["--nodata", "-9999"]))
    seen = np.concatenate([found[:, 20:, :2].reshape(-1, 2) for found, _ in made.values()]).astype(np.float64)
    found = load_index(folder)
    np.testing.assert_allclose(found.mean, seen.mean(0))
    np.testing.assert_allclose(found.std, seen.std(0))
    assert found.preparation.get("nodata") == (None if tag else -9999)
    for key, (pixels, mask) in read(folder).items():
        assert (mask[:, :20] == 255).all()
        np.testing.assert_array_equal(mask[:, 20:], made[key][1][:, 20:])
        np.testing.assert_allclose(pixels[0, 0], made[key][0][:, 20:, :2].mean((0, 1)), rtol=1e-5)
    assert contents(folder).pixels[255] == 3 * 64 * 20
    preview(folder, tmp_path / "sheet.png", 3)


def test_orientation_and_white_is_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x112] = 3
    folder = tmp_path / "set"
    made = shard(
        folder,
        ("jpg", lambda found: picture(found[0], "JPEG", quality=95, exif=exif)),
        ("mask.tif", lambda found: tif(255 - found[1] * 255, photometric="miniswhite")),
    )
    with pytest.raises(SystemExit):
        index(folder, "--white_is_zero", "invert")
    assert "--orientation apply" in capsys.readouterr().err
    index(folder, "--white_is_zero", "invert", "--orientation", "ignore")
    for key, (pixels, mask) in read(folder).items():
        np.testing.assert_array_equal(mask, made[key][1])
        assert pixels[mask == 1].mean() > 150
    index(folder, "--white_is_zero", "invert", "--orientation", "apply")
    assert all(pixels[np.rot90(mask, 2) == 1].mean() > 150 for pixels, mask in read(folder).values())
