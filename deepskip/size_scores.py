"""Objects found, how well they are covered, and false alarms, by the objects' size."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.ndimage

# objects touch at corners too
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


class SizeScores:
    """Adds up scores of objects, 8-connected components of a foreground class, by their area.

    edges: areas in pixels that part the sizes, ascending: n edges make n + 1 sizes, each from one edge up to, and without, the
    next. An object is found as in `metrics.ObjectScores`. Its IoU is that with the predicted component that overlaps it best.
    A false alarm, a predicted component that touches no object of its class, counts under its own area.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges = np.array(edges, np.int64)
        self.objects, self.found, self.false_alarms = np.zeros((3, len(edges) + 1), np.int64)
        self.iou = np.zeros(len(edges) + 1)
        self.images = 0

    def update(self, prediction_HW: np.ndarray, target_HW: np.ndarray, ignore_index: int) -> None:
        """Adds one image: predicted and true labels (H, W); ignored pixels count nowhere."""
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
        # pixels of every object and component that overlap; a pair as one number
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
        """Gives for each size its bounds "from" and "to" (None: no end), "objects", "found", "recall", "iou" (the mean over
        its objects), "false_alarms" and "false_alarms_per_image"; a ratio of nothing to nothing is nan."""
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
