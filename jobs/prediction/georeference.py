"""Where on a map an image lies: a GeoTIFF's tags, or the world file beside it; and in what words a map is named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

# tags of a GeoTIFF that say where it lies: scale, tie points, matrix, the keys with their numbers and texts; GDAL's RPC
TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 50844)
SCALE, TIES, MATRIX = 33550, 33922, 34264
DOUBLE = 12
# codes of GeoTIFF beyond this one are none of EPSG's
OWN_CODE = 32767
Tag = tuple[int, int, int, Any, bool]
Transform = tuple[float, ...]


@dataclass
class Georeference:
    """Where an image lies.

    tags: a GeoTIFF's, as tifffile writes them. transform: from x, y of pixel corners to the map, as (a, b, c, d, e, f) of
    x' = a x + b y + c, y' = d x + e y + f. crs: "EPSG:...", or the map in words (WKT). world: the transform is of a world file.
    note: what a person should know of it.
    """

    tags: list[Tag] = field(default_factory=list)
    transform: Transform | None = None
    crs: str | None = None
    world: bool = False
    note: str | None = None


def of_tiff(file: tifffile.TiffFile, path: Path) -> Georeference:
    """Reads where a TIFF lies."""
    page, found = file.pages.first, file.geotiff_metadata or {}
    place = Georeference()
    for code in TAGS:
        if (tag := page.tags.get(code)) is not None:
            place.tags.append((code, int(tag.dtype), 0 if isinstance(tag.value, str) else tag.count, tag.value, True))
    # by their tags, which are there without a map's keys too
    values = {tag[0]: np.ravel(tag[3]).astype(float) for tag in place.tags if tag[0] in (SCALE, TIES, MATRIX)}
    ties = values.get(TIES, np.zeros(0))
    if len(values.get(MATRIX, ())) == 16:
        a, b, _, c, d, e, _, f = values[MATRIX][:8].tolist()
        place.transform = a, b, c, d, e, f
    elif len(values.get(SCALE, ())) >= 2 and len(ties) >= 6:
        (sx, sy), tie = values[SCALE][:2].tolist(), ties.tolist()
        place.transform = sx, 0.0, tie[3] - tie[0] * sx, 0.0, -sy, tie[4] + tie[1] * sy
    if place.transform and int(found.get("GTRasterTypeGeoKey", 1)) == 2:
        # the numbers are of pixels' centres
        a, b, c, d, e, f = place.transform
        place.transform = a, b, c - (a + b) / 2, d, e, f - (d + e) / 2
    if place.transform is None and len(ties) > 6:
        place.note = "lies on its map by ground control points alone, so its outlines are in pixels: gdalwarp it first"
    if place.transform is None:
        return of_world_file(path, place)
    epsg = int(found.get("ProjectedCSTypeGeoKey", found.get("GeographicTypeGeoKey", 0)))
    if 0 < epsg < OWN_CODE:
        place.crs = f"EPSG:{epsg}"
    elif epsg == OWN_CODE or has_keys(found):
        try:
            place.crs = in_words(path)
        except ImportError:
            place.note = "names its map by no code of EPSG's, which rasterio reads: pip install '.[geo]'"
            return place
    if place.crs is None:
        place.note = "has a place on a map but does not say on which: its outlines are in that map's units"
    return place


def has_keys(found: dict[str, Any]) -> bool:
    """Says whether a GeoTIFF names a map at all."""
    return any(name in found for name in ("GTModelTypeGeoKey", "GTCitationGeoKey", "PCSCitationGeoKey"))


def in_words(path: Path) -> str | None:
    """Names a map that has no code of EPSG's, as WKT by rasterio; None where a file names none. Raises ImportError."""
    import rasterio  # type: ignore[import-untyped]

    with rasterio.open(path) as file:
        return file.crs.to_wkt() if file.crs else None


def of_world_file(path: Path, place: Georeference | None = None) -> Georeference:
    """Reads the world file beside an image: six numbers, of pixels' centres, as a.tfw, a.tifw or a.wld of a.tif."""
    place = place or Georeference()
    ending = path.suffix[1:]
    names = {ending + "w", "wld"} | ({ending[0] + ending[-1] + "w"} if len(ending) > 1 else set())
    for name in sorted(names | {each.upper() for each in names}):
        world = path.with_suffix(f".{name}")
        try:
            a, d, b, e, x, y = (float(line) for line in world.read_text().split())
        except (OSError, ValueError):
            continue
        # of pixels' corners
        place.transform = a, b, x - (a + b) / 2, d, e, y - (d + e) / 2
        place.world = True
        place.note = "lies on a map by a world file, which does not say on which: its outlines are in that map's units"
        place.tags.append((MATRIX, DOUBLE, 16, matrix(place.transform), True))
        return place
    return place


def matrix(transform: Transform) -> tuple[float, ...]:
    """Gives a transform as GeoTIFF's matrix of 4 x 4."""
    a, b, c, d, e, f = transform
    return a, b, 0.0, c, d, e, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0


def world_file(transform: Transform) -> str:
    """Gives the text of a world file."""
    a, b, c, d, e, f = transform
    return "".join(f"{value!r}\n" for value in (a, d, b, e, c + (a + b) / 2, f + (d + e) / 2))


def named(crs: str) -> str:
    """Gives the name of a map as GeoJSON's crs member has it: a URN for a code, else its words."""
    return f"urn:ogc:def:crs:{crs.replace(':', '::')}" if crs.startswith("EPSG:") else crs
