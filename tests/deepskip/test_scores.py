"""Scores by size and by threshold equal plain counting, scikit-image and torchmetrics."""

import math

import numpy as np
import pytest
import skimage.measure
import torch
from torchmetrics.classification import (
    BinaryAveragePrecision,
    BinaryPrecisionRecallCurve,
    MulticlassAveragePrecision,
    MulticlassConfusionMatrix,
)

from deepskip.metrics import ObjectScores, SegmentationMetrics
from deepskip.size_scores import SizeScores
from deepskip.threshold_curve import STEPS, ThresholdCurve

EDGES = [4, 16]


def blobs(rng: np.random.Generator, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (40, 50) of many small objects, guessed and true, with ignored pixels in the truth."""
    guess, truth = np.zeros((2, 40, 50), np.uint8)
    for _ in range(25):
        y, x, h, w = (*rng.integers(0, (38, 48)), *rng.integers(1, 7, 2))
        label = rng.integers(1, max(2, classes))
        truth[y : y + h, x : x + w] = label
        if rng.random() < 0.7:
            y, x = (np.array([y, x]) + rng.integers(0, 3, 2)).tolist()
            guess[y : y + h, x : x + w] = label if rng.random() < 0.8 else rng.integers(1, max(2, classes))
    truth[rng.random(truth.shape) < 0.05] = 255
    return guess, truth


def by_hand(images: list[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, float]]:
    """Compute the scores by size, object by object."""
    bounds = [0, *EDGES, math.inf]
    rows = [{"objects": 0, "found": 0, "false_alarms": 0, "iou": 0.0} for _ in range(3)]
    for guess, truth in images:
        counted = truth != 255
        for label in range(1, 4):
            g, t = (guess == label) & counted, (truth == label) & counted
            objects, components = (skimage.measure.label(mask, connectivity=2) for mask in (t, g))
            for number in range(1, objects.max() + 1):
                here = objects == number
                row = next(
                    row for row, low, high in zip(rows, bounds, bounds[1:], strict=False) if low <= here.sum() < high
                )
                row["objects"] += 1
                row["found"] += int((here & g).sum() / here.sum() > 0.5)
                each = [components == i for i in np.unique(components[here & g])]
                row["iou"] += max(((here & c).sum() / (here | c).sum() for c in each), default=0.0)
            for number in range(1, components.max() + 1):
                here = components == number
                row = next(
                    row for row, low, high in zip(rows, bounds, bounds[1:], strict=False) if low <= here.sum() < high
                )
                row["false_alarms"] += int(not (here & t).any())
    return rows


@pytest.mark.parametrize("classes", [1, 4])
def test_by_size_against_counting_object_by_object(classes: int) -> None:
    rng = np.random.default_rng(classes)
    images = [blobs(rng, classes) for _ in range(3)]
    scores, plain = SizeScores(EDGES), ObjectScores()
    for guess, truth in images:
        scores.update(guess, truth, 255)
        plain.update(*(torch.from_numpy(np.where(truth != 255, x, 0)) for x in (guess, truth)))
    found, expected = scores.compute(), by_hand(images)
    assert [(row["from"], row["to"]) for row in found] == [(0, 4), (4, 16), (16, None)]
    for row, right in zip(found, expected, strict=True):
        assert right["objects"] > 3
        assert [row[name] for name in ("objects", "found", "false_alarms")] == [
            right[name] for name in ("objects", "found", "false_alarms")
        ]
        assert row["iou"] == pytest.approx(right["iou"] / right["objects"])
        assert row["recall"] == right["found"] / right["objects"]
        assert row["false_alarms_per_image"] == right["false_alarms"] / 3
    # All sizes together are what a training shows.
    assert sum(row["found"] for row in found) / sum(row["objects"] for row in found) == pytest.approx(
        plain.compute()["object_recall"].item()
    )
    assert sum(row["false_alarms"] for row in found) == plain.counts[2]


def test_no_objects_are_nan_and_not_0() -> None:
    scores = SizeScores([8])
    scores.update(np.zeros((5, 5), int), np.full((5, 5), 255), 255)
    for row in scores.compute():
        assert math.isnan(row["iou"])
        assert math.isnan(row["recall"])
        assert row["false_alarms_per_image"] == 0


def test_curve_of_a_binary_task_against_torchmetrics_and_by_hand() -> None:
    rng = np.random.default_rng(0)
    curve = ThresholdCurve(1, 255)
    thresholds = torch.arange(STEPS) / STEPS
    reference, area = BinaryPrecisionRecallCurve(thresholds=thresholds), BinaryAveragePrecision(thresholds=thresholds)
    kept = []
    for _ in range(3):
        truth = (rng.random((30, 40)) < 0.2).astype(np.uint8)
        p = np.clip(rng.normal(0.3 + 0.3 * truth, 0.2), 0, 1).astype(np.float32)
        # These values are exactly at thresholds and at the ends.
        p[0, :4] = 0, 0.5, 513 / 1024, 1
        truth[rng.random(truth.shape) < 0.1] = 255
        curve.update(p[None], truth)
        counted = truth != 255
        kept.append((p[counted], truth[counted]))
        for metric in (reference, area):
            metric.update(torch.from_numpy(p[counted]), torch.from_numpy(truth[counted].astype(int)))
    (found,) = curve.compute()
    precision, recall, _ = (x.numpy() for x in reference.compute())
    seen = ~np.isnan(found.precision)
    np.testing.assert_allclose(found.precision[seen], precision[:-1][seen], rtol=1e-6)
    np.testing.assert_allclose(found.recall, recall[:-1], rtol=1e-6)
    assert found.average_precision == pytest.approx(area.compute().item(), abs=1e-6)
    p, truth = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    scores = []
    for threshold in found.thresholds:
        guess = p >= threshold
        tp, either = (guess & (truth == 1)).sum(), (guess | (truth == 1)).sum()
        scores.append(tp / either)
    np.testing.assert_allclose(found.iou, scores)
    np.testing.assert_allclose(found.f1, 2 * found.iou / (1 + found.iou))
    assert found.iou[found.best] == max(scores)


def test_curves_of_classes_and_confusion_against_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (30, 40)).astype(np.uint8)
    logits = rng.normal(size=(4, 30, 40)) + 2 * (truth == np.arange(4)[:, None, None])
    p = (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)
    truth[rng.random(truth.shape) < 0.1] = 255
    curve = ThresholdCurve(4, 255)
    curve.update(p, truth)
    metric = MulticlassAveragePrecision(4, thresholds=torch.arange(STEPS) / STEPS, average="none", ignore_index=255)
    metric.update(torch.from_numpy(p)[None], torch.from_numpy(truth.astype(int))[None])
    found = [one.average_precision for one in curve.compute()]
    np.testing.assert_allclose(found, metric.compute()[1:].numpy(), atol=1e-6)
    matrix = MulticlassConfusionMatrix(4, ignore_index=255)
    matrix.update(torch.from_numpy(p.argmax(0)), torch.from_numpy(truth.astype(int)))
    metrics = SegmentationMetrics(4, 255)
    metrics.update(torch.from_numpy(p.argmax(0).astype(np.uint8)), torch.from_numpy(truth))
    torch.testing.assert_close(metrics.confusion, matrix.compute(), rtol=0, atol=0)


def test_nothing_there_and_nothing_seen() -> None:
    curve = ThresholdCurve(1, 255)
    curve.update(np.zeros((1, 4, 4), np.float32), np.zeros((4, 4), np.uint8))
    (found,) = curve.compute()
    assert math.isnan(found.average_precision)
    # At threshold 0, all pixels are foreground, and wrong.
    assert (found.precision[0], found.f1[0]) == (0, 0)
    assert np.isnan(found.precision[1:]).all()
    assert found.thresholds[found.best] == 0.5
    curve.update(np.full((1, 4, 4), 0.3, np.float32), np.zeros((4, 4), np.uint8))
    (found,) = curve.compute()
    assert found.thresholds[found.best] == 0.5
