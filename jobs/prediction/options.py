"""The settings of jobs.predict."""

from dataclasses import dataclass
from typing import Literal

from deepskip.config import setting


@dataclass(frozen=True)
class Options:
    """What is written, and with what means; all that is not told is found from the machine."""

    probabilities: bool = False
    """also write the probabilities, as float32 in the input's own format (PNG and JPEG: .npy)"""
    overlays: bool = True
    """also write pictures with the mask laid over the image, at most 2048 pixels a side"""
    polygons: Literal["none", "geojson", "coco"] = "none"
    """also write the outlines of all objects: a GeoJSON file an image, or one COCO file of all"""
    threshold: float = setting(0.5, 0, 1)
    """probability above which a pixel is foreground, for models of one class"""
    flips: bool = False
    """average the probabilities of each image and its mirrorings, which takes four times as long"""
    nodata: float | None = None
    """value of the images that stands for none, beside what their files say; nan too; null takes the training data's"""
    alpha: Literal["auto", "keep", "drop"] = "auto"
    """bands that are flagged as transparency; auto: as many are taken as the model has"""
    orientation: Literal["apply", "ignore"] = "apply"
    """images that EXIF or TIFF says are turned: apply turns them, and their masks come out turned; ignore leaves both"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """what the network computes in"""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null takes a GPU where there is one"""
    memory_gb: float | None = setting(None, 0.01)
    """what a process may take on its device for images and the network's maps; null takes 80 % of a GPU's free memory, and
    of a machine's the half of what is free for all processes there, but 3 GB at most"""
    tile: int | None = setting(None, 16, 2**20)
    """side of the tiles of large images, pixels; null finds the largest that fits into the memory"""
    batch: int | None = setting(None, 1, 65536)
    """most images or tiles that go through the network at once; null finds it from the memory"""
    workers: int | None = setting(None, 0, 65536)
    """processes on the Ray cluster at RAY_ADDRESS, or on a Ray of this machine; 0 works in this process without Ray; null takes
    one a GPU (or one a machine where there is none) of the cluster, and 0 where RAY_ADDRESS is not set"""
    cpus_per_worker: float | None = setting(None, 0.01)
    """CPU cores of each worker; null takes all of its machine's, shared among its GPUs"""
