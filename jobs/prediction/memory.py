"""Choose the sizes of tiles and batches from the free memory."""

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
# The default budget: at most this much on a CPU, and these shares of the free memory.
CPU_LIMIT, CPU_SHARE, GPU_SHARE = 3 * GB, 0.5, 0.8
# Larger tiles save little more.
LARGEST_TILE = {"cpu": 2048, "cuda": 4096}
# Larger batches, in pixels or in images, are not faster.
BATCH_PIXELS, BATCH = {"cpu": 2**18, "cuda": 2**24}, {"cpu": 16, "cuda": 64}
# Networks other than DeepSkip are measured on an image of this side. The factor allows for memory that the measurement
# cannot see, such as the workspace of convolutions.
MEASURED_SIDE, UNSEEN = 256, 1.5


@dataclass
class Plan:
    """Sizes that fit into the memory.

    Attributes:
        tile: Side of a tile, pixels.
        pixels: Most pixels in a batch of two or more images or tiles.
        batch: Most images or tiles in a batch.
        overlap: Overlap of neighbouring tiles.
        stripe_bytes: Most bytes of a stripe of rows over the whole width of an image.
    """

    tile: int
    pixels: int
    batch: int
    overlap: Overlap
    stripe_bytes: int

    def images(self, height: int, width: int) -> int:
        """Return how many images of a size (height, width) form a batch."""
        return max(1, min(self.batch, self.pixels // (height * width)))

    def tile_of(self, width: int, bytes_a_pixel: int) -> int:
        """Return the side of the tiles for an image, such that a stripe of tiles fits into the memory as well.

        Args:
            width: Width of the image, pixels.
            bytes_a_pixel: Bytes that each pixel of a stripe takes.
        """
        multiple = self.overlap.multiple
        fitting = self.stripe_bytes // (width * bytes_a_pixel) // multiple * multiple
        return max(self.overlap.smallest_tile, min(self.tile, fitting))


def device_of(asked: str | None) -> torch.device:
    """Return the device to compute on.

    Args:
        asked: Name of the device; None takes a GPU if there is one, else the CPU.

    Raises:
        ValueError: It names no device that computes, or a GPU that this machine lacks.
    """
    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it must be cpu, cuda, cuda:1, ...") from error
    # Torch has tensors without values on it.
    if device.type == "meta":
        raise ValueError(f"device is {name!r}, which computes nothing; it must be cpu, cuda, cuda:1, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here")
    return device


def bytes_per_pixel(segmenter: Segmenter, element: int, flips: bool = False) -> int:
    """Estimate the bytes that an input pixel takes in the network at its peak.

    DeepSkip's peak is the first decoder level. There the joined branches, their inputs, and the first convolution's output
    are all in memory. On a CPU 704 bytes were measured and 708 estimated; for images enlarged twice, 2,787 and 2,868.

    Args:
        segmenter: The network with its normalisation.
        element: Bytes of an element of the network's maps.
        flips: Whether mirrored images are averaged. Adds the padded, mirrored image and the accumulated results.
    """
    network = segmenter.network
    # The raw and the normalised image, the logits and the probabilities are fp32.
    images = 4 * (2 * segmenter.bands + 3 * segmenter.num_classes)
    if not isinstance(network, DeepSkipUNet):
        return images + measured_bytes_per_pixel(segmenter) + flips * images
    branches = len(network.decoder[0].get_submodule("branches"))  # type: ignore[arg-type]
    once = images + element * network.head.in_channels * (2 * branches + 11)
    if network.enlarge > 1:
        # Each input pixel becomes enlarge**2 pixels, which take all of that and the enlarged image.
        once = images + network.enlarge**2 * once
    return once + flips * images


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all operator results that are alive at the same time.

    Attributes:
        alive: Bytes of each storage that is alive.
        peak: The most bytes that were alive at the same time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
    """Measure the bytes per pixel of a network other than DeepSkip, in fp32, on an image with sides of MEASURED_SIDE."""
    image = torch.zeros(1, segmenter.bands, MEASURED_SIDE, MEASURED_SIDE, device=segmenter.mean.device)
    with LiveBytes() as counter:
        segmenter.network(image)
    return int(counter.peak * UNSEEN / MEASURED_SIDE**2)


def budget(options: Options, device: torch.device, processes: int) -> int:
    """Return the bytes that this process may take on its device.

    Args:
        options: Settings of the prediction; `memory_gb` overrides the default budget.
        device: The device to compute on.
        processes: Number of processes that share the device's memory.
    """
    if options.memory_gb is not None:
        return int(options.memory_gb * GB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * GPU_SHARE / processes)
    return int(min(free_memory() * CPU_SHARE / processes, CPU_LIMIT))


def free_memory() -> int:
    """Return the bytes that are free on this machine, or in its container if that has a smaller limit."""
    free: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    # There are no cgroups (version 2) here.
    except (OSError, ValueError):
        pass
    return max(free, 0)


def plan(segmenter: Segmenter, options: Options, device: torch.device, processes: int = 1) -> Plan:
    """Return the sizes of tiles, batches and stripes that fit into the memory.

    Args:
        segmenter: The network with its normalisation.
        options: Settings of the prediction; `tile`, `batch` and `memory_gb` override the defaults.
        device: The device to compute on.
        processes: Number of processes that share the device's memory.
    """
    kind = device.type if device.type in LARGEST_TILE else "cpu"
    element = 2 if options.precision == "bfloat16" else 4
    # The network gets two thirds; the rest is for stripes of rows, decoded files and outputs that wait to be written.
    most = budget(options, device, processes)
    pixels = int(most * 2 / 3) // bytes_per_pixel(segmenter, element, options.flips)
    overlap, times = overlap_of(segmenter.network), enlarged_by(segmenter.network)
    smallest = overlap.smallest_tile
    tile = options.tile or max(smallest, min(int(pixels**0.5), LARGEST_TILE[kind] // times))
    tile = tile // overlap.multiple * overlap.multiple
    pixels = min(pixels, BATCH_PIXELS[kind] // times**2)
    # Stripes are in the machine's memory, even if the network is on a GPU.
    stripes = most / 4 if kind == "cpu" else max(most / 4, free_memory() / 4 / processes)
    return Plan(tile, pixels, options.batch or BATCH[kind], overlap, int(stripes))


def check_tile(options: Options, network: nn.Module) -> None:
    """Validate that `options.tile` is large enough for the network.

    Raises:
        ValueError: The tile is smaller than the overlaps of the network's tiles.
    """
    smallest = overlap_of(network).smallest_tile
    if options.tile is not None and options.tile < smallest:
        raise ValueError(f"--tile is {options.tile}; with this model it must be {smallest} or more")


def smaller(plan: Plan) -> bool:
    """Shrink a plan's batches, then its tiles, after the memory ran out.

    Args:
        plan: The plan, which is changed in place.

    Returns:
        Whether the plan could be made smaller.
    """
    smallest = plan.overlap.smallest_tile
    if plan.pixels > plan.tile**2:
        plan.pixels = max(plan.pixels // 2, plan.tile**2)
    elif plan.tile > smallest:
        plan.tile = max(smallest, int(plan.tile * 0.7) // plan.overlap.multiple * plan.overlap.multiple)
        plan.pixels = plan.tile**2
    else:
        return False
    return True
