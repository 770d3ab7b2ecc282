"""A large image brought to a longest side, as training images were, without the whole of it in memory."""

import numpy as np
from PIL import Image

from jobs.prediction.rasters import Raster

ROWS = 512


def shrunk(raster: Raster, longest_side: int) -> np.ndarray:
    """Shrinks an image as `data_shards.sample.resize_longest_side` does: (h, w, bands) of its dtype.

    The triangle filter goes along rows and then along columns, so rows can be shrunk as they are read.
    """
    share = longest_side / max(raster.height, raster.width)
    width, height = max(1, round(raster.width * share)), max(1, round(raster.height * share))
    narrow = np.empty((raster.bands, raster.height, width), np.float32)
    for top in range(0, raster.height, ROWS):
        rows = raster.read(slice(top, min(top + ROWS, raster.height)), slice(0, raster.width))
        for band in range(raster.bands):
            picture = Image.fromarray(rows[..., band].astype(np.float32))
            narrow[band, top : top + len(rows)] = np.asarray(
                picture.resize((width, len(rows)), Image.Resampling.BILINEAR)
            )
    bands = [np.asarray(Image.fromarray(band).resize((width, height), Image.Resampling.BILINEAR)) for band in narrow]
    small = np.stack(bands, axis=-1)
    if raster.dtype.kind == "f":
        return small.astype(raster.dtype)
    limits = np.iinfo(raster.dtype)
    return np.clip(np.rint(small), limits.min, limits.max).astype(raster.dtype)
