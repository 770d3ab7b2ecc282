"""Define the settings of `deepskip predict`."""

from dataclasses import dataclass
from typing import Literal

from deepskip.config import setting


@dataclass(frozen=True)
class Options:
    """Settings of a prediction; a null value is chosen from the model or the machine."""

    probabilities: bool = False
    """also write the probabilities, as float32 in the input's own format (PNG and JPEG: .npy)"""
    overlays: bool = True
    """also write pictures with the mask drawn over the image, at most 2048 pixels a side"""
    polygons: Literal["none", "geojson", "coco"] = "none"
    """also write the outlines of all objects: one GeoJSON file per image, or one COCO file for all images"""
    threshold: float = setting(0.5, 0, 1)
    """probability above which a pixel is foreground, for models of one class"""
    flips: bool = False
    """average the probabilities of each image and its three mirrored copies, which takes four times as long"""
    nodata: float | None = None
    """value, or nan, that marks missing pixels, in addition to that in the files; null takes the training data's"""
    alpha: Literal["auto", "keep", "drop"] = "auto"
    """bands that are flagged as transparency; auto keeps or drops them to match the bands of the model"""
    orientation: Literal["apply", "ignore"] = "apply"
    """rotation named in EXIF or TIFF tags: apply rotates images and their masks; ignore rotates neither"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """data type that the network computes in"""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null takes a GPU if there is one, else the CPU"""
    memory_gb: float | None = setting(None, 0.01)
    """memory that a process may use on its device for images and the network's maps, gigabytes; null takes 80 % of a GPU's
    free memory; on a CPU, half of the free memory shared among the machine's processes, but at most 3 GB each"""
    tile: int | None = setting(None, 16, 2**20)
    """side of the tiles of large images, pixels; null takes the largest that fits into the memory"""
    batch: int | None = setting(None, 1, 65536)
    """most images or tiles in a batch; null takes as many as fit into the memory"""
    workers: int | None = setting(None, 0, 65536)
    """processes on the Ray cluster at RAY_ADDRESS, or on a local Ray instance; 0 runs in this process without Ray; null takes
    one per GPU of the cluster (one per machine if it has no GPUs), and 0 if RAY_ADDRESS is not set"""
    cpus_per_worker: float | None = setting(None, 0.01)
    """CPU cores of each worker; null shares the cores of a machine among its workers"""
