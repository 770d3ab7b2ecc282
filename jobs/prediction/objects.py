"""Find the objects of a mask that arrives a few rows at a time; an object may span any number of blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import scipy.ndimage

from deepskip.size_scores import EIGHT_NEIGHBOURS


@dataclass
class Object:
    """Hold an 8-connected component of one label.

    Attributes:
        label: The label.
        pieces: Parts of the object, each (top, left, mask) with a mask (height, width), bool, and its place in the image.
        pixels: Number of pixels.
        probability: Sum of the pixels' probabilities.
    """

    label: int
    pieces: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    pixels: int = 0
    probability: float = 0.0

    def whole(self) -> tuple[int, int, np.ndarray]:
        """Join the pieces into one mask.

        Returns:
            Top row and left column in the image, and the mask (height, width), bool, of the bounding box.
        """
        top, left = min(y for y, _, _ in self.pieces), min(x for _, x, _ in self.pieces)
        bottom = max(y + mask.shape[0] for y, _, mask in self.pieces)
        right = max(x + mask.shape[1] for _, x, mask in self.pieces)
        joined = np.zeros((bottom - top, right - left), bool)
        for y, x, mask in self.pieces:
            joined[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] |= mask
        return top, left, joined

    @property
    def score(self) -> float:
        """Mean probability of the object's pixels."""
        return self.probability / self.pixels


class Objects:
    """Find objects in rows from top to bottom, keeping only those that may still grow.

    Attributes:
        top: Number of rows seen.
        open: For each label, the objects that reach the last row, and for each pixel of that row (W,) the number of its
            object, from 1, or 0.
    """

    def __init__(self) -> None:
        self.top = 0
        self.open: dict[int, tuple[list[Object], np.ndarray]] = {}

    def rows(self, labels_rW: np.ndarray, probabilities_rW: np.ndarray) -> Iterator[Object]:
        """Add the next rows and yield the objects that are complete.

        Args:
            labels_rW: Labels (rows, W), integers; 0 is background.
            probabilities_rW: Probability of each pixel's label (rows, W).

        Yields:
            Objects without a pixel in the last of these rows.
        """
        if not len(labels_rW):
            return
        for label in sorted({*np.unique(labels_rW).tolist(), *self.open} - {0}):
            yield from self._label(label, labels_rW == label, probabilities_rW)
        self.top += len(labels_rW)

    def close(self) -> Iterator[Object]:
        """Yield the remaining objects, which reach the last row."""
        for objects, _ in self.open.values():
            yield from objects
        self.open = {}

    def _label(self, label: int, here: np.ndarray, probabilities_rW: np.ndarray) -> Iterator[Object]:
        before, last_row = self.open.pop(label, ([], np.zeros(here.shape[1], np.int64)))
        components, number = scipy.ndimage.label(here, EIGHT_NEIGHBOURS)
        sums = scipy.ndimage.sum_labels(probabilities_rW, components, np.arange(1, number + 1)) if number else []
        pixels = np.bincount(components.ravel(), minlength=number + 1)
        found = list(before)
        for i, (rows, columns) in enumerate(scipy.ndimage.find_objects(components), 1):
            piece = self.top + rows.start, columns.start, components[rows, columns] == i
            found.append(Object(label, [piece], int(pixels[i]), float(sums[i - 1])))
        # Join the components of the first row with the objects that they touch in the row above.
        parent = list(range(len(found)))
        first_row = np.where(components[0], components[0] + len(before), 0)
        for shift in (-1, 0, 1):
            above = last_row[max(0, shift) : len(last_row) + min(0, shift)]
            below = first_row[max(0, -shift) : len(first_row) + min(0, -shift)]
            both = (above != 0) & (below != 0)
            for a, b in set(zip((above[both] - 1).tolist(), (below[both] - 1).tolist(), strict=True)):
                parent[root(parent, b)] = root(parent, a)
        for i, each in enumerate(found):
            if (whose := root(parent, i)) != i:
                joined = found[whose]
                joined.pieces += each.pieces
                joined.pixels += each.pixels
                joined.probability += each.probability
        reach = np.where(components[-1], components[-1] + len(before), 0)
        # Objects that reach the last row stay open and are numbered from 1.
        still: dict[int, int] = {}
        places = np.zeros(len(found) + 1, np.int64)
        for i in np.unique(reach).tolist():
            if i:
                places[i] = still.setdefault(root(parent, i - 1), len(still) + 1)
        if still:
            self.open[label] = [found[i] for i in still], places[reach]
        for i, each in enumerate(found):
            if root(parent, i) == i and i not in still:
                yield each


def root(parent: list[int], i: int) -> int:
    """Return the root of component `i` in a union-find forest, halving the path on the way."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i
