"""Prediction over a Ray cluster: Ray Data hands small groups of images to a pool of actors, each with a model of its own."""

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

from deepskip.data_shards import storage
from deepskip.jobs.prediction.inputs import Item
from deepskip.jobs.prediction.options import Options
from deepskip.jobs.prediction.segment import Outcome, PredictionWorker
from deepskip.jobs.settings import stop
from deepskip.jobs.training.allocation import start_ray

# small images that an actor gets at once, and the bytes of their files
GROUP, GROUP_BYTES = 64, 2**24
# groups a worker at least, so that none is idle for long at the end
GROUPS_A_WORKER = 4


class Worker:
    """One actor of the pool. __call__: {"group": [JSON of items]} -> {"outcome": JSON of an outcome for each}."""

    def __init__(
        self, state: dict[str, Any], options: Options, out: str, made_by: str, threads: int, processes: int
    ) -> None:
        torch.set_num_threads(threads)
        self.predictor = PredictionWorker(state, options, Path(out), made_by, processes)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        items = [Item(**item) for group in batch["group"] for item in json.loads(str(group))]
        found = [json.dumps(outcome.as_dict()) for outcome in self.predictor.run(items)]
        return {"outcome": np.array(found, dtype=object)}


def over_ray(
    items: Sequence[Item], state: dict[str, Any], options: Options, out: Path, made_by: str
) -> Iterator[Outcome]:
    """Segments images on the cluster at RAY_ADDRESS, or on a Ray of this machine; gives outcomes as they come.

    A machine that is lost costs its groups a second try on another, which passes over what was done.
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
        stop(f"--workers is {workers}, each with a GPU, but the cluster has {gpus}; ask for fewer, or --device cpu")
    if not any(node.get("CPU", 0) >= cpus for node in nodes):
        stop(
            f"--cpus_per_worker is {cpus:g}, but no machine has more than {max(n.get('CPU', 0) for n in nodes):g} CPUs"
        )
    print(f"{workers} {'GPU' if gpu else 'CPU'} worker{'s' * (workers > 1)} of {cpus:g} CPUs", flush=True)

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    groups = [{"group": json.dumps([from_anywhere(item) for item in group])} for group in grouped(items, workers)]
    # a gpu is one worker's own; a machine's memory is shared
    processes = 1 if gpu else on_one
    outcomes = ray.data.from_items(groups, override_num_blocks=len(groups)).map_batches(
        Worker,
        fn_constructor_args=(state, options, str(out.absolute()), made_by, max(1, int(cpus)), processes),
        batch_size=1,
        batch_format="numpy",
        # with one machine lost the others go on
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        num_gpus=1 if gpu else None,
    )
    try:
        for row in outcomes.iter_rows():
            yield Outcome(**json.loads(row["outcome"]))
    except ray.exceptions.RayError as error:
        stop(f"the workers failed: {' '.join(str(error).split())[-500:]}\nthe same command goes on")


def from_anywhere(item: Item) -> dict[str, Any]:
    """Gives an item as plain values, its path absolute: a worker stands in another folder."""
    if storage.is_remote(item.location):
        return asdict(item)
    return asdict(replace(item, location=str(Path(item.location.removeprefix("file://")).absolute())))


def grouped(items: Sequence[Item], workers: int) -> Iterator[list[Item]]:
    """Puts neighbouring small images together; large ones stay alone."""
    most = max(1, min(GROUP, len(items) // (workers * GROUPS_A_WORKER)))
    group: list[Item] = []
    for item in items:
        if group and (len(group) >= most or sum(each.bytes for each in group) + item.bytes > GROUP_BYTES):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
