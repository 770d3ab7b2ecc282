import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tifffile
from PIL import Image

from deepskip.data_shards.command_line import main
from deepskip.data_shards.sources.split import PackError
from deepskip.data_shards.survey import Survey
from tests.field import page
from tests.field.cases import CASES, gap
from tests.field.folders import packed, scene, write


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of(name: str, tmp_path: Path) -> None:
    CASES[name][3](tmp_path)


def test_the_page_has_what_is_tried() -> None:
    assert f"{page.BEGIN}\n{page.table()}\n{page.END}" in page.PAGE.read_text(), "python -m tests.field.page"


def test_a_folder_of_all_of_it_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, lambda path, made: gap(path, made, int(path.name) < 3), count=6, height=64, width=80)
    flagged = np.dstack([scene(9)[0][..., :2], np.full((64, 80), 255, np.uint8)])
    tifffile.imwrite(
        tmp_path / "i" / "9.tif", flagged, photometric="minisblack", planarconfig="contig", extrasamples=[0, 2]
    )
    Image.fromarray(scene(9)[1] * 255).save(tmp_path / "m" / "9.png")
    tifffile.imwrite(
        tmp_path / "i" / "8.tif",
        np.moveaxis(scene(8)[0][..., :2], 2, 0),
        photometric="miniswhite",
        planarconfig="separate",
    )
    Image.fromarray(scene(8)[1] * 255).save(tmp_path / "m" / "8.png")
    for name in ("._a.tif", "notes.txt", "a.xml", "b.xml", "scan.nii.gz"):
        (tmp_path / "i" / name).touch()
    (tmp_path / "m" / "old").mkdir()
    main(
        [
            "pack",
            "folder",
            "--images",
            f"{tmp_path / 'i'}",
            "--masks",
            f"{tmp_path / 'm'}",
            "--out",
            f"{tmp_path / 'o'}",
        ]
    )
    said = capsys.readouterr().out
    for words in (
        "skipped, since they are not", "2 .xml", "1 .nii.gz", "1 hidden files", "1 folders",
        "transparency of 1 images is dropped", "1 of 8 images declare that 0 is white",
        "no data, as declared by the files: -9999 in 3 images", "of all pixels have no value",
        "warning: -9999 in 3 images looks like a no-data value",
    ):  # fmt: skip
        assert words in said
    assert len(said.splitlines()) < 30


@pytest.mark.parametrize("ending", ["mat", "webp"])
def test_the_command_that_converts_does(tmp_path: Path, ending: str) -> None:
    write(tmp_path, lambda path, made: None)
    for key in "0123":
        path = tmp_path / "i" / f"{key}.{ending}"
        if ending == "mat":
            scipy.io.savemat(path, {"cube": scene(int(key))[0]})
        else:
            Image.fromarray(scene(int(key))[0]).save(path, lossless=True)
    with pytest.raises(PackError) as error:
        packed(tmp_path)
    code = str(error.value).partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "i", check=True)
    for key, (image, mask) in packed(tmp_path)[0].items():
        np.testing.assert_array_equal(image, scene(int(key))[0])
        np.testing.assert_array_equal(mask, scene(int(key))[1])


def test_findings_of_several_processes_are_counted_together() -> None:
    # nan does not equal itself, and unpickling makes another object of it.
    found = Survey()
    for _ in range(3):
        one = Survey()
        one.tagged[math.nan] += 1
        one.tagged[-9999.0] += 2
        found.merge(pickle.loads(pickle.dumps(one)))
    assert len(found.tagged) == 2
    assert sorted(found.tagged.values()) == [3, 6]
