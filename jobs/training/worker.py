"""What one worker of a training does."""

import math
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train.torch import get_device

from data_shards import storage
from data_shards.crops import Crops
from data_shards.index import BrokenIndex, Index, MissingIndex
from data_shards.sample import BadSample
from data_shards.scan import BrokenShard
from data_shards.stream import Shards, train_batches, whole_images
from deepskip import checkpoint, trainer
from deepskip.config import Config
from deepskip.training_step import DataInfo
from jobs import runs
from jobs.settings import cache_of
from jobs.training import preemption
from jobs.training.events import Fatal, Finished, Measured, Panel, SampleSkipped, Started, Stopped, Warned

# longest side of the pictures in a panel, pixels
PANEL_SIDE = 512
FATAL = (
    BadSample, BrokenShard, MissingIndex, BrokenIndex, storage.StorageError, trainer.NonFiniteLoss,
    checkpoint.CheckpointNotWritten, checkpoint.CheckpointTooNew,
)  # fmt: skip


def train_worker(settings: dict[str, Any]) -> None:
    """Train on one worker; Ray starts it once on each, and again after a worker died."""
    queue = settings["queue"]
    # a fault that is told already would only be met again
    if ray.get(queue.is_over.remote()):
        return
    try:
        summary = train(settings)
    except trainer.Preempted as error:
        # ray starts the workers again, which resume at that checkpoint
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(queue.put.remote(Stopped(str(error))))
        raise
    except FATAL as error:
        ray.get(queue.put.remote(Fatal(str(error))))
        raise
    except Exception as error:
        if text := runs.disk_full(error):
            ray.get(queue.put.remote(Fatal(text)))
        raise
    if ray.train.get_context().get_world_rank() == 0:
        ray.get(queue.put.remote(Finished(summary)))


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train this worker's share and return the trainer's summary."""
    queue = settings["queue"]
    config: Config = settings["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    preemption.listen()
    if rank == 0:
        preemption.follow(queue)
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    folder = Path(settings["run"])
    lease = runs.acquire_writer_lease(folder) if rank == 0 else ""
    data = config.data
    crops = Crops(data.crop, data.foreground_crops, config.run.seed, data.copy_paste)
    options: dict[str, Any] = {"on_bad_sample": data.on_bad_sample, "cache": cache_of(config)}
    train_shards = Shards(storage.join(data.path, "train"), data.normalize, crops, **options)
    validation_shards = Shards(storage.join(data.path, "val"), data.normalize, **options)
    device = get_device()
    loader_workers = data.loader_workers
    if loader_workers is None:
        loader_workers = 4 if device.type == "cuda" else 0

    def observe(kind: str, step: int, values: dict[str, Any]) -> None:
        runs.check_writer_lease(folder, lease)
        # workers that nobody hears any more get no further
        ray.get(queue.put.remote(event_of(kind, step, values)), timeout=config.cluster.collective_timeout)

    def skipped(split: str, report: dict[str, Any]) -> None:
        queue.put.remote(SampleSkipped({"split": split} | report))

    def train_stream(step: int) -> Any:
        if rank == 0:
            queue.put.remote(Started(step, world_size))
        stream = train_batches(
            train_shards, config.run.seed, config.optim.global_batch_size, step, rank, world_size, loader_workers,
            data.shuffle_window,
        )  # fmt: skip
        for batch in stream:
            for report in batch.pop("bad"):
                skipped("train", report)
            yield batch

    return trainer.train(
        config,
        data_info(train_shards.index),
        run=folder,
        train_batches=train_stream,
        validation_images=lambda: whole_images(
            validation_shards, rank, world_size, lambda report: skipped("val", report)
        ),
        rank=rank,
        world_size=world_size,
        device=device,
        observe=observe,
        mlflow_run_id=settings["run_id"],
        stop_requested=preemption.requested,
    )


def event_of(kind: str, step: int, values: dict[str, Any]) -> Measured | Panel | Warned:
    """Make an event of what the trainer observed."""
    if kind == "panel":
        return Panel(step, [for_panel(item) for item in values["images"]])
    if kind == "warning":
        return Warned(values["text"])
    return Measured("train" if kind == "train" else "validation", step, values)


def data_info(index: Index) -> DataInfo:
    """Return what the trainer must know of the data."""
    return DataInfo(
        index.bands, index.num_classes, index.ignore_index, list(index.mean), list(index.std), index.preparation
    )


def for_panel(item: dict[str, Any]) -> dict[str, Any]:
    """Make a validation image small enough to send: three bands, at most PANEL_SIDE pixels a side, numpy, (H, W, bands)."""
    bands, height, width = item["image"].shape
    step = math.ceil(max(height, width) / PANEL_SIDE)
    shown = item["image"] if bands <= 3 else item["image"][[0, bands // 2, bands - 1]]
    return {
        "image": shown[:, ::step, ::step].permute(1, 2, 0).numpy(),
        "mask": item["mask"][::step, ::step].numpy(),
        "labels": item["labels"][::step, ::step].numpy(),
        "key": item["key"],
    }
