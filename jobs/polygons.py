"""Outlines of a mask's objects as GeoJSON, along the edges of pixels, so that they enclose exactly the mask's pixels."""

import itertools
import math
from typing import Any

import numpy as np
import scipy.ndimage

Ring = list[tuple[int, int]]
EIGHT_NEIGHBOURS = np.ones((3, 3), bool)
# steps (down, right) along the edges of pixels
RIGHT, DOWN, LEFT, UP = (0, 1), (1, 0), (0, -1), (-1, 0)

# tracing this many takes some seconds
MAX_SIDES = 1_000_000


class TooLong(ValueError):
    """Outlines would take too long to trace; the message says how long they are."""


def find_objects(labels_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label the objects of a mask.

    An object is a set of pixels of one class that touch by an edge or a corner, as in the metrics.

    Args:
        labels_HW: class of each pixel, (H, W) of an integer dtype, 0 for background.

    Returns:
        The object of each pixel, (H, W) int32, numbered from 1, with 0 for background; and the class of each object,
        (objects,) int64.
    """
    objects = np.zeros(labels_HW.shape, np.int32)
    classes: list[int] = []
    for label in np.unique(labels_HW[labels_HW > 0]):
        found, count = scipy.ndimage.label(labels_HW == label, EIGHT_NEIGHBOURS, output=np.int32)
        objects += np.where(found > 0, found + len(classes), 0)
        classes += [int(label)] * count
    return objects, np.array(classes, np.int64)


def feature_collection(objects_HW: np.ndarray, classes: np.ndarray, scores_HW: np.ndarray) -> dict[str, Any]:
    """Return a GeoJSON FeatureCollection of objects: Polygon, or MultiPolygon if parts touch only by corners.

    Coordinates are pixels, x to the right and y down from the upper left corner of the image. The properties of a
    feature are class, area in pixels, and score (mean probability).

    Args:
        objects_HW: object of each pixel, (H, W) int32, as `find_objects` returns it.
        classes: class of each object, (objects,) int64.
        scores_HW: probability of each pixel's label, (H, W) of a floating-point dtype.

    Raises:
        TooLong: the outlines have more than MAX_SIDES pixel edges.
    """
    areas = np.bincount(objects_HW.ravel(), minlength=len(classes) + 1)[1:]
    scores = np.bincount(objects_HW.ravel(), scores_HW.ravel(), minlength=len(classes) + 1)[1:] / areas
    # the outline of a part that is connected by edges never crosses itself
    parts, polygons = split_by_corners(objects_HW)
    owned: dict[int, list[list[Ring]]] = {}
    for part, rings in outlines(parts, MAX_SIDES).items():
        owned.setdefault(int(polygons[part]), []).append(rings)
    features = []
    for number, label in enumerate(classes, 1):
        shapes = owned[number]
        geometry = (
            {"type": "Polygon", "coordinates": shapes[0]}
            if len(shapes) == 1
            else {"type": "MultiPolygon", "coordinates": shapes}
        )
        properties = {
            "class": int(label),
            "area": int(areas[number - 1]),
            "score": round(float(scores[number - 1]), 4),
        }
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def split_by_corners(objects_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label the parts of objects that are connected by edges.

    Args:
        objects_HW: object of each pixel, (H, W) int32, 0 for background.

    Returns:
        The part of each pixel, (H, W) int32, numbered from 1, with 0 for background; and the object of each part,
        integers (parts + 1,), of which the first is 0 for background.
    """
    parts, count = scipy.ndimage.label(objects_HW > 0, output=np.int32)
    owner = np.zeros(count + 1, np.int32)
    owner[parts] = objects_HW
    if (owner[parts] == objects_HW).all():
        return parts, owner
    # objects of two classes share edges, so each object is labelled separately
    owners = [0]
    for number, where in enumerate(scipy.ndimage.find_objects(objects_HW), 1):
        found, more = scipy.ndimage.label(objects_HW[where] == number, output=np.int32)
        parts[where] = np.where(found > 0, found + len(owners) - 1, parts[where])
        owners += [number] * more
    return parts, np.array(owners)


def outlines(parts_HW: np.ndarray, most: float = math.inf) -> dict[int, list[Ring]]:
    """Trace the rings of each part, the outer ring first.

    Rings are closed and have only corners, as (x, y). The shoelace sum is positive for outer rings and negative for
    holes, as in GeoJSON.

    Args:
        parts_HW: part of each pixel, (H, W) of an integer dtype, 0 for background; parts are connected by edges.
        most: largest number of pixel edges that are traced.

    Returns:
        The rings of each part, by its number.

    Raises:
        TooLong: the outlines have more pixel edges.
    """
    padded = np.pad(parts_HW, 1)
    sides = int((padded[1:] != padded[:-1]).sum() + (padded[:, 1:] != padded[:, :-1]).sum())
    if sides > most:
        raise TooLong(f"the objects' outlines have {sides} pixel edges; at most {most} are traced")
    steps: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    # one step along each pixel edge between a part and anything else, with the part on the right hand
    for (down, right), inside, outside in (
        (RIGHT, padded[1:, 1:-1], padded[:-1, 1:-1]),
        (LEFT, padded[:-1, 1:-1], padded[1:, 1:-1]),
        (DOWN, padded[1:-1, :-1], padded[1:-1, 1:]),
        (UP, padded[1:-1, 1:], padded[1:-1, :-1]),
    ):
        rows, columns = np.nonzero((inside != outside) & (inside > 0))
        owners = inside[rows, columns]
        # a step begins at this end of its edge
        rows, columns = rows + (down < 0), columns + (right < 0)
        for part, y, x in zip(owners.tolist(), rows.tolist(), columns.tolist(), strict=True):
            steps.setdefault((part, y, x), []).append((down, right))
    found: dict[int, list[Ring]] = {}
    for part, y, x in list(steps):
        while (part, y, x) in steps:
            ring = follow(steps, part, y, x)
            rings = found.setdefault(part, [])
            # a part has exactly one outer ring
            rings.insert(0 if shoelace(ring) > 0 else len(rings), ring)
    return found


def follow(steps: dict[tuple[int, int, int], list[tuple[int, int]]], part: int, y: int, x: int) -> Ring:
    """Remove one closed ring from the steps and return it.

    Args:
        steps: directions (down, right) of the remaining steps by part, y and x of their start; changed in place.
        part: number of the part.
        y: row of the point where the ring starts, which may lie in the middle of a side.
        x: column of that point.

    Returns:
        The corners (x, y), of which the last equals the first.
    """
    start, ring = (y, x), []
    last: tuple[int, int] | None = None
    while last is None or (y, x) != start:
        ways = steps[part, y, x]
        # where two corners of the part meet, a left turn keeps to the outside, so that a ring never meets itself
        way = ways[0] if len(ways) == 1 or last is None else (-last[1], last[0])
        ways.remove(way)
        if not ways:
            del steps[part, y, x]
        if way != last:
            ring.append((x, y))
        y, x, last = y + way[0], x + way[1], way
    # the ring may have begun in the middle of a side
    if last == first_way(ring):
        ring.pop(0)
    return [*ring, ring[0]]


def first_way(ring: Ring) -> tuple[int, int]:
    """Return the direction (down, right) of a ring's first side."""
    (x0, y0), (x1, y1) = ring[:2]
    return (y1 > y0) - (y1 < y0), (x1 > x0) - (x1 < x0)


def shoelace(ring: Ring) -> int:
    """Compute twice the signed area of a closed ring, in pixels."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in itertools.pairwise(ring))
