"""Write all outputs of one image while its probabilities arrive a few rows at a time."""

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

# The longest side of an overlay, and the number of image rows that are read at once to draw it.
PICTURE_SIDE, PICTURE_ROWS = 2048, 256
# Formats of masks and probabilities by the format of the image; formats that are not listed stay the same. Pictures get PNG
# masks and npy probabilities, because their own formats are lossy or cannot hold such values.
MASK_KIND = dict.fromkeys(("png", "jpg", "jpeg", "bmp", "gif"), "png") | {"tiff": "tif"}
PROBABILITY_KIND = dict.fromkeys(("png", "jpg", "jpeg", "bmp", "gif", "npz"), "npy") | {"tiff": "tif"}


class Outputs:
    """Write the files of one image; none gets its final name before `finish`.

    Args:
        out: Folder of all outputs.
        item: The image's item.
        raster: The open image.
        num_classes: Number of classes of the model; 1 is binary.
        options: Settings of the prediction, which choose the outputs.
    """

    def __init__(self, out: Path, item: Item, raster: Raster, num_classes: int, options: Options) -> None:
        self.out, self.item, self.raster, self.options, self.num_classes = out, item, raster, options, num_classes
        kind = MASK_KIND.get(item.extension, item.extension)
        # A PNG of 0 and 1 looks black in every viewer.
        self.foreground = 255 if kind == "png" and num_classes == 1 else 1
        size = raster.height, raster.width
        tags = tuple(raster.place.tags)
        self.sinks: list[Sink | Features] = []
        ending = item.extension if kind == "tif" else kind
        self.mask = Sink(out / "masks" / f"{item.name}.{ending}", kind, Layout(size, np.dtype(np.uint8), tags))
        self.sinks.append(self.mask)
        place = raster.place
        if place.world and place.transform is not None and kind == "png":
            text = np.frombuffer(georeference.world_file(place.transform).encode(), np.uint8)
            world = Sink(out / "masks" / f"{item.name}.pgw", "pgw", Layout(text.shape, text.dtype))
            world.put(text)
            self.sinks.append(world)
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
            self.features = Features(path, options.polygons, raster, item.file_name)
            self.sinks.append(self.features)
        if options.overlays:
            self.picture = Picture(raster)
            layout = Layout((0, 0, 3), np.dtype(np.uint8))
            self.overlay = Sink(out / "overlays" / f"{item.name}.png", "png", layout)
            self.sinks.append(self.overlay)

    def rows(self, top: int, p_VrW: np.ndarray) -> None:
        """Write the next rows.

        Args:
            top: Row of the image at which they begin.
            p_VrW: Probabilities (V, rows, W).
        """
        labels = to_labels(p_VrW, self.options.threshold).astype(np.uint8)
        # With one class this is its probability itself. Only outlines use it.
        likeliest = p_VrW.max(0) if self.features else labels
        self.mask.put(labels * np.uint8(self.foreground))
        if self.probabilities:
            self.probabilities.put(p_VrW[0] if self.num_classes == 1 else np.moveaxis(p_VrW, 0, -1))
        if self.features:
            self.features.rows(labels, likeliest)
        if self.picture:
            self.picture.rows(top, labels)

    def finish(self, made_by: str) -> None:
        """Complete all files, rename them to their final names, and record that the image is done.

        Args:
            made_by: Fingerprint of the model and of the settings that decide the outputs.
        """
        if self.picture:
            self.overlay.put(overlay(self.picture.image, self.picture.labels))
        for sink in self.sinks:
            sink.finish()
        done.place(self.out, self.item, made_by, self.sinks)

    def discard(self) -> None:
        """Stop writing and remove the temporary files."""
        for sink in self.sinks:
            sink.discard()


class Picture:
    """Collect the image and the labels that an overlay is drawn from, reduced by a whole factor k for large images.

    The image keeps every k-th pixel, the labels keep the highest label of each k x k pixels.

    Args:
        raster: The open image.

    Attributes:
        every: The factor k.
        bands: Bands of the raster that are kept: all, or three of many.
        image: Reduced image (h, w, bands); of many bands, as floating-point numbers.
        labels: Reduced labels (h, w), uint8.
    """

    def __init__(self, raster: Raster) -> None:
        self.raster = raster
        self.every = -(-max(raster.height, raster.width) // PICTURE_SIDE)
        size = -(-raster.height // self.every), -(-raster.width // self.every)
        # Those that a picture shows of many bands; as floats, which are not taken for red, green and blue.
        self.bands = slice(None) if raster.bands <= 3 else [0, raster.bands // 2, raster.bands - 1]
        shown, dtype = (
            (raster.bands, raster.dtype) if raster.bands <= 3 else (3, np.result_type(raster.dtype, np.float16))
        )
        self.image = np.zeros((*size, shown), dtype)
        self.labels = np.zeros(size, np.uint8)

    def rows(self, top: int, labels_rW: np.ndarray) -> None:
        """Add the next rows.

        Args:
            top: Row of the image at which they begin.
            labels_rW: Labels (rows, W), uint8.
        """
        every, columns = self.every, slice(0, self.raster.width)
        wide = np.pad(labels_rW, ((0, 0), (0, -labels_rW.shape[1] % every)))
        narrow = wide.reshape(len(wide), -1, every).max(2)
        # The highest label keeps objects smaller than k pixels visible.
        np.maximum.at(self.labels, np.arange(top, top + len(wide)) // every, narrow)
        bottom = top + len(labels_rW)
        step = max(every, PICTURE_ROWS // every * every)
        for first in range(-(-top // every) * every, bottom, step):
            seen = self.raster.read(slice(first, min(first + step, bottom)), columns)[::every, ::every]
            self.image[first // every : first // every + len(seen)] = seen[..., self.bands]
