"""Predictions resume after a stop: no half-written file looks done, and no whole file is made twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

import deepskip
from deepskip.jobs import predict
from tests.jobs.prediction.models import save_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[3]
IMAGES = 500


def pictures(folder: Path, count: int) -> dict[str, np.ndarray]:
    """Write small images of two sizes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    found = {f"{i:04d}": rng.integers(0, 256, (24, 20 + 4 * (i % 2), 3)).astype(np.uint8) for i in range(count)}
    for name, image in found.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    return found


def files_of(out: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of each mask that has its final name."""
    return {p.stem: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (out / "masks").glob("[!.]*.png")}


def test_a_killed_prediction_goes_on(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", IMAGES)
    model, out = save_model(tmp_path / "run", 3), tmp_path / "out"
    options = [
        "--checkpoint",
        model,
        "--images",
        tmp_path / "images",
        "--out",
        out,
        "--overlays",
        "false",
        "--workers",
        "0",
    ]
    command = [sys.executable, "-m", "deepskip.jobs.predict", *map(str, options)]
    # Threads that wait for each other take ten times as long on a busy machine.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=variables, cwd=tmp_path)
    while len(files_of(out)) < IMAGES // 4:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = files_of(out)
    assert IMAGES // 4 <= len(before) < IMAGES
    # A kill during a write leaves such a file.
    (out / "masks" / ".0499.png.0badcafe.part").write_bytes(b"half")
    assert subprocess.run(command, env=variables, cwd=tmp_path, check=False).returncode == 0
    after = files_of(out)
    assert {name: after[name] for name in before} == before
    segmenter = deepskip.load(model)
    assert sorted(after) == sorted(images)
    for name, image in images.items():
        np.testing.assert_array_equal(
            np.asarray(Image.open(out / "masks" / f"{name}.png")), segmenter.predict(image) * 255
        )
    assert not list(out.rglob(".*.part"))


def test_what_another_model_made_or_another_image_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    images = pictures(tmp_path / "images", 4)
    out = tmp_path / "out"

    def done(model: Path, *options: str) -> int:
        predict.main(["--checkpoint", str(model), "--images", str(tmp_path / "images"), "--out", str(out), *options])
        last = capsys.readouterr().out.splitlines()[-1]
        return 0 if last == "4 of 4 images are done already" else int(last.split(" of ")[0])

    one, two = (save_model(tmp_path / f"run{seed}", 3, seed=seed) for seed in (1, 2))
    assert done(one) == 4
    assert done(one) == 0
    # One mask is cut, one is removed, one note is half written, and one image has changed.
    (out / "masks" / "0000.png").write_bytes(b"half")
    (out / "masks" / "0001.png").unlink()
    (out / "done" / "0002.json").write_text('{"made_by"')
    Image.fromarray(images["0000"]).save(tmp_path / "images" / "0003.png")
    assert done(one) == 4
    assert done(one, "--threshold", "0.7") == 4
    assert done(two) == 4
    assert done(two) == 0
    mask = np.asarray(Image.open(out / "masks" / "0001.png"))
    np.testing.assert_array_equal(mask, deepskip.load(two).predict(images["0001"]) * 255)
    # A world file belongs to its image, and the mask's to the mask.
    world, copy = tmp_path / "images" / "0001.wld", out / "masks" / "0001.pgw"
    for x in (500000, 700000):
        world.write_text(f"2\n0\n0\n-2\n{x}\n4000000\n")
        assert done(two) == 1
        assert [float(line) for line in copy.read_text().split()] == [2, 0, 0, -2, x, 4000000]
    copy.unlink()
    assert done(two) == 1
    world.unlink()
    assert done(two) == 1
    assert not copy.exists()


def test_over_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    images = pictures(tmp_path / "images", 30)
    np.save(
        tmp_path / "images" / "large.npy", np.random.default_rng(1).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    )
    (tmp_path / "images" / "broken.png").write_bytes(b"nothing")
    model, out = save_model(tmp_path / "run", 3), tmp_path / "out"
    options = ["--workers", "2", "--cpus_per_worker", "0.5", "--tile", "128", "--polygons", "coco"]
    monkeypatch.chdir(tmp_path)
    arguments = ["--checkpoint", str(model), "--images", "images", "--out", "out", *options]
    try:
        with pytest.raises(SystemExit) as ended:
            predict.main(arguments)
    finally:
        ray.shutdown()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "31 of 32 images segmented" in said.out
    assert "broken.png the png file does not decode" in said.err
    segmenter = deepskip.load(model)
    for name, image in images.items():
        np.testing.assert_array_equal(
            np.asarray(Image.open(out / "masks" / f"{name}.png")), segmenter.predict(image) * 255
        )
    assert (out / "coco.json").is_file()
