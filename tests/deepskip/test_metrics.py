import math

import numpy as np
import pytest
import skimage.measure
import torch
from sklearn.metrics import precision_score, recall_score

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


def test_a_class_that_is_never_predicted_or_never_there_counts_as_0() -> None:
    truth = torch.tensor([[1, 1, 2, 2, 0, 0, 3, 3]])
    guess = torch.tensor([[1, 1, 0, 0, 4, 0, 3, 0]])
    metrics = SegmentationMetrics(6, 255)
    metrics.update(guess, truth)
    result = metrics.compute()
    for name, score in (("precision", precision_score), ("recall", recall_score)):
        expected = score(truth[0], guess[0], labels=[1, 2, 3, 4], average="macro", zero_division=0)
        assert result[name] == pytest.approx(expected)


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


@pytest.mark.parametrize("classes", [1, 3])
def test_an_image_whose_pixels_are_all_ignored_counts_nowhere(classes: int) -> None:
    target, seen = torch.randint(0, max(2, classes), (9, 7)), torch.randint(0, max(2, classes), (9, 7))
    alone, beside = SegmentationMetrics(classes, 255), SegmentationMetrics(classes, 255)
    beside.update(seen, torch.full_like(seen, 255))
    for metrics in (alone, beside):
        metrics.update(seen, target)
    same = alone.compute().keys() - {"false_alarms_per_image"}
    assert {name: beside.compute()[name] for name in same} == {name: alone.compute()[name] for name in same}


def test_pd_fa_and_niou_by_hand() -> None:
    truth, guess = torch.zeros(20, 20, dtype=torch.long), torch.zeros(20, 20, dtype=torch.long)
    # Centroids (1, 1) and (1, 3.5): 2.5 pixels apart, so detected without overlap.
    truth[0:3, 0:3] = 1
    guess[0:3, 3:5] = 1
    # Centroids (10, 1) and (10, 4): 3 pixels apart, so missed, and 3 false pixels.
    truth[10, 0:3] = 1
    guess[10, 3:6] = 1
    # Two diagonal pixels are one target. Of two components near it the first is used, and the nearer is false.
    truth[6, 12] = truth[7, 13] = 1
    guess[5, 12] = guess[7, 12] = 1
    # A component that touches its target, but whose centroid is 4 pixels away, is false.
    truth[15, 2:5] = 1
    guess[15, 4:10] = 1
    # An ignored pixel counts nowhere.
    truth[19, 19] = 255
    guess[19, 19] = 1
    metrics = SegmentationMetrics(1, 255)
    metrics.update(guess, truth)
    # The second image has no foreground, so it has no IoU.
    metrics.update(torch.zeros(5, 5, dtype=torch.long), torch.zeros(5, 5, dtype=torch.long))
    result = metrics.compute()
    assert result["pd"] == 2 / 4
    assert result["fa"] == pytest.approx((3 + 1 + 6) / (400 - 1 + 25))
    assert result["niou"] == pytest.approx(1 / (17 + 17 - 1))
    third = torch.ones(5, 5, dtype=torch.long)
    metrics.update(third, third)
    assert metrics.compute()["niou"] == pytest.approx((1 / 33 + 1) / 2)


def target_metrics_by_scikit_image(images: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Compute Pd, Fa and nIoU with scikit-image alone."""
    targets = detected = false_pixels = pixels = 0
    ious = []
    for guess, truth in images:
        left = skimage.measure.regionprops(skimage.measure.label(guess & (truth != 255), connectivity=2))
        pixels += int((truth != 255).sum())
        found = skimage.measure.regionprops(skimage.measure.label(truth == 1, connectivity=2))
        targets += len(found)
        for target in found:
            for place, component in enumerate(left):
                if math.dist(component.centroid, target.centroid) < 3:
                    detected += 1
                    del left[place]
                    break
        false_pixels += sum(int(component.area) for component in left)
        counted = truth != 255
        ious.append(((guess == 1) & (truth == 1)).sum() / (((guess == 1) & counted) | (truth == 1)).sum())
    return {"pd": detected / targets, "fa": false_pixels / pixels, "niou": float(np.mean(ious))}


def test_pd_fa_and_niou_against_scikit_image() -> None:
    rng = np.random.default_rng(3)
    images = []
    for _ in range(6):
        guess, truth = np.zeros((2, 60, 70), np.uint8)
        for _ in range(20):
            y, x, h, w = (*rng.integers(0, (54, 64)), *rng.integers(1, 5, 2))
            truth[y : y + h, x : x + w] = 1
            y, x = (np.array([y, x]) + rng.integers(-3, 4, 2)).clip(0)
            guess[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = rng.random() < 0.8
        truth[rng.random(truth.shape) < 0.02] = 255
        images.append((guess, truth))
    metrics = SegmentationMetrics(1, 255)
    for guess, truth in images:
        metrics.update(torch.tensor(guess).long(), torch.tensor(truth).long())
    result, expected = metrics.compute(), target_metrics_by_scikit_image(images)
    assert 0.4 < expected["pd"] < 0.9
    assert expected["fa"] > 0.005
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert "pd" not in SegmentationMetrics(3, 255).compute()
