"""Tiles and batches fit the memory: estimates against budgets, and the case of an estimate that is too small."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import deepskip
from deepskip.inference import Segmenter
from deepskip.jobs import predict
from deepskip.jobs.prediction.memory import bytes_per_pixel, measured_bytes_per_pixel, plan
from deepskip.jobs.prediction.options import Options
from deepskip.jobs.prediction.segment import PredictionWorker
from tests.jobs.prediction.models import save_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[3]


def segmenter_of(bands: int, **settings: Any) -> Segmenter:
    network = deepskip.DeepSkipUNet(bands, 1, **settings)
    return Segmenter(network, 1, "image", [0.0] * bands, [1.0] * bands).eval()


def test_tiles_fit_the_budget() -> None:
    network = segmenter_of(8)
    for memory_gb in (0.5, 1, 2, 4):
        found = plan(network, Options(memory_gb=memory_gb), torch.device("cpu"))
        assert found.tile % 16 == 0
        assert found.tile**2 * bytes_per_pixel(network, 4) <= memory_gb * 1e9
        # Stripes span a wide raster, so tiles get smaller for it.
        wide = found.tile_of(200_000, 40)
        assert wide == 352 or wide * 200_000 * 40 <= memory_gb * 1e9 / 4
        assert found.tile_of(2000, 40) == found.tile
    assert plan(network, Options(memory_gb=1000), torch.device("cpu")).tile == 2048
    many = segmenter_of(207)
    once, flipped = (plan(many, Options(memory_gb=1, flips=flips), torch.device("cpu")) for flips in (False, True))
    # Measured with flips: 4,138 bytes a pixel.
    assert 352 < flipped.tile < once.tile
    assert flipped.tile**2 * 4138 <= 0.75e9
    enlarged = segmenter_of(8, enlarge=2)
    assert bytes_per_pixel(enlarged, 4) > 4 * bytes_per_pixel(network, 4)
    # Measured with 3 bands: 2,787 bytes a pixel.
    assert 2787 * plan(enlarged, Options(memory_gb=1), torch.device("cpu")).tile ** 2 <= 0.75e9
    assert plan(enlarged, Options(memory_gb=1000), torch.device("cpu")).tile == 1024
    assert plan(network, Options(tile=512, batch=3), torch.device("cpu")).tile == 512


def test_what_other_networks_have_alive_is_measured() -> None:
    """Count two maps of 8 and 4 channels in fp32, next to the image; views and in-place operations are free."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.Flatten(2))
    segmenter = Segmenter(network, 4, "none", [0.0] * 3, [1.0] * 3)
    assert measured_bytes_per_pixel(segmenter) == 1.5 * 4 * (8 + 4)


def test_too_little_memory_makes_batches_and_tiles_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    model = save_model(tmp_path / "run", 3)
    rng = np.random.default_rng(0)
    images = {f"s{i}": rng.integers(0, 256, (60, 80, 3)).astype(np.uint8) for i in range(9)}
    images["large"] = rng.integers(0, 256, (300, 310, 3)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
    original = PredictionWorker.logits
    seen: list[int] = []

    def limited(self: PredictionWorker, image_NCHW: Tensor) -> Tensor:
        seen.append(image_NCHW[:, 0].numel())
        if seen[-1] > 20_000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, image_NCHW)

    monkeypatch.setattr(PredictionWorker, "logits", limited)
    out = tmp_path / "out"
    predict.main(["--checkpoint", str(model), "--images", str(tmp_path / "images"), "--out", str(out), "--tile", "256"])
    assert sum(pixels > 20_000 for pixels in seen) >= 3
    segmenter = deepskip.load(model)
    for name, image in images.items():
        np.testing.assert_array_equal(
            np.asarray(Image.open(out / "masks" / f"{name}.png")), segmenter.predict(image) * 255
        )


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    model = save_model(tmp_path / "run", 3)
    side = 3000
    rows = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint16, shape=(side, side, 3))
    rows[:] = np.random.default_rng(0).integers(0, 4000, (side, 1, 3))
    del rows

    def peak(*arguments: str) -> int:
        """Run Python and return its peak resident memory in bytes."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        variables.pop("RAY_ADDRESS", None)
        process = subprocess.Popen([sys.executable, *arguments], env=variables, cwd=tmp_path)
        _, status, used = os.wait4(process.pid, 0)
        # Popen must not wait for it again.
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_maxrss * 1024

    idle = peak("-c", "import jobs.predict, jobs.prediction.segment, torch; torch.ones(9).sum()")
    command = [
        "-m",
        "deepskip.jobs.predict",
        "--checkpoint",
        str(model),
        "--images",
        "x.npy",
        "--out",
        "out",
        "--memory_gb",
        "0.15",
    ]
    used = peak(*command) - idle
    # The image alone has 108 MB in fp32, and the network's maps of the whole image ten times as much.
    assert used < 0.2e9, used
    assert np.load(tmp_path / "out" / "masks" / "x.npy", mmap_mode="r").shape == (side, side)
