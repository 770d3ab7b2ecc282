"""Write the outlines of a mask's objects: one GeoJSON file per image, or one COCO file that joins all images."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from pycocotools import mask as coco_mask

from deepskip.data_shards import storage
from deepskip.jobs.polygons import outlines
from deepskip.jobs.prediction import georeference
from deepskip.jobs.prediction.objects import Object, Objects
from deepskip.jobs.prediction.rasters import Raster
from deepskip.jobs.prediction.writers import remove

FOLDER, COCO_FILE = "polygons", "coco.json"
ENDING = {"geojson": ".geojson", "coco": ".coco.json"}


class Features:
    """Write one image's outlines to a temporary file, each object as soon as it is complete.

    Args:
        path: Final path of the file.
        kind: Format, "geojson" or "coco".
        raster: The image.
        name: File name of the image, recorded in COCO files.
    """

    def __init__(self, path: Path, kind: str, raster: Raster, name: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.kind, self.raster = path, kind, raster
        self.temporary = storage.temporary_beside(path)
        self.objects, self.written = Objects(), 0
        self.file = self.temporary.open("w")
        head: dict[str, Any] = {"image": {"file_name": name, "height": raster.height, "width": raster.width}}
        if kind == "geojson":
            head = {"type": "FeatureCollection"}
            if raster.place.transform and raster.place.crs:
                head["crs"] = {"type": "name", "properties": {"name": georeference.named(raster.place.crs)}}
        # The list of objects is the last member and stays open until finish().
        self.file.write(f'{json.dumps(head)[:-1]}, "{"features" if kind == "geojson" else "annotations"}": [\n')

    def rows(self, labels_rW: np.ndarray, probabilities_rW: np.ndarray) -> None:
        """Add the next rows of the mask.

        Args:
            labels_rW: Labels (rows, W), integers.
            probabilities_rW: Probability of each pixel's label (rows, W).
        """
        self._write(self.objects.rows(labels_rW, probabilities_rW))

    def finish(self) -> None:
        """Write the objects that reach the last row, and the end of the file."""
        self._write(self.objects.close())
        self.file.write("\n]}\n")
        self.file.close()

    def place(self) -> None:
        """Rename the file to its final name."""
        self.temporary.replace(self.path)

    def discard(self) -> None:
        """Close and remove the temporary file."""
        self.file.close()
        remove(self.temporary)

    def _write(self, found: Iterable[Object]) -> None:
        for each in found:
            described = geojson(each, self.raster) if self.kind == "geojson" else coco(each, self.raster)
            self.file.write(f"{',' * (self.written > 0)}{os.linesep * (self.written > 0)}{json.dumps(described)}")
            self.written += 1


def outlined(top: int, left: int, mask: np.ndarray) -> list[list[np.ndarray]]:
    """Return an object's polygons, one for each 4-connected part.

    Args:
        top: Row of the mask's first row in the image.
        left: Column of the mask's first column in the image.
        mask: Object's pixels (height, width), bool.

    Returns:
        Each polygon is a list of closed rings (n, 2) of x, y in pixels of the image, with the outer ring first.
    """
    parts, _ = scipy.ndimage.label(mask)
    return [[np.array(ring) + np.array([left, top]) for ring in rings] for rings in outlines(parts).values()]


def geojson(each: Object, raster: Raster) -> dict[str, Any]:
    """Return an object as a GeoJSON feature, in map coordinates if the image is georeferenced, else in pixels."""
    coordinates = []
    for rings in outlined(*each.whole()):
        if raster.place.transform:
            a, b, c, d, e, f = raster.place.transform
            # GeoJSON wants counterclockwise outer rings; a map whose y axis points up mirrors them.
            turned = [ring[::-1] if a * e - b * d < 0 else ring for ring in rings]
            rings = [np.stack([a * x + b * y + c, d * x + e * y + f], axis=1) for x, y in (ring.T for ring in turned)]
        coordinates.append([ring.tolist() for ring in rings])
    geometry: dict[str, Any] = {"type": "MultiPolygon", "coordinates": coordinates}
    if len(coordinates) == 1:
        geometry = {"type": "Polygon", "coordinates": coordinates[0]}
    properties = {"class": each.label, "area": each.pixels, "score": round(each.score, 4)}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def coco(each: Object, raster: Raster) -> dict[str, Any]:
    """Return an object as a COCO annotation: polygons, or run lengths for objects with holes.

    COCO's polygons cannot have holes.
    """
    top, left, mask = each.whole()
    parts = outlined(top, left, mask)
    segmentation: Any = [rings[0][:-1].ravel().tolist() for rings in parts]
    if any(len(rings) > 1 for rings in parts):
        segmentation = run_lengths(top, left, mask, raster.height, raster.width)
    return {
        "category_id": each.label,
        "segmentation": segmentation,
        "area": each.pixels,
        "bbox": [left, top, mask.shape[1], mask.shape[0]],
        "iscrowd": 0,
        "score": round(each.score, 4),
    }


def run_lengths(top: int, left: int, mask: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """Encode part of a large image's mask as COCO's compressed run lengths, in column-major order.

    Args:
        top: Row of the mask's first row in the image.
        left: Column of the mask's first column in the image.
        mask: Object's pixels (rows, columns), bool, at least one of them true.
        height: Height of the image, pixels.
        width: Width of the image, pixels.

    Returns:
        COCO's RLE, with `size` (height, width) and `counts` as compressed text.
    """
    columns, rows = np.nonzero(mask.T)
    pixels = (columns.astype(np.int64) + left) * height + rows + top
    breaks = np.flatnonzero(np.diff(pixels) != 1)
    starts, stops = pixels[np.append(0, breaks + 1)], pixels[np.append(breaks, len(pixels) - 1)] + 1
    edges = np.stack([starts, stops], axis=1).ravel()
    counts = np.diff(np.concatenate([[0], edges, [height * width]]))
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def join_coco(out: Path, names: Iterable[str], classes: Sequence[str]) -> None:
    """Join the images' COCO parts into one file, written atomically; images without a part are skipped.

    Args:
        out: Folder of all outputs.
        names: Names of the images.
        classes: Names of the classes 1, 2, ..., which become its categories.
    """
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, 1)]
    images: list[dict[str, Any]] = []
    number = 0
    with storage.written_whole(out / COCO_FILE) as temporary, temporary.open("w") as file:
        file.write(f'{{"categories": {json.dumps(categories)}, "annotations": [')
        for name in names:
            path = out / FOLDER / f"{name}{ENDING['coco']}"
            if not path.is_file():
                continue
            part = json.loads(path.read_text())
            images.append({"id": len(images) + 1, **part["image"]})
            for annotation in part["annotations"]:
                number += 1
                file.write(",\n" if number > 1 else "\n")
                file.write(json.dumps({"id": number, "image_id": len(images), **annotation}))
        file.write(f'\n], "images": {json.dumps(images)}}}\n')
