"""How large tiles and batches may be, from the memory that is free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepskip.inference import Segmenter, enlarged_by
from deepskip.jobs.prediction.options import Options
from deepskip.network import DeepSkipUNet
from deepskip.tiling import Overlap, overlap_of

GB = 10**9
# of a budget that nobody set: what a machine's process may take at most, and its share of what is free
CPU_LIMIT, CPU_SHARE, GPU_SHARE = 3 * GB, 0.5, 0.8
# larger tiles save little more
LARGEST_TILE = {"cpu": 2048, "cuda": 4096}
# pixels and images in a batch beyond which nothing gets faster
BATCH_PIXELS, BATCH = {"cpu": 2**18, "cuda": 2**24}, {"cpu": 16, "cuda": 64}
# side of the image that another network's memory is measured on; and for what cannot be seen, convolutions' work space
MEASURED_SIDE, UNSEEN = 256, 1.5


@dataclass
class Plan:
    """tile: side of a tile. batch, pixels: most images or tiles that go through at once, and their pixels if more than one.

    stripe_bytes: what rows over the whole width may take.
    """

    tile: int
    pixels: int
    batch: int
    overlap: Overlap
    stripe_bytes: int

    def images(self, height: int, width: int) -> int:
        """Says how many images of a size go through at once."""
        return max(1, min(self.batch, self.pixels // (height * width)))

    def tile_of(self, width: int, bytes_a_pixel: int) -> int:
        """Gives the side of the tiles of an image so wide that stripes of them, of so many bytes a pixel, fit too."""
        multiple = self.overlap.multiple
        fitting = self.stripe_bytes // (width * bytes_a_pixel) // multiple * multiple
        return max(self.overlap.smallest_tile, min(self.tile, fitting))


def device_of(options: Options) -> torch.device:
    """Gives the device to compute on; raises ValueError for one that is not there."""
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name}; it must be cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name}, but torch sees {torch.cuda.device_count()} GPUs here")
    return device


def bytes_per_pixel(segmenter: Segmenter, element: int, flips: bool = False) -> int:
    """Estimates the memory that a pixel takes in the network at its widest place, in DeepSkip the first decoder level.

    There the joined branches, what they are made of, and the first convolution's output are all in memory; 704 bytes were
    measured on a CPU where this gives 708, and of images enlarged twice 2,787 where it gives 2,868. element: bytes.
    flips: beside that, the image padded and turned round, and what the mirrorings before gave.
    """
    network = segmenter.network
    # the raw and the normalised image, logits and probabilities are fp32
    images = 4 * (2 * segmenter.bands + 3 * segmenter.num_classes)
    if not isinstance(network, DeepSkipUNet):
        return images + measured_bytes_per_pixel(segmenter) + flips * images
    branches = len(network.decoder[0].get_submodule("branches"))  # type: ignore[arg-type]
    once = images + element * network.head.in_channels * (2 * branches + 11)
    if network.enlarge > 1:
        # all that, and the enlarged image, for each pixel that becomes of one
        once = images + network.enlarge**2 * once
    return once + flips * images


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all results that are alive at once; peak: the most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for each in tree_leaves(results):
            if isinstance(each, torch.Tensor):
                self.alive[StorageWeakRef(each.untyped_storage())] = each.untyped_storage().nbytes()
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return results


@torch.no_grad()
def measured_bytes_per_pixel(segmenter: Segmenter) -> int:
    """Measures what another network than ours has alive at once, in fp32, on an image of MEASURED_SIDE pixels a side."""
    image = torch.zeros(1, segmenter.bands, MEASURED_SIDE, MEASURED_SIDE, device=segmenter.mean.device)
    with LiveBytes() as counter:
        segmenter.network(image)
    return int(counter.peak * UNSEEN / MEASURED_SIDE**2)


def budget(options: Options, device: torch.device, processes: int) -> int:
    """Gives the bytes that this process may take on its device, which so many processes share."""
    if options.memory_gb is not None:
        return int(options.memory_gb * GB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * GPU_SHARE / processes)
    return int(min(free_memory() * CPU_SHARE / processes, CPU_LIMIT))


def free_memory() -> int:
    """Gives the bytes that are free on this machine, or in the container that we are in."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    # no such thing here
    except (OSError, ValueError):
        pass
    return max(free, 0)


def plan(segmenter: Segmenter, options: Options, device: torch.device, processes: int = 1) -> Plan:
    """Finds the sizes that fit."""
    kind = device.type if device.type in LARGEST_TILE else "cpu"
    element = 2 if options.precision == "bfloat16" else 4
    # a third is left for stripes of rows, decoded files and what waits to be written
    most = budget(options, device, processes)
    pixels = int(most * 2 / 3) // bytes_per_pixel(segmenter, element, options.flips)
    overlap, times = overlap_of(segmenter.network), enlarged_by(segmenter.network)
    smallest = overlap.smallest_tile
    tile = options.tile or max(smallest, min(int(pixels**0.5), LARGEST_TILE[kind] // times))
    tile = tile // overlap.multiple * overlap.multiple
    pixels = min(pixels, BATCH_PIXELS[kind] // times**2)
    # stripes are the machine's, also where the network is on a GPU
    stripes = most / 4 if kind == "cpu" else max(most / 4, free_memory() / 4 / processes)
    return Plan(tile, pixels, options.batch or BATCH[kind], overlap, int(stripes))


def check_tile(options: Options, network: nn.Module) -> None:
    """Raises ValueError where a tile that was asked for is too small for the network."""
    smallest = overlap_of(network).smallest_tile
    if options.tile is not None and options.tile < smallest:
        raise ValueError(f"--tile is {options.tile}; with this model it must be {smallest} or more")


def smaller(plan: Plan) -> bool:
    """Makes a plan take less memory after it was too much; False where it cannot."""
    smallest = plan.overlap.smallest_tile
    if plan.pixels > plan.tile**2:
        plan.pixels = max(plan.pixels // 2, plan.tile**2)
    elif plan.tile > smallest:
        plan.tile = max(smallest, int(plan.tile * 0.7) // plan.overlap.multiple * plan.overlap.multiple)
        plan.pixels = plan.tile**2
    else:
        return False
    return True
