"""Predict on a Ray cluster: Ray Data sends small groups of images to a pool of actors, each with its own model."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
import torch
from ray.data import ActorPoolStrategy, DataContext

from deepskip.checkpoint import NetworkState
from deepskip.data_shards import storage
from deepskip.jobs.prediction.inputs import Item
from deepskip.jobs.prediction.options import Options
from deepskip.jobs.prediction.segment import Outcome, PredictionWorker
from deepskip.jobs.settings import stop
from deepskip.jobs.training.allocation import start_ray

# The most small images in one group, and the most bytes of their files.
GROUP, GROUP_BYTES = 64, 2**24
# Aim for at least this many groups per worker, so that no worker is idle for long at the end.
GROUPS_A_WORKER = 4


class Worker:
    """Segment groups of images in one actor of the pool.

    Args:
        state: State of a checkpoint.
        options: Settings of the prediction.
        out: Folder of the outputs.
        made_by: Fingerprint of the model and of the settings that decide the outputs.
        threads: CPU threads of PyTorch.
        processes: Number of processes that share the device's memory.
    """

    def __init__(
        self, state: NetworkState, options: Options, out: str, made_by: str, threads: int, processes: int
    ) -> None:
        torch.set_num_threads(threads)
        self.predictor = PredictionWorker(state, options, Path(out), made_by, processes)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Segment the images of {"group": (groups,) JSON lists of items}; return {"outcome": (images,) JSON texts}."""
        items = [Item(**item) for group in batch["group"] for item in json.loads(str(group))]
        found = [json.dumps(outcome.as_dict()) for outcome in self.predictor.run(items)]
        return {"outcome": np.array(found, dtype=object)}


def over_ray(
    items: Sequence[Item], state: NetworkState, options: Options, out: Path, made_by: str
) -> Iterator[Outcome]:
    """Segment images on the cluster at RAY_ADDRESS, or on a local Ray instance.

    If a machine is lost, its groups are retried on another one, which skips the images that are already done.

    Args:
        items: The images.
        state: State of a checkpoint.
        options: Settings of the prediction.
        out: Folder of the outputs, which every machine sees.
        made_by: Fingerprint of the model and of the settings that decide the outputs.

    Yields:
        One outcome per image, as results arrive.

    Raises:
        SystemExit: The cluster has too few GPUs or CPUs for the settings, or the workers failed.
    """
    start_ray()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    gpu = bool(gpus) and (options.device is None or options.device.startswith("cuda"))
    workers = options.workers or gpus or len(nodes)
    smallest = min(node.get("CPU", 1) for node in nodes)
    on_one = math.ceil(workers / len(nodes))
    cpus = options.cpus_per_worker or max(1.0, smallest // on_one)
    if gpu and workers > gpus:
        stop(f"--workers is {workers}, one GPU each, but the cluster has {gpus} GPUs; use fewer or --device cpu")
    if not any(node.get("CPU", 0) >= cpus for node in nodes):
        stop(
            f"--cpus_per_worker is {cpus:g}, but no machine has more than {max(n.get('CPU', 0) for n in nodes):g} CPUs"
        )
    print(f"{workers} {'GPU' if gpu else 'CPU'} worker{'s' * (workers > 1)} of {cpus:g} CPUs", flush=True)

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    groups = [{"group": json.dumps([from_anywhere(item) for item in group])} for group in grouped(items, workers)]
    # A GPU belongs to one worker; the workers of a machine share its memory.
    processes = 1 if gpu else on_one
    outcomes = ray.data.from_items(groups, override_num_blocks=len(groups)).map_batches(
        Worker,
        fn_constructor_args=(state, options, str(out.absolute()), made_by, max(1, int(cpus)), processes),
        batch_size=1,
        batch_format="numpy",
        # With min_size=1 the other actors continue if a machine is lost.
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        num_gpus=1 if gpu else None,
    )
    try:
        for row in outcomes.iter_rows():
            yield Outcome(**json.loads(row["outcome"]))
    except ray.exceptions.RayError as error:
        stop(f"the workers failed: {' '.join(str(error).split())[-500:]}\nrun the same command again to resume")


def from_anywhere(item: Item) -> dict[str, Any]:
    """Return an item as a dictionary with an absolute path, because workers run in another folder."""
    if storage.is_remote(item.location):
        return asdict(item)
    return asdict(replace(item, location=str(Path(item.location.removeprefix("file://")).absolute())))


def grouped(items: Sequence[Item], workers: int) -> Iterator[list[Item]]:
    """Yield groups of neighbouring small images; a large image is a group of its own."""
    most = max(1, min(GROUP, len(items) // (workers * GROUPS_A_WORKER)))
    group: list[Item] = []
    for item in items:
        if group and (len(group) >= most or sum(each.bytes for each in group) + item.bytes > GROUP_BYTES):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
