import math

import numpy as np
import pytest
import torch

from deepskip.metrics import THRESHOLDS, SegmentationMetrics, ThresholdScores


def test_binary_pixels_against_counting() -> None:
    rng = np.random.default_rng(0)
    metrics = SegmentationMetrics(1, 255)
    tp = fp = fn = tn = 0
    for _ in range(3):
        guess, truth = rng.integers(0, 2, (20, 30)), rng.integers(0, 2, (20, 30))
        truth[rng.random(truth.shape) < 0.2] = 255
        metrics.update(torch.tensor(guess), torch.tensor(truth))
        tp += int(((guess == 1) & (truth == 1)).sum())
        fp += int(((guess == 1) & (truth == 0)).sum())
        fn += int(((guess == 0) & (truth == 1)).sum())
        tn += int(((guess == 0) & (truth == 0)).sum())
    result = metrics.compute()
    assert result["iou"] == pytest.approx(tp / (tp + fp + fn))
    assert result["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert result["f1"] == result["dice"]
    assert result["precision"] == pytest.approx(tp / (tp + fp))
    assert result["recall"] == pytest.approx(tp / (tp + fn))
    assert result["pixel_accuracy"] == pytest.approx((tp + tn) / (tp + fp + fn + tn))


@pytest.mark.parametrize(("centre", "expected"), [(-2.0, 0.1), (0.0, 0.5), (1.5, 0.8)])
def test_the_best_threshold_against_torchmetrics_at_every_threshold(centre: float, expected: float) -> None:
    # deepskip.metrics must be imported before torchmetrics.
    from torchmetrics.classification import BinaryJaccardIndex

    rng = np.random.default_rng(1)
    scores, metrics = ThresholdScores(255), SegmentationMetrics(1, 255)
    at_each = {threshold: BinaryJaccardIndex(threshold, ignore_index=255) for threshold in THRESHOLDS}
    for _ in range(3):
        truth = rng.integers(0, 2, (24, 31))
        # Foreground lies above the centre, background below.
        logits = torch.tensor(rng.normal(centre - 1 + 2 * truth, 1.0), dtype=torch.float32)
        truth[rng.random(truth.shape) < 0.2] = 255
        target = torch.tensor(truth)
        scores.update(logits, target)
        metrics.update(logits > 0, target)
        for metric in at_each.values():
            metric.update(logits.double().sigmoid(), target)
    found = {name: value.item() for name, value in scores.compute().items()}
    ious = {threshold: metric.compute().item() for threshold, metric in at_each.items()}
    assert found["iou_best_threshold"] == pytest.approx(max(ious.values()), abs=1e-6)
    assert ious[found["best_threshold"]] == max(ious.values())
    assert found["best_threshold"] == pytest.approx(expected, abs=0.051)
    at_half = metrics.compute()["iou"]
    assert at_half == pytest.approx(ious[0.5], abs=1e-6)
    if found["best_threshold"] == 0.5:
        assert found["iou_best_threshold"] == pytest.approx(at_half, rel=1e-12)


def test_a_logit_on_a_threshold_is_background_and_equal_thresholds_are_nearest_to_half() -> None:
    scores = ThresholdScores(255)
    # A logit of 0 is background, as in to_labels. Only above 0.7 is foreground, so 0.5 to 0.7 are equally good.
    scores.update(torch.tensor([[0.0, 0.9, -3.0]]), torch.tensor([[0, 1, 255]]))
    assert {name: value.item() for name, value in scores.compute().items()} == {
        "best_threshold": 0.5, "iou_best_threshold": 1.0,
    }  # fmt: skip
    empty = ThresholdScores(255)
    empty.update(torch.tensor([[4.0, -4.0]]), torch.tensor([[0, 0]]))
    assert empty.compute()["best_threshold"] == 0.5
    assert math.isnan(empty.compute()["iou_best_threshold"])


def test_classes_are_averaged_over_foreground_that_occurs() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 255]])
    guess = torch.tensor([[0, 1, 1, 1], [2, 2, 0, 1]])
    metrics = SegmentationMetrics(4, 255)
    metrics.update(guess, truth)
    result = metrics.compute()
    assert result["iou"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert result["precision"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["recall"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["pixel_accuracy"] == pytest.approx(5 / 7)


def test_objects_by_hand() -> None:
    truth, guess = torch.zeros(12, 12, dtype=torch.long), torch.zeros(12, 12, dtype=torch.long)
    # This object is found whole.
    truth[0:3, 0:3] = 1
    guess[0:3, 0:3] = 1
    # An object of which half is found is not found.
    truth[0:2, 6:10] = 1
    guess[0:2, 6:8] = 1
    # Two diagonal neighbours are one object, which is missed.
    truth[6, 6] = truth[7, 7] = 1
    # An object that touches nothing is a false alarm. One that touches truth is none. Ignored pixels never count.
    guess[10:12, 0:2] = 1
    truth[10:12, 10:12] = 255
    guess[10:12, 10:12] = 1
    metrics = SegmentationMetrics(1, 255)
    metrics.update(guess, truth)
    metrics.update(torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long))
    result = metrics.compute()
    assert result["object_recall"] == pytest.approx(1 / 3)
    assert result["false_alarms_per_image"] == pytest.approx(1 / 2)


def test_nothing_to_find_is_nan_and_not_1() -> None:
    metrics = SegmentationMetrics(1, 255)
    metrics.update(torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long))
    result = metrics.compute()
    assert math.isnan(result["iou"])
    assert math.isnan(result["object_recall"])
    assert result["pixel_accuracy"] == 1
