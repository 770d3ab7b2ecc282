"""Segment a GeoTIFF with a trained model and write its objects as polygons in map coordinates: MODEL IN.tif OUT.geojson."""

import json
import sys
from pathlib import Path

import numpy as np
import rasterio
from rasterio.features import shapes

import deepskip


def main(model: str, raster: str, out: str) -> int:
    """Write the polygons and return their number. Large rasters: `deepskip predict` reads and writes by windows."""
    with rasterio.open(raster) as source:
        image = np.moveaxis(source.read(), 0, -1)  # (height, width, bands)
        transform, crs = source.transform, source.crs
    mask = deepskip.load(model).predict(image)  # (height, width)
    features = [
        {"type": "Feature", "geometry": geometry, "properties": {"class": int(value)}}
        for geometry, value in shapes(mask, mask=mask > 0, transform=transform)
    ]
    name = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{crs.to_epsg()}"}}
    Path(out).write_text(json.dumps({"type": "FeatureCollection", "crs": name, "features": features}))
    print(f"{len(features)} polygons in {out}")
    return len(features)


if __name__ == "__main__":
    main(*sys.argv[1:])
