"""Write what the first tutorial needs: images/ and masks/ of coins, and new/field.tif, a GeoTIFF to segment."""

from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from deepskip.data_shards.sources.coins import coins

PAIRS = 60
ROWS, COLUMNS = 5, 7


def main() -> None:
    """Write the files into the current folder."""
    for name in ("images", "masks", "new"):
        Path(name).mkdir(exist_ok=True)
    for key, image, mask in coins("train", PAIRS, seed=1):
        Image.fromarray(image).save(f"images/{key}.png")
        Image.fromarray((mask > 0).astype(np.uint8) * 255).save(f"masks/{key}.png")
    # a mosaic of pictures that training does not see, at 0.5 m a pixel somewhere in UTM zone 33
    tiles = np.stack([image for _, image, _ in coins("val", ROWS * COLUMNS, seed=1)])
    height, width, bands = tiles.shape[1:]
    field = tiles.reshape(ROWS, COLUMNS, height, width, bands).transpose(0, 2, 1, 3, 4)
    field = field.reshape(ROWS * height, COLUMNS * width, bands)
    with rasterio.open(
        "new/field.tif", "w", driver="GTiff", height=field.shape[0], width=field.shape[1], count=bands, dtype="uint8",
        crs="EPSG:32633", transform=from_origin(500_000, 5_200_000, 0.5, 0.5),
    ) as raster:  # fmt: skip
        raster.write(field.transpose(2, 0, 1))


if __name__ == "__main__":
    main()
