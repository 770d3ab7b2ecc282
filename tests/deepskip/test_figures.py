"""The colours of pictures, seen with each of the three kinds of colour blindness."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from deepskip import figures
from deepskip.figures import CLASS_COLOURS, FALSE_ALARM, FOUND, MISSED
from deepskip.threshold_curve import ThresholdCurve

# Machado, Oliveira and Fernandes 2009, severity 1: what reaches the eye of linear RGB
SIGHTS = {
    "all cones": np.eye(3),
    "without red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "without green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "without blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def closest(colours: Sequence[tuple[float, ...]], sight: np.ndarray) -> float:
    """Return the least CIEDE2000 difference of two colours; 1 is just visible side by side."""
    c = np.array(colours)
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(sight).T, 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)[None])[0]
    return min(float(deltaE_ciede2000(a, b)) for a, b in itertools.combinations(lab, 2))


@pytest.mark.parametrize(("classes", "numbers"), [(4, 16), (200, 0)])
def test_the_confusion_of_many_classes_is_drawn_without_numbers(classes: int, numbers: int) -> None:
    figure = figures.confusion(np.eye(classes, dtype=np.int64))
    (axis,) = figure.axes
    assert len(axis.texts) == numbers
    assert len(axis.get_xticks()) <= figures.MOST_NUMBERED
    assert max(figure.get_size_inches()) <= figures.LARGEST_MATRIX


def test_missing_pixels_are_black_and_do_not_stretch_the_others() -> None:
    image = 1000 + 200 * np.random.default_rng(0).random((60, 40, 4)).astype(np.float32)
    holed = image.copy()
    holed[20:] = np.nan
    holed[:20, :5, 3] = np.nan
    found = figures.to_rgb(holed)
    assert not found[20:].any()
    assert not found[:20, :5, 2].any()
    for band, (shown, seen) in enumerate(((0, image[:20, :, 0]), (2, image[:20, :, 2]), (3, image[:20, 5:, 3]))):
        low, high = np.quantile(seen.astype(np.float64), (0.01, 0.99))
        expected = np.clip((holed[:20, :, shown] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(found[:20, :, band], np.nan_to_num(expected), atol=1e-5)
    assert not figures.to_rgb(np.full((3, 3, 1), np.nan)).any()


@pytest.mark.parametrize("sight", SIGHTS)
def test_colour_blind_readers_tell_the_colours_apart(sight: str) -> None:
    assert closest((FOUND, MISSED, FALSE_ALARM), SIGHTS[sight]) > 20
    assert closest(CLASS_COLOURS, SIGHTS[sight]) > 10
    # Green, amber and red, as in traffic lights, would fail for two of the four.
    lights = closest(((0.1, 0.75, 0.3), (1.0, 0.75, 0.0), (0.95, 0.15, 0.15)), SIGHTS[sight])
    assert (lights > 20) == (sight in ("all cones", "without blue cones"))


def test_names_of_other_people_are_drawn_as_they_are(tmp_path: Path) -> None:
    target = np.array([[0, 1], [1, 0]])
    curve = ThresholdCurve(1, 255)
    curve.update(np.array([[[0.2, 0.8], [0.4, 0.6]]], np.float32), target)
    (found,) = curve.compute()
    figure = figures.precision_recall([("$\\foo$", found), ("_bg_", found)])
    figure.savefig(tmp_path / "curves.png")
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text().partition(",")[0] for text in legend.get_texts()] == [r"\$\foo\$", " _bg_"]
