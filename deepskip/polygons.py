"""Outlines of objects along the edges of their pixels: valid polygons whose areas are the numbers of pixels."""

import numpy as np
import scipy.ndimage

# rings of (n, 2) x, y corners of pixels, not closed: the outer one first, then holes
Polygon = list[np.ndarray]
# east, south, west, north: clockwise on the screen, where y goes down
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def polygons(mask_HW: np.ndarray) -> list[Polygon]:
    """Traces a boolean mask (H, W): one polygon for each 4-connected part, in x, y of pixel corners.

    No ring touches itself; rings of one polygon may touch in single corners. Outer rings have positive area
    (sum of x_i y_{i+1} - x_{i+1} y_i), holes negative.
    """
    parts, _ = scipy.ndimage.label(mask_HW)
    found = []
    for number, (rows, columns) in enumerate(scipy.ndimage.find_objects(parts), 1):
        rings = trace(parts[rows, columns] == number)
        shifted = [ring + (columns.start, rows.start) for ring in rings]
        found.append(sorted(shifted, key=lambda ring: area(ring) < 0))
    return found


def area(ring: np.ndarray) -> float:
    """Computes the signed area of a ring."""
    x, y = ring[:, 0].astype(np.float64), ring[:, 1].astype(np.float64)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def trace(part_HW: np.ndarray) -> list[np.ndarray]:
    """Follows the edges between a 4-connected part and its outside, the part on the right hand; gives simple rings."""
    outgoing: dict[tuple[int, int], list[int]] = {}
    padded = np.pad(part_HW, 1)
    inner = padded[1:-1, 1:-1]
    sides = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    # where the edge of each side begins, from the pixel's first corner
    for direction, (outside, (dx, dy)) in enumerate(zip(sides, ((0, 0), (1, 0), (1, 1), (0, 1)), strict=True)):
        ys, xs = np.nonzero(inner & ~outside)
        for x, y in zip((xs + dx).tolist(), (ys + dy).tolist(), strict=True):
            outgoing.setdefault((x, y), []).append(direction)
    rings = []
    while outgoing:
        corner = next(iter(outgoing))
        direction = outgoing[corner][0]
        path: list[tuple[int, int]] = []
        places: dict[tuple[int, int], int] = {}
        while True:
            if corner in places:
                # a ring that comes back to a corner of itself ends there: what is cut off is a ring of its own
                start = places[corner]
                rings.append(corners(path[start:]))
                for gone in path[start:]:
                    del places[gone]
                del path[start:]
            if corner not in outgoing:
                break
            choices = outgoing[corner]
            # where two pixels touch in a corner, along the same pixel as before
            turn = (direction + 1) % 4
            direction = turn if turn in choices else choices[0]
            choices.remove(direction)
            if not choices:
                del outgoing[corner]
            places[corner] = len(path)
            path.append(corner)
            corner = corner[0] + STEPS[direction][0], corner[1] + STEPS[direction][1]
    return rings


def corners(path: list[tuple[int, int]]) -> np.ndarray:
    """Leaves out of a closed path the points on straight lines: (n, 2)."""
    points = np.array(path)
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[(before != after).any(axis=1)]
