"""Each image's statistics lie in the index; indexes of earlier versions have none, and are upgraded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from deepskip.data_shards import dataset, indexing, upgrading
from deepskip.data_shards.command_line import main
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.entries import SCHEMA
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.index import BrokenIndex, load_index, save_index
from deepskip.data_shards.order import Slot
from deepskip.data_shards.percentiles import PixelSample, centre_and_scale
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards

SLOTS = [Slot(0, i, 1) for i in range(7)]


def packed(folder: Path, dtype: type) -> np.ndarray:
    images: np.ndarray = (np.random.default_rng(0).random((7, 24, 20, 4)) * 250).astype(dtype)
    if dtype == np.float32:
        images[2, 3, 4, 1] = images[3, :20, :, 2] = np.nan
    masks = (np.random.default_rng(1).random((7, 24, 20)) < 0.1).astype(np.uint8)
    samples = (Sample(f"s{i}", image, mask) for i, (image, mask) in enumerate(zip(images, masks, strict=True)))
    write_shards(samples, folder, num_classes=1, samples_per_shard=3, preparation={"bands": None, "longest_side": 24})
    return images


def downgrade(folder: Path) -> None:
    """Make an index as version 2 wrote it."""
    index = load_index(folder)
    save_index(replace(index, samples=index.samples.select(SCHEMA.names)), folder)
    raw = json.loads((folder / "index.json").read_text())
    del raw["percentiles"]
    (folder / "index.json").write_text(json.dumps(raw | {"version": 2}))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_statistics_by_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    images = packed(tmp_path / "train", dtype)
    flat = images.reshape(7, -1, 4).astype(np.float64)
    expected = np.nanmean(flat, 1), np.nanstd(flat, 1)
    for crops in (None, Crops(16, 0.5, 0), Crops(16, 0.5, 0, 0.5)):
        with monkeypatch.context() as patch:
            # No image is measured at training.
            patch.setattr(dataset, "band_statistics", None)
            found = Shards(tmp_path / "train", "image", crops)[SLOTS]
        for values, wanted in zip((found["mean"], found["std"]), expected, strict=True):
            np.testing.assert_allclose(values, wanted, rtol=1e-6, atol=1e-6)
        chosen = Shards(tmp_path / "train", "image", crops, bands=[3, 1])[SLOTS]
        np.testing.assert_array_equal(chosen["mean"], found["mean"][:, [3, 1]])
        # Computed at training, as before, they are the same numbers.
        whole = Shards(tmp_path / "train", "image", crops)
        whole.index = replace(whole.index, samples=whole.index.samples.select(SCHEMA.names))
        assert not whole.index.has_statistics
        for name, values in whole[SLOTS].items():
            np.testing.assert_array_equal(values, found[name])  # type: ignore[literal-required]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_older_index_is_upgraded(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    packed(tmp_path / "train", np.float32)
    before = load_index(tmp_path / "train")
    downgrade(tmp_path / "train")
    older = load_index(tmp_path / "train")
    assert (older.has_statistics, identity_of(older)) == (False, identity_of(before))
    batch = Shards(tmp_path / "train")[SLOTS]
    main(["index", str(tmp_path / "train"), "--workers", workers])
    assert "is of an earlier version: adding the statistics of each image" in capsys.readouterr().out
    now = load_index(tmp_path / "train")
    # nan is not equal to itself.
    assert replace(now, reading=before.reading) == before
    assert identity_of(now) == identity_of(before)
    for name, values in Shards(tmp_path / "train")[SLOTS].items():
        np.testing.assert_array_equal(values, batch[name])  # type: ignore[literal-required]
    # An index made anew has the same numbers.
    main(["index", str(tmp_path / "train"), "--workers", workers, "--labels", "binary", "--nodata", "nan"])
    assert load_index(tmp_path / "train").samples == before.samples


@pytest.mark.parametrize("older", [False, True])
def test_shards_of_more_values_than_are_kept_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    images = packed(tmp_path / "train", np.uint8)
    monkeypatch.setattr(upgrading if older else indexing, "SHARD_VALUES", 1000)
    if older:
        downgrade(tmp_path / "train")
    main(["index", str(tmp_path / "train"), "--workers", "1", *([] if older else ["--labels", "binary"])])
    low, middle, high = np.percentile(images.reshape(-1, 4), [2, 50, 98], axis=0)
    np.testing.assert_allclose(load_index(tmp_path / "train").percentiles, [low, middle, high], atol=12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_percentiles_by_numpy(tmp_path: Path, dtype: type) -> None:
    images = packed(tmp_path / "train", dtype)
    flat = images.reshape(-1, 4).astype(np.float64)
    low, middle, high = np.nanpercentile(flat, [2, 50, 98], axis=0)
    index = load_index(tmp_path / "train")
    np.testing.assert_allclose(index.percentiles, [low, middle, high], rtol=1e-6)
    main(["index", str(tmp_path / "train"), "--workers", "2", "--labels", "binary", "--nodata", "nan"])
    np.testing.assert_allclose(load_index(tmp_path / "train").percentiles, [low, middle, high], rtol=1e-6)
    batch = Shards(tmp_path / "train", "robust", bands=[2, 0])[SLOTS]
    # The 98th percentile of a normal distribution lies 2.0537 standard deviations above its mean.
    np.testing.assert_allclose(batch["mean"], [middle[[2, 0]]] * 7, rtol=1e-6)
    np.testing.assert_allclose(batch["std"], [(high - low)[[2, 0]] / 4.1075] * 7, rtol=1e-4)
    downgrade(tmp_path / "train")
    with pytest.raises(ValueError, match=r"index of .*train has no percentiles; add them: deepskip index"):
        Shards(tmp_path / "train", "robust")


@pytest.mark.parametrize("first_limit", [3000, 10**6])
def test_percentiles_of_more_pixels_than_are_kept(first_limit: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(5, 2, (30, 50, 40, 3)) * [1, 2, 3]
    whole, parts = PixelSample(6000), PixelSample(6000)
    for image in images:
        whole.add(image)
    # Exactly every k-th pixel, over the borders of images.
    np.testing.assert_array_equal(np.concatenate(whole.pixels), images.reshape(-1, 3)[:: whole.step].astype(np.float32))
    assert whole.step == 32
    for first in range(0, 30, 7):
        one = PixelSample(3000 if first else first_limit)
        for image in images[first : first + 7]:
            one.add(image)
        parts.merge(one)
    assert parts.seen == whole.seen == 60_000
    assert sum(part.size for part in parts.pixels) <= 6000
    for found in (whole, parts):
        centre, scale = centre_and_scale(found.percentiles())
        np.testing.assert_allclose(centre, [5, 10, 15], rtol=0.05)
        np.testing.assert_allclose(scale, [2, 4, 6], rtol=0.1)


def test_spikes_do_not_count() -> None:
    kept = PixelSample()
    image = np.random.default_rng(0).normal(100, 10, (100, 100, 2))
    image[:10, :10, 1] = 65535
    kept.add(image)
    (_, centre), (_, scale) = centre_and_scale(kept.percentiles())
    assert (abs(centre - 100) < 1, abs(scale - 10) < 2) == (True, True)
    assert image[..., 1].std() > 6000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p2": [1.0] * 3}, "percentiles.p2 is"), ({"p50": [float("nan")] * 4}, "percentiles.p50 is"),
        ({"p98": [-1e9] * 4}, "do not rise"), ({"p99": [1.0] * 4}, "missing or unknown: p99"), ({"p2": "x"}, "p2 is 'x'"),
    ],
)  # fmt: skip
def test_percentiles_that_are_none(tmp_path: Path, change: dict[str, object], said: str) -> None:
    packed(tmp_path / "train", np.uint8)
    raw = json.loads((tmp_path / "train" / "index.json").read_text())
    raw["percentiles"] |= change
    (tmp_path / "train" / "index.json").write_text(json.dumps(raw))
    with pytest.raises(BrokenIndex, match=said):
        load_index(tmp_path / "train")


def test_statistics_that_are_no_numbers(tmp_path: Path) -> None:
    packed(tmp_path / "train", np.uint8)
    index = load_index(tmp_path / "train")
    place = index.samples.schema.get_field_index("std")
    for wrong in (float("nan"), float("inf"), -1.0):
        values = pa.FixedSizeListArray.from_arrays(pa.array([1.0] * 27 + [wrong], pa.float32()), 4)
        save_index(replace(index, samples=index.samples.set_column(place, "std", values)), tmp_path / "train")
        with pytest.raises(BrokenIndex, match="statistics that are not finite, or negative"):
            load_index(tmp_path / "train")
    few = pa.FixedSizeListArray.from_arrays(pa.array([1.0] * 21, pa.float32()), 3)
    save_index(replace(index, samples=index.samples.set_column(place, "std", few)), tmp_path / "train")
    with pytest.raises(BrokenIndex, match="other columns than expected"):
        load_index(tmp_path / "train")
