"""Score objects by their size: recall, IoU and false alarms."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.ndimage

# Pixels that touch at corners belong to the same object.
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


class SizeScores:
    """Accumulate scores of objects, 8-connected components of a foreground class, by their area.

    An object is found as in `metrics.ObjectScores`. Its IoU is that with the predicted component that overlaps it best.
    A false alarm, a predicted component that touches no object of its class, counts under its own area.

    Args:
        edges: areas in pixels that separate the sizes, ascending. n edges make n + 1 sizes, each from one edge,
            included, to the next, excluded.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges = np.array(edges, np.int64)
        self.objects, self.found, self.false_alarms = np.zeros((3, len(edges) + 1), np.int64)
        self.iou = np.zeros(len(edges) + 1)
        self.images = 0

    def update(self, prediction_HW: np.ndarray, target_HW: np.ndarray, ignore_index: int) -> None:
        """Add one image.

        Args:
            prediction_HW: predicted labels (H, W).
            target_HW: true labels (H, W).
            ignore_index: true label of pixels that are not counted.
        """
        counted = target_HW != ignore_index
        prediction_HW, target_HW = np.where(counted, prediction_HW, 0), np.where(counted, target_HW, 0)
        self.images += 1
        for label in np.union1d(np.unique(prediction_HW), np.unique(target_HW)):
            if label:
                self._add(prediction_HW == label, target_HW == label)

    def _add(self, guess: np.ndarray, truth: np.ndarray) -> None:
        objects, number = scipy.ndimage.label(truth, EIGHT_NEIGHBOURS)
        components, guessed = scipy.ndimage.label(guess, EIGHT_NEIGHBOURS)
        areas, guessed_areas = np.bincount(objects.ravel()), np.bincount(components.ravel())
        # The number of pixels that each object shares with each component; a pair is encoded as one number.
        both = truth & guess
        overlaps, shared = np.unique(
            objects[both].astype(np.int64) * (guessed + 1) + components[both], return_counts=True
        )
        pairs = np.divmod(overlaps, guessed + 1)
        union = areas[pairs[0]] + guessed_areas[pairs[1]] - shared
        best, hits = np.zeros(number + 1), np.zeros(number + 1, np.int64)
        np.maximum.at(best, pairs[0], shared / union)
        np.add.at(hits, pairs[0], shared)
        sizes = self._size(areas[1:])
        self._count(self.objects, sizes)
        self._count(self.found, sizes[2 * hits[1:] > areas[1:]])
        np.add.at(self.iou, sizes, best[1:])
        touching = np.zeros(len(guessed_areas), bool)
        touching[pairs[1]] = True
        self._count(self.false_alarms, self._size(guessed_areas[1:][~touching[1:]]))

    def _size(self, areas: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.edges, areas, side="right")

    def _count(self, counts: np.ndarray, sizes: np.ndarray) -> None:
        counts += np.bincount(sizes, minlength=len(counts))

    def compute(self) -> list[dict[str, Any]]:
        """Return the scores of each size, smallest first.

        Returns:
            For each size its bounds "from" and "to" (None for no upper bound), "objects", "found", "recall", "iou"
            (the mean over its objects), "false_alarms" and "false_alarms_per_image". A ratio of 0 to 0 is nan.
        """
        bounds = [0, *self.edges.tolist(), None]
        nothing = float("nan")
        return [
            {
                "from": bounds[i],
                "to": bounds[i + 1],
                "objects": int(objects),
                "found": int(self.found[i]),
                "recall": float(self.found[i] / objects) if objects else nothing,
                "iou": float(self.iou[i] / objects) if objects else nothing,
                "false_alarms": int(self.false_alarms[i]),
                "false_alarms_per_image": float(self.false_alarms[i] / self.images) if self.images else nothing,
            }
            for i, objects in enumerate(self.objects)
        ]
