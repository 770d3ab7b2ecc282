"""The examples run at toy size, and do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
pytestmark = pytest.mark.pages


def run(folder: Path, *words: str | Path) -> str:
    variables = os.environ | {"PYTHONPATH": str(EXAMPLES.parents[1]), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def test_own_folder_and_polygons_of_a_map(folder: Path) -> None:
    run(folder, EXAMPLES / "make_images.py")
    assert "validation IoU" in run(folder, EXAMPLES / "own_folder.py", "2")
    printed = run(folder, EXAMPLES / "geotiff_to_polygons.py", "runs/own", "new/field.tif", "field.geojson")
    collection = json.loads((folder / "field.geojson").read_text())
    assert printed.startswith(f"{len(collection['features'])} polygons")
    # In UTM zone 33, the raster lies between these: 896 x 640 pixels of 0.5 m.
    for feature in collection["features"]:
        east, north = np.array(feature["geometry"]["coordinates"][0]).T
        assert ((east >= 500_000) & (east <= 500_448)).all()
        assert ((north <= 5_200_000) & (north >= 5_199_680)).all()


def test_cubes(folder: Path) -> None:
    run(folder, EXAMPLES / "make_cubes.py")
    with np.load(folder / "cubes" / "000.npz") as file:
        assert file["cube"].shape == (64, 64, 200)
        # Targets have an absorption line: bands 90 to 97 against those at its sides.
        side = file["cube"][..., [88, 89, 98, 99]].mean(-1)
        depth = 1 - file["cube"][..., 90:98].mean(-1) / side
        assert depth[file["mask"] == 1].mean() > 0.2 > depth[file["mask"] == 0].mean()
    assert "mean probability: targets" in run(folder, EXAMPLES / "many_bands.py", "2")


def test_kernels_in_another_network(folder: Path) -> None:
    losses = [float(line.split()[3]) for line in run(folder, EXAMPLES / "kernels_in_another_network.py").splitlines()]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.2


def test_script_and_notebook_of_coins(folder: Path) -> None:
    assert "of the photograph are coins" in run(folder, EXAMPLES / "train_coins.py", "2")
    cells = json.loads((EXAMPLES / "coins.ipynb").read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = folder / "notebook.py"
    script.write_text(
        source.replace("STEPS = 300", "STEPS = 2") + "\nprint(probability.shape, summary['val']['iou'])\n"
    )
    assert "(101, 128)" in run(folder, script)
