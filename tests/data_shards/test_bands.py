"""Only the bands that are asked for are given to the network, with their own statistics."""

from pathlib import Path

import numpy as np
import pytest

from deepskip.data_shards.bands import BandError, chosen_bands, shown_bands
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.order import Slot
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards


def test_numbers_and_ranges() -> None:
    assert chosen_bands([0, 5, "10-13", "7"], 14) == (0, 5, 10, 11, 12, 13, 7)
    assert chosen_bands(["2-2"], 3) == (2,)
    assert shown_bands((0, 5, 10, 11, 12, 13, 7)) == "0, 5, 10-13, 7"


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ([0, 14], "there is no band 14: the images have 14 bands, 0 to 13"),
        (["10-40"], "there is no band 40: the images have 14 bands"),
        ([3, "2-4"], "band 3 is named twice"),
        ([5, 5], "band 5 is named twice"),
        (["4-2"], "the range 4-2 ends before it begins"),
        ([-1], "-1 is not a band, such as 5, or a range of bands, such as 10-40"),
        (["red"], "'red' is not a band"),
        (["1-"], "'1-' is not a band"),
        ([True], "True is not a band"),
        (["0-99999999999999"], "is not a band"),
        ([], "no band is named; null takes all"),
    ],
)
def test_what_is_no_choice(choice: list[int | str], said: str) -> None:
    with pytest.raises(BandError, match=said):
        chosen_bands(choice, 14)


@pytest.mark.parametrize("normalize", ["image", "dataset"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_batches_are_those_of_a_set_with_only_these_bands(tmp_path: Path, normalize: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    images = (rng.random((5, 24, 20, 7)) * 200).astype(dtype)
    masks = (rng.random((5, 24, 20)) < 0.1).astype(np.uint8)
    if dtype == np.float32:
        # Where no chosen band has a value the pixel does not count, whatever the others hold.
        images[1, 3, 4, :5], images[2, 5, 6, 1] = np.nan, np.nan
        masks[1, 3, 4] = 255
    chosen = [4, 0, 1]
    write_shards((Sample(f"s{i}", images[i], masks[i]) for i in range(5)), tmp_path / "all", num_classes=1)
    few = (Sample(f"s{i}", images[i][..., chosen], masks[i]) for i in range(5))
    write_shards(few, tmp_path / "few", num_classes=1)
    slots = [Slot(0, i, 1) for i in range(5)]
    for crops in (None, Crops(16, 0.5, 0), Crops(16, 0.5, 0, 0.5)):
        taken = Shards(tmp_path / "all", normalize, crops, bands=[4, "0-1"])
        expected = Shards(tmp_path / "few", normalize, crops)[slots]
        for name, values in taken[slots].items():
            np.testing.assert_array_equal(values, expected[name])  # type: ignore[literal-required]
    flat = images[..., chosen].reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(taken.index.mean, np.nanmean(flat, 0))
    np.testing.assert_allclose(taken.index.std, np.nanstd(flat, 0))
    assert taken.index.preparation == {"bands": None, "longest_side": None, "chosen": chosen, "of": 7}
    # A run knows which bands it is trained on.
    assert identity_of(taken.index) != identity_of(Shards(tmp_path / "all", bands=[0, 1, 4]).index)
    with pytest.raises(BandError, match="there is no band 7"):
        Shards(tmp_path / "all", bands=[7])
