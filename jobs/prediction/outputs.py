"""All that is written for one image, as its probabilities come a few rows at a time."""

from pathlib import Path

import numpy as np

from deepskip.figures import overlay
from deepskip.inference import to_labels
from deepskip.jobs.prediction import done, features, georeference
from deepskip.jobs.prediction.features import Features
from deepskip.jobs.prediction.inputs import Item
from deepskip.jobs.prediction.options import Options
from deepskip.jobs.prediction.rasters import Raster
from deepskip.jobs.prediction.writers import Layout, Sink

# longest side of an overlay, and rows that are read at once for it
PICTURE_SIDE, PICTURE_ROWS = 2048, 256
# pictures become PNG, and their probabilities arrays: neither survives what the input's own format does to them
# what masks of each kind are; of those that are not named, the same
MASK_KIND = dict.fromkeys(("png", "jpg", "jpeg", "bmp", "gif"), "png") | {"tiff": "tif"}
PROBABILITY_KIND = dict.fromkeys(("png", "jpg", "jpeg", "bmp", "gif", "npz"), "npy") | {"tiff": "tif"}


class Outputs:
    """The files of one image; `sinks` are all of them. Without `finish` none gets its name."""

    def __init__(self, out: Path, item: Item, raster: Raster, num_classes: int, options: Options) -> None:
        self.out, self.item, self.raster, self.options, self.num_classes = out, item, raster, options, num_classes
        kind = MASK_KIND.get(item.extension, item.extension)
        # a png of 0 and 1 looks black in every viewer
        self.foreground = 255 if kind == "png" and num_classes == 1 else 1
        size = raster.height, raster.width
        tags = tuple(raster.place.tags)
        self.sinks: list[Sink | Features] = []
        ending = item.extension if kind == "tif" else kind
        self.mask = Sink(out / "masks" / f"{item.name}.{ending}", kind, Layout(size, np.dtype(np.uint8), tags))
        self.sinks.append(self.mask)
        self.probabilities = self.features = self.picture = None
        if options.probabilities:
            kind = PROBABILITY_KIND.get(item.extension, item.extension)
            ending = item.extension if kind == "tif" else kind
            shape = size if num_classes == 1 else (*size, num_classes)
            layout = Layout(shape, np.dtype(np.float32), tags)
            self.probabilities = Sink(out / "probabilities" / f"{item.name}.{ending}", kind, layout)
            self.sinks.append(self.probabilities)
        if options.polygons != "none":
            path = out / features.FOLDER / f"{item.name}{features.ENDING[options.polygons]}"
            self.features = Features(path, options.polygons, raster, f"{item.name}.{item.extension}")
            self.sinks.append(self.features)
        if options.overlays:
            self.picture = Picture(raster)
            layout = Layout((0, 0, 3), np.dtype(np.uint8))
            self.overlay = Sink(out / "overlays" / f"{item.name}.png", "png", layout)
            self.sinks.append(self.overlay)

    def rows(self, top: int, p_VrW: np.ndarray) -> None:
        """Takes the next rows of the probabilities (V, rows, width)."""
        labels = to_labels(p_VrW, self.options.threshold).astype(np.uint8)
        # of one class that is its probability itself
        likeliest = p_VrW.max(0) if self.features else labels
        self.mask.put(labels * np.uint8(self.foreground))
        if self.probabilities:
            self.probabilities.put(p_VrW[0] if self.num_classes == 1 else np.moveaxis(p_VrW, 0, -1))
        if self.features:
            self.features.rows(labels, likeliest)
        if self.picture:
            self.picture.rows(top, labels)

    def finish(self, made_by: str) -> None:
        """Gives all files their names, and notes that the image is done."""
        if self.picture:
            self.overlay.put(overlay(self.picture.image, self.picture.labels))
        for sink in self.sinks:
            sink.finish()
        place = self.raster.place
        if place.world and place.transform is not None and self.mask.path.suffix == ".png":
            world = self.mask.path.with_name(f"{self.item.name.rsplit('/', 1)[-1]}.pgw")
            world.write_text(georeference.world_file(place.transform))
        done.place(self.out, self.item, made_by, self.sinks)

    def discard(self) -> None:
        """Removes what was written."""
        for sink in self.sinks:
            sink.discard()


class Picture:
    """What an overlay is drawn of: the image and its labels, of large ones every k-th pixel, and of labels the highest."""

    def __init__(self, raster: Raster) -> None:
        self.raster = raster
        self.every = -(-max(raster.height, raster.width) // PICTURE_SIDE)
        size = -(-raster.height // self.every), -(-raster.width // self.every)
        self.image = np.zeros((*size, raster.bands), raster.dtype)
        self.labels = np.zeros(size, np.uint8)

    def rows(self, top: int, labels_rW: np.ndarray) -> None:
        """Takes the next rows of labels."""
        every, columns = self.every, slice(0, self.raster.width)
        wide = np.pad(labels_rW, ((0, 0), (0, -labels_rW.shape[1] % every)))
        narrow = wide.reshape(len(wide), -1, every).max(2)
        # so that objects smaller than k pixels are seen
        np.maximum.at(self.labels, np.arange(top, top + len(wide)) // every, narrow)
        bottom = top + len(labels_rW)
        step = max(every, PICTURE_ROWS // every * every)
        for first in range(-(-top // every) * every, bottom, step):
            seen = self.raster.read(slice(first, min(first + step, bottom)), columns)[::every, ::every]
            # where there is no value the picture is black
            seen = np.nan_to_num(seen) if self.raster.nodata else seen
            self.image[first // every : first // every + len(seen)] = seen
