"""The objects of a mask that comes a few rows at a time: each whole, whatever blocks of rows it spans."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import scipy.ndimage

from deepskip.size_scores import EIGHT_NEIGHBOURS


@dataclass
class Object:
    """An 8-connected component of one label: pieces of (top, left, boolean mask), and the sum of its probabilities."""

    label: int
    pieces: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    pixels: int = 0
    probability: float = 0.0

    def whole(self) -> tuple[int, int, np.ndarray]:
        """Joins the pieces: top, left, and a boolean mask."""
        top, left = min(y for y, _, _ in self.pieces), min(x for _, x, _ in self.pieces)
        bottom = max(y + mask.shape[0] for y, _, mask in self.pieces)
        right = max(x + mask.shape[1] for _, x, mask in self.pieces)
        joined = np.zeros((bottom - top, right - left), bool)
        for y, x, mask in self.pieces:
            joined[y - top : y - top + mask.shape[0], x - left : x - left + mask.shape[1]] |= mask
        return top, left, joined

    @property
    def score(self) -> float:
        """Mean probability of its pixels."""
        return self.probability / self.pixels


class Objects:
    """Finds objects in rows from top to bottom; holds only those that may still grow."""

    def __init__(self) -> None:
        self.top = 0
        # for each label the objects that reach the last row so far, and which of them each of its pixels is in (0: none)
        self.open: dict[int, tuple[list[Object], np.ndarray]] = {}

    def rows(self, labels_rW: np.ndarray, probabilities_rW: np.ndarray) -> Iterator[Object]:
        """Takes the next rows and gives the objects that are finished; probabilities: of the label at each pixel."""
        if not len(labels_rW):
            return
        for label in sorted({*np.unique(labels_rW).tolist(), *self.open} - {0}):
            yield from self._label(label, labels_rW == label, probabilities_rW)
        self.top += len(labels_rW)

    def close(self) -> Iterator[Object]:
        """Gives the objects that reach the last row."""
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
        # components of the first row belong to the objects that they touch in the row above
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
        # those that reach the last row stay, and get numbers from 1
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
    """Follows a joined component to the one it belongs to, and shortens the way."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i
