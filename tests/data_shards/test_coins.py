import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops

from deepskip.data_shards.sources import coins as source
from deepskip.data_shards.sources.coins import BACKGROUNDS, SPLITS, coins, coins_of, cut_out, photograph

OFFLINE = """
import socket, sys
def refuse(*_, **__): raise AssertionError("went to the network")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
from deepskip.data_shards.sources.coins import coins
for split in ("train", "val", "test"): list(coins(split, 3))
assert "pooch" not in sys.modules
"""


@pytest.fixture(scope="module")
def samples() -> dict[str, list]:
    return {split: list(coins(split, 60, seed=3)) for split in SPLITS}


def test_images_and_masks_are_what_they_say(samples: dict[str, list]) -> None:
    for split, drawn in samples.items():
        assert [key for key, _, _ in drawn] == [f"{split}-{i:06d}" for i in range(60)]
        for _, image, mask in drawn:
            assert image.shape == (128, 128, 3)
            assert mask.shape == (128, 128)
            assert image.dtype == mask.dtype == np.uint8
            assert set(np.unique(mask)) <= {0, 1}
        assert {0, 1} == set(np.unique([mask for _, _, mask in drawn]))


def test_a_sample_depends_on_seed_split_and_number_alone(samples: dict[str, list]) -> None:
    for split, drawn in samples.items():
        for (key, image, mask), (key2, image2, mask2) in zip(coins(split, 4, seed=3), drawn, strict=False):
            assert key == key2
            np.testing.assert_array_equal(image, image2)
            np.testing.assert_array_equal(mask, mask2)
    first = [next(iter(coins(split, 1, seed=seed)))[1] for split in SPLITS for seed in (3, 4)]
    assert len({image.tobytes() for image in first}) == len(first)


def test_watershed_finds_the_24_coins_that_thresholds_find() -> None:
    grey_HW = np.asarray(photograph("coins.png"))
    assert len(cut_out()) == 24
    for coin in cut_out():
        assert coin.cover.sum() == pytest.approx(np.pi * coin.diameter**2 / 4, rel=1e-4)
        row, column = coin.centre
        # Find the coin in another way, by Otsu's threshold of its surroundings. The photograph is unevenly lit.
        top, left = max(0, round(row - coin.radius - 3)), max(0, round(column - coin.radius - 3))
        around = grey_HW[top : round(row + coin.radius + 4), left : round(column + coin.radius + 4)]
        bright = binary_fill_holes(around > threshold_otsu(around))
        other = max(regionprops(label(bright)), key=lambda region: region.area)
        assert 0.95 < other.area / coin.cover.sum() < 1.05, coin.centre
        assert np.hypot(other.centroid[0] + top - row, other.centroid[1] + left - column) < 2, coin.centre
        # Coins are round, so a disc of this radius holds little else.
        assert coin.cover.sum() > 0.7 * np.pi * coin.radius**2


def test_splits_share_no_coin_and_no_photograph() -> None:
    for names in ([coin.centre for coin in coins_of(split)] for split in SPLITS):
        assert len(names) >= 5
    centres = [coin.centre for split in SPLITS for coin in coins_of(split)]
    assert len(set(centres)) == len(centres) == 24
    files = [name for split in SPLITS for name in BACKGROUNDS[split]]
    assert len(set(files)) == len(files)
    assert "coins.png" not in files
    means = [np.mean([coin.grey.sum() / coin.cover.sum() for coin in coins_of(split)]) for split in SPLITS]
    assert np.ptp(means) < 0.05


def test_objects_are_small_whole_and_sometimes_absent(samples: dict[str, list]) -> None:
    masks = [mask for split in ("train", "val") for _, _, mask in samples[split]]
    labelled = [label(mask) for mask in masks]
    shares = np.concatenate([np.bincount(regions.ravel())[1:] for regions in labelled]) / 128**2
    assert 0.006 < np.median(shares) < 0.009
    # There are no crumbs next to the coins, and none is as large as two coins grown together.
    assert shares.min() > 0.5 * np.pi / 4 * (source.DIAMETERS[0]) ** 2 * 0.8
    assert shares.max() < 1.1 * np.pi / 4 * (source.DIAMETERS[1]) ** 2
    counts = [regions.max() for regions in labelled]
    assert min(counts) == 0
    assert max(counts) == source.MAX_COINS


def test_coins_stand_out_from_the_ground_they_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    with_coins = list(coins("val", 30, seed=1))
    # The ground is drawn before the coins. Without them, the rest of the image is another draw of noise and shadow.
    monkeypatch.setattr(source, "draw_places", lambda *_: [])
    grounds = [image for _, image, _ in coins("val", 30, seed=1)]
    for (key, image, mask), ground in zip(with_coins, grounds, strict=True):
        regions = label(mask)
        change = np.abs(image.astype(float) - ground).mean(-1)
        for i in range(1, regions.max() + 1):
            assert change[regions == i].mean() > 20, key
        # Far from any coin, nothing was pasted.
        assert np.median(change[mask == 0]) < 10, key


def test_size_scales_the_coins() -> None:
    (_, _, small), (_, image, large) = (next(iter(coins("train", 1, seed=5, size=size))) for size in (128, 256))
    assert image.shape == (256, 256, 3)
    assert label(large).max() == label(small).max() > 0
    assert large.mean() == pytest.approx(small.mean(), rel=0.1)


def test_wrong_arguments_are_named_before_the_first_sample() -> None:
    with pytest.raises(ValueError, match="'dev'; allowed are train, val, test"):
        coins("dev", 1)
    with pytest.raises(ValueError, match="size is 32"):
        coins("val", 1, size=32)


def test_a_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike) -> None:
    coins_of("train")  # This fills the cache, so that the background is the first photograph read.
    monkeypatch.setattr(source, "PHOTOGRAPHS", tmp_path)
    photograph.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"astronaut\.png is missing"):
        coins("train", 1)


def test_nothing_is_downloaded() -> None:
    subprocess.run([sys.executable, "-c", OFFLINE], check=True, timeout=60)
