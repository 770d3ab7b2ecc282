"""Read where on a map an image lies, from its GeoTIFF tags or its world file, and write both."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

# GeoTIFF tags that are copied: scale, tie points, matrix, the GeoKeys with their numbers and texts; and GDAL's RPC tag.
TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 50844)
SCALE, TIES, MATRIX = 33550, 33922, 34264
DOUBLE = 12
# GeoTIFF's code for a user-defined coordinate reference system; EPSG codes are below it.
OWN_CODE = 32767
Tag = tuple[int, int, int, Any, bool]
Transform = tuple[float, ...]


@dataclass
class Georeference:
    """Describe where an image lies on a map.

    Attributes:
        tags: GeoTIFF tags, in the form that tifffile writes.
        transform: Map coordinates of pixel corners, as (a, b, c, d, e, f) of x' = a x + b y + c, y' = d x + e y + f.
        crs: Coordinate reference system: "EPSG:..." or WKT.
        world: Whether the transform was read from a world file.
        note: Remark for the user, or None.
    """

    tags: list[Tag] = field(default_factory=list)
    transform: Transform | None = None
    crs: str | None = None
    world: bool = False
    note: str | None = None


def of_tiff(file: tifffile.TiffFile, path: Path) -> Georeference:
    """Return the georeference of a TIFF: from its tags, else from the world file of `path`."""
    page, found = file.pages.first, file.geotiff_metadata or {}
    place = Georeference()
    for code in TAGS:
        if (tag := page.tags.get(code)) is not None:
            # Names may have letters that are not ASCII, in UTF-8.
            value = tag.value.encode() + b"\0" if isinstance(tag.value, str) else tag.value
            count = len(value) if isinstance(value, bytes) else tag.count
            place.tags.append((code, int(tag.dtype), count, value, True))
    # Read the tags themselves: they also exist in files without GeoKeys.
    values = {tag[0]: np.ravel(tag[3]).astype(float) for tag in place.tags if tag[0] in (SCALE, TIES, MATRIX)}
    ties = values.get(TIES, np.zeros(0))
    if len(values.get(MATRIX, ())) == 16:
        a, b, _, c, d, e, _, f = values[MATRIX][:8].tolist()
        place.transform = a, b, c, d, e, f
    elif len(values.get(SCALE, ())) >= 2 and len(ties) >= 6:
        (sx, sy), tie = values[SCALE][:2].tolist(), ties.tolist()
        # A scale is positive; GDAL reads a negative one as if it were.
        sy = abs(sy)
        place.transform = sx, 0.0, tie[3] - tie[0] * sx, 0.0, -sy, tie[4] + tie[1] * sy
    is_point = int(found.get("GTRasterTypeGeoKey", 1)) == 2
    if place.transform and is_point:
        # The transform refers to pixel centres (PixelIsPoint); shift it to pixel corners.
        a, b, c, d, e, f = place.transform
        place.transform = a, b, c - (a + b) / 2, d, e, f - (d + e) / 2
    if place.transform is None and len(ties) > 6:
        place.note = (
            "is georeferenced by ground control points only, so its outlines are in pixels; run gdalwarp on it first"
        )
    if place.transform is None:
        place = of_world_file(path, place)
        if place.transform is None:
            return place
        if is_point:
            # The keys, which are copied, say that the matrix is of pixel centres.
            place.tags[-1] = (MATRIX, DOUBLE, 16, matrix(of_centres(place.transform)), True)
    epsg = int(found.get("ProjectedCSTypeGeoKey", found.get("GeographicTypeGeoKey", 0)))
    if 0 < epsg < OWN_CODE:
        place.crs = f"EPSG:{epsg}"
    elif epsg == OWN_CODE or has_keys(found):
        try:
            place.crs = in_words(path)
        except ImportError:
            place.note = "has a coordinate system without an EPSG code, which only rasterio reads: pip install '.[geo]'"
            return place
    unnamed = "is georeferenced but names no coordinate system; its outlines are in the units of its transform"
    place.note = None if place.crs is not None else place.note or unnamed
    return place


def has_keys(found: dict[str, Any]) -> bool:
    """Return whether a GeoTIFF's keys name a coordinate reference system at all."""
    return any(name in found for name in ("GTModelTypeGeoKey", "GTCitationGeoKey", "PCSCitationGeoKey"))


def in_words(path: Path) -> str | None:
    """Return a file's coordinate reference system as WKT, read by rasterio, or None if it has none.

    Raises:
        ImportError: rasterio is not installed.
    """
    import rasterio  # type: ignore[import-untyped]

    with rasterio.open(path) as file:
        return file.crs.to_wkt() if file.crs else None


def world_files(path: Path) -> list[Path]:
    """Return the world files that an image may have, in the order in which they count: a.tfw, a.tifw or a.wld for a.tif."""
    ending = path.suffix[1:].lower()
    names = {ending + "w", "wld"} | ({ending[0] + ending[-1] + "w"} if len(ending) > 1 else set())
    return [path.with_suffix(f".{name}") for name in sorted(names | {each.upper() for each in names})]


def of_world_file(path: Path, place: Georeference | None = None) -> Georeference:
    """Read an image's world file: six numbers for pixel centres.

    Args:
        path: The image.
        place: Georeference to fill in; a new one by default.

    Returns:
        The georeference, unchanged if there is no readable world file.
    """
    place = place or Georeference()
    for world in world_files(path):
        try:
            a, d, b, e, x, y = (float(line) for line in world.read_text().split())
        except (OSError, ValueError):
            continue
        # World files refer to pixel centres; shift the transform to pixel corners.
        place.transform = a, b, x - (a + b) / 2, d, e, y - (d + e) / 2
        place.world = True
        place.note = (
            "is georeferenced by a world file, which names no coordinate system; its outlines are in the file's units"
        )
        place.tags.append((MATRIX, DOUBLE, 16, matrix(place.transform), True))
        return place
    beside = path.with_name(f"{path.name}.aux.xml")
    if place.note is None and beside.is_file() and b"<GeoTransform>" in beside.read_bytes():
        place.note = (
            "has its place in a file .aux.xml, which is not read, so its outlines are in pixels; make it a GeoTIFF "
            "(gdal_translate)"
        )
    return place


def matrix(transform: Transform) -> tuple[float, ...]:
    """Return a transform as GeoTIFF's 4 x 4 matrix, row by row."""
    a, b, c, d, e, f = transform
    return a, b, 0.0, c, d, e, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0


def of_centres(transform: Transform) -> Transform:
    """Return the transform of pixel centres that belongs to one of pixel corners."""
    a, b, c, d, e, f = transform
    return a, b, c + (a + b) / 2, d, e, f + (d + e) / 2


def world_file(transform: Transform) -> str:
    """Return the text of a world file, whose numbers refer to pixel centres."""
    a, b, c, d, e, f = of_centres(transform)
    return "".join(f"{value!r}\n" for value in (a, d, b, e, c, f))


def named(crs: str) -> str:
    """Return a coordinate reference system as GeoJSON's crs member names it: a URN for an EPSG code, else its WKT."""
    return f"urn:ogc:def:crs:{crs.replace(':', '::')}" if crs.startswith("EPSG:") else crs
