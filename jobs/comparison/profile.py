"""What a network is and costs, apart from how well it does: parameters, operations, time an image and a step, memory."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from deepskip import DeepSkipUNet
from jobs.comparison.cell import CLIP_NORM, Cell, Objective, Step, prepare, tested
from jobs.comparison.rows import Row, described
from jobs.comparison.samples import Category, Split
from kernels.bench.measure import cpu_name

BANDS, SIZE = 3, 256
TIMED = 3


def synthetic(size: int, batch_size: int, device: torch.device) -> Category:
    """Makes a category of noise with two squares an image, of three bands."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, BANDS, size, size, generator=generator).to(device)
    masks = torch.zeros(batch_size, size, size, dtype=torch.uint8, device=device)
    masks[:, size // 4 : size // 3, size // 4 : size // 3] = masks[:, size // 2 : size // 2 + 4, size // 2 :] = 1
    keys = [str(i) for i in range(batch_size)]
    split = Split(keys, images, masks, images.permute(0, 2, 3, 1).cpu().numpy())
    return Category("synthetic", {"train": split, "val": split, "test": split})


def profile(
    row: Row,
    size: int,
    batch_size: int,
    device: torch.device,
    bf16: bool,
    alone: Callable[[], AbstractContextManager[None]],
) -> dict[str, Any]:
    """Measures a row's network: the entry of networks.json; what is timed is timed in `alone`.

    gflops: of one image 3 x size x size, two a multiply-add, as torch's FlopCounterMode counts the plain form (not what is
    outside convolutions and matrix products). seconds_per_image: of one image by itself. peak_memory_bytes: of a training
    step, None on a CPU. seconds_per_step: of a training step with the optimizer's.
    """
    category = synthetic(size, batch_size, device)
    network, optimizer, _ = prepare(row, category, Cell("synthetic", "", 0, 100, batch_size, 1))
    with alone():
        costs = measure(row, network, optimizer, category.splits["train"], bf16)
    plain = tested(network)
    return (
        described(row)
        | {
            "parameters": sum(p.numel() for p in plain.parameters()),
            "batch_size": batch_size,
            "image_size": size,
            "precision": "bf16" if bf16 else "fp32",
            "hardware": hardware(device),
            "torch": torch.__version__,
        }
        | costs
    )


def measure(row: Row, network: nn.Module, optimizer: torch.optim.Optimizer, train: Split, bf16: bool) -> dict[str, Any]:
    """Measures steps on the samples of `train`, and the prediction of one of them."""
    device = train.images.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    network.train()
    image = train.images.contiguous(memory_format=torch.channels_last)
    step = Step(Objective(row, network, device, bf16), image, train.masks)

    def train_once() -> None:
        step(image, train.masks)
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()

    step_seconds = seconds(train_once, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    plain, one = tested(network).eval(), image[:1]
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        image_seconds = seconds(lambda: plain(one), device)
    return {
        "gflops": round(operations(plain, one) / 1e9, 3),
        "seconds_per_image": image_seconds,
        "seconds_per_step": step_seconds,
        "cuda_graph": step.graph is not None,
        "peak_memory_bytes": peak,
    }


def operations(network: nn.Module, image: torch.Tensor) -> int:
    """Counts a forward pass's floating-point operations."""
    # what the counter does not know, our own operators, counts nothing: so their plain form
    ours = isinstance(network, DeepSkipUNet)
    if ours:
        kernels.backend.choose("reference")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(image)
    finally:
        if ours:
            kernels.backend.choose("auto")
    return counter.get_total_flops()


def seconds(action: Any, device: torch.device) -> float:
    """Gives the median time of an action, in seconds, after one that is not counted."""
    times = []
    for _ in range(TIMED + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def hardware(device: torch.device) -> str:
    """Names the device, and of a processor how many threads computed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"
