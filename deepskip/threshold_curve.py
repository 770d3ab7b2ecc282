"""Compute precision and recall of pixels over all thresholds from counts, without storing probabilities."""

from dataclasses import dataclass

import numpy as np

# A power of two, so that fp32 probabilities times this are exact.
STEPS = 1024


@dataclass(frozen=True)
class Curve:
    """Scores of one foreground class at each of STEPS thresholds k / STEPS; a pixel at or above a threshold is predicted.

    Attributes:
        thresholds: (STEPS,).
        precision: (STEPS,); nan if nothing is predicted.
        recall: (STEPS,); nan if the class has no pixels.
        f1: (STEPS,).
        iou: (STEPS,).
        average_precision: area under the steps of the curve; nan if the class has no pixels.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    iou: np.ndarray
    average_precision: float

    @property
    def best(self) -> int:
        """The index of the best F1, which is also that of the best IoU; of several the middle one; that of 0.5 if it is 0."""
        highest = np.nan_to_num(self.f1).max()
        top = np.flatnonzero(self.f1 == highest)
        return int(top[len(top) // 2]) if highest > 0 else STEPS // 2


class ThresholdCurve:
    """Count, for each foreground class separately, the probabilities of its pixels and of all others.

    Args:
        num_classes: 1 for binary, else exclusive classes with background 0.
        ignore_index: true label of pixels that are not counted.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        # By class, true or not, and step.
        self.counts = np.zeros((max(1, num_classes - 1), 2, STEPS), np.int64)

    def update(self, probabilities_VHW: np.ndarray, target_HW: np.ndarray) -> None:
        """Add one image.

        Args:
            probabilities_VHW: probabilities (V, H, W), fp32.
            target_HW: true labels (H, W); ignored pixels are not counted.
        """
        counted = target_HW != self.ignore_index
        target, first = target_HW[counted], 0 if self.num_classes == 1 else 1
        for place, p_HW in enumerate(probabilities_VHW[first:]):
            steps = np.minimum((p_HW[counted] * STEPS).astype(np.int64), STEPS - 1)
            steps += STEPS * (target == place + 1)
            self.counts[place] += np.bincount(steps, minlength=2 * STEPS).reshape(2, STEPS)

    def compute(self) -> list[Curve]:
        """Return the curve of each foreground class, in order."""
        curves = []
        for negatives, positives in self.counts:
            # Pixels at or above each threshold.
            tp, fp = (np.cumsum(counts[::-1])[::-1].astype(np.float64) for counts in (positives, negatives))
            there = tp[0]
            with np.errstate(invalid="ignore"):
                precision, recall = tp / (tp + fp), tp / np.float64(there)
                f1, iou = 2 * tp / (there + tp + fp), tp / (there + fp)
            gained = recall - np.append(recall[1:], 0.0)
            average = float(np.nansum(gained * precision)) if there else float("nan")
            curves.append(Curve(np.arange(STEPS) / STEPS, precision, recall, f1, iou, average))
        return curves
