"""Measure on this machine what the scaling model of cluster/scale.py is checked against, and write it as a JSON file.

Run it as `python -m deepskip.jobs.bench.scaling`. Processes have one thread each, and use gloo on loopback. It measures
all-reduces by size over 2 to 4 processes, and a checkpoint. It also measures steps of the default network (3 x 128 x 128
crops) on 1 and 2 processes, with and without communication.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deepskip import checkpoint
from deepskip.allocator import keep_freed_memory
from deepskip.config import Config
from deepskip.kernels.bench.measure import cpu_name
from deepskip.training_step import Batch, DataInfo, TrainingStep

CROP = 128
SIZES = (1024, 16384, 262144, 2582660, 8388608)
STEPS, WARM_UP = 40, 6


def seconds_of(call: Callable[[], Any], calls: int, warm_up: int) -> list[float]:
    """Measure the seconds of each of a number of calls; in a process group the calls of all ranks begin together.

    Args:
        call: what is timed.
        calls: number of timed calls.
        warm_up: number of calls before them that are not timed.

    Returns:
        The seconds of each timed call.
    """
    seconds = []
    for index in range(warm_up + calls):
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        call()
        if index >= warm_up:
            seconds.append(time.perf_counter() - began)
    return seconds


def time_all_reduce(rank: int, world_size: int, store: str, out: str) -> None:
    """Measure all-reduces of float32 by size, as one rank; rank 0 writes [[bytes, median seconds], ...].

    Args:
        rank: rank of this process.
        world_size: number of processes.
        store: file with which the processes find each other.
        out: JSON file that rank 0 writes.
    """
    join(rank, world_size, store)
    rows = []
    for size in (32, *SIZES):
        values = torch.ones(size // 4)
        rows.append([size, statistics.median(seconds_of(partial(dist.all_reduce, values), 60, 10))])
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def time_steps(rank: int, world_size: int, store: str, out: str, images: int, together: bool) -> None:
    """Measure training steps, as one rank, with or without communication between the ranks.

    Rank 0 writes, in seconds, the mean over ranks and steps, the standard deviation over steps, and the mean over steps of the
    slowest rank's time.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        store: file with which the processes find each other.
        out: JSON file that rank 0 writes.
        images: number of images per process and step.
        together: whether the ranks train one network together; if not, each trains its own.
    """
    join(rank, world_size, store)
    keep_freed_memory()
    training = TrainingStep(Config(), DataInfo(3, 1, 255, [0.0] * 3, [1.0] * 3, {}), torch.device("cpu"), world_size)
    if together:
        training.distribute()
    else:
        criterion = training.criterion
        # Without the all-reduce, the loss is that of this rank alone.
        training.criterion.parts = lambda *inputs, **_: criterion.from_sums(criterion.sums(*inputs))  # type: ignore[method-assign]
    batch = batch_of(images)

    def step() -> None:
        training(batch)

    ranks: list[list[float]] = [[] for _ in range(world_size)]
    dist.all_gather_object(ranks, seconds_of(step, STEPS, WARM_UP))
    if rank == 0:
        mean = statistics.mean(step for seconds in ranks for step in seconds)
        deviation = statistics.mean(statistics.stdev(seconds) for seconds in ranks)
        slowest = statistics.mean(max(step) for step in zip(*ranks, strict=True))
        Path(out).write_text(json.dumps({"mean": mean, "deviation": deviation, "slowest": slowest}))
    dist.destroy_process_group()


def batch_of(images: int) -> Batch:
    """Return a batch of random crops with mean 0 and standard deviation 1.

    Args:
        images: number of crops, N.

    Returns:
        The batch: "image" (N, 3, CROP, CROP) fp32 in channels_last, "mask" (N, CROP, CROP) uint8, "mean" and "std" (N, 3),
        "weight" (N,), and the lists "epoch", "sample" and "key".
    """
    return {
        "image": torch.randn(images, 3, CROP, CROP).contiguous(memory_format=torch.channels_last),
        "mask": (torch.rand(images, CROP, CROP) < 0.1).to(torch.uint8),
        "mean": torch.zeros(images, 3), "std": torch.ones(images, 3), "weight": torch.ones(images),
        "epoch": [0] * images, "sample": list(range(images)), "key": [str(number) for number in range(images)],
    }  # fmt: skip


def join(rank: int, world_size: int, store: str) -> None:
    """Join the gloo process group on loopback, and use one thread.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        store: file with which the processes find each other.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def on_processes(worker: Callable[..., None], world_size: int, *arguments: Any) -> Any:
    """Run a worker on several processes, and return the JSON value that rank 0 wrote.

    Args:
        worker: called in each process with rank, world_size, store, out and the other arguments.
        world_size: number of processes.
        *arguments: further arguments of the worker.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        mp.spawn(worker, (world_size, f"{folder}/store", str(out), *arguments), nprocs=world_size)
        return json.loads(out.read_text())


def time_checkpoint() -> tuple[float, int]:
    """Measure a full checkpoint, with weights, their moving average and the optimizer's state.

    Returns:
        Median seconds to save it, and its bytes.
    """
    training = TrainingStep(Config(), DataInfo(3, 1, 255, [0.0] * 3, [1.0] * 3, {}), torch.device("cpu"))
    training(batch_of(1))
    state = training.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt"
        return statistics.median(seconds_of(lambda: checkpoint.save(state, path), 9, 2)), path.stat().st_size


def measure() -> dict[str, Any]:
    """Run all measurements, and return them with a description of the machine."""
    seconds, size = time_checkpoint()
    return {
        "machine": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        },
        "all_reduce": {str(n): on_processes(time_all_reduce, n) for n in (2, 3, 4)},
        "alone": {str(images): on_processes(time_steps, 1, images, False) for images in (2, 4, 8)},
        "beside": {str(images): on_processes(time_steps, 2, images, False) for images in (2, 4, 8)},
        "together": {str(images): on_processes(time_steps, 2, images, True) for images in (2, 4, 8)},
        "checkpoint": {"seconds": seconds, "bytes": size},
    }


def main(argv: list[str] | None = None) -> None:
    """Run all measurements, and write the file.

    Args:
        argv: command-line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m deepskip.jobs.bench.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    arguments = parser.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(measure(), indent=1) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
