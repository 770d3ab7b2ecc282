"""One rank's share of a training on shards, and the events that it sends; it does not depend on Ray."""

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepskip import augment, checkpoint, identity, initial_weights, trainer
from deepskip.config import Config
from deepskip.data_shards import storage
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Batch, Shards, SkipReport
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.index import BrokenIndex, Index, MissingIndex
from deepskip.data_shards.sample import BadSample
from deepskip.data_shards.scan import BrokenShard, UnreachedShard
from deepskip.data_shards.stream import SmallCache, train_batches, whole_images
from deepskip.jobs import admissions, journal, runs
from deepskip.jobs.settings import cache_of
from deepskip.jobs.training import drift
from deepskip.jobs.training.events import Event, Measured, Panel, SampleSkipped, Started, Waiting, Warned
from deepskip.jobs.training.follower import Follower
from deepskip.training_step import DataInfo, OtherSettings

# Failures that a restart would not fix, and whose message is enough for the user.
FATAL = (
    BadSample, BrokenShard, MissingIndex, BrokenIndex, SmallCache, storage.StorageError, trainer.NonFiniteLoss,
    drift.MissingRiver, checkpoint.CheckpointNotWritten, checkpoint.CheckpointTooNew, checkpoint.CheckpointError,
    identity.OtherData, OtherSettings, admissions.OtherLog, runs.NotShared,
    journal.BrokenFile, initial_weights.OtherNetwork,
)  # fmt: skip
# Those of them that may be over when the workers start again.
PASSING = (UnreachedShard, storage.Unreached)


def train(
    config: Config,
    folder: Path,
    tell: Callable[[Event], None],
    stop_requested: Callable[[], bool],
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    ranks_here: int,
    threads: int,
    run_id: str | None,
    validated: Callable[[int], None] = lambda step: None,
) -> trainer.Summary:
    """Train one rank's share of a run.

    Args:
        config: the settings of the training.
        folder: the run's folder, for checkpoints.
        tell: takes every event; Started, Measured, Panel and Warned come on rank 0 alone.
        stop_requested: asked after every step; if it is true on any rank, all ranks write a checkpoint and stop.
        rank: number of this rank, from 0.
        world_size: number of ranks.
        device: where this rank trains.
        ranks_here: number of ranks on this machine, which share its cache.
        threads: number of torch's CPU threads; at least 1 is used.
        run_id: the MLflow run's id, stored in checkpoints; None without MLflow.
        validated: called on every rank after a validation, with the number of steps done.

    Returns:
        The trainer's summary.

    Raises:
        Exception: the errors in FATAL, which a restart would not fix.
        trainer.Preempted: if a stop was requested, after the checkpoint was written.
        runs.LeaseLost: on rank 0, if other workers have resumed this run meanwhile.
    """
    torch.set_num_threads(max(1, threads))
    runs.check_shared(folder)
    lease = runs.acquire_writer_lease(folder) if rank == 0 else ""

    def check_lease() -> None:
        runs.check_writer_lease(folder, lease)

    data, lanes = config.data, config.data.lanes
    assert lanes != "auto", "the driver chooses"
    train_shards, validation_shards = open_splits(config, folder)
    splits = {"train": identity_of(train_shards.index), "val": identity_of(validation_shards.index)}
    if rank == 0:
        # The trainer compares those of the other ranks with this one.
        runs.check_data(folder, splits)
    loader_workers = data.loader_workers
    if loader_workers is None:
        loader_workers = 4 if device.type == "cuda" else 0

    def observe(kind: str, step: int, values: dict[str, Any]) -> None:
        check_lease()
        tell(event_of(kind, step, values))

    def skipped(split: str, report: SkipReport) -> None:
        tell(SampleSkipped({"split": split, **report}))

    # drawn in the loader's processes, where there are some
    draws = partial(augment.loader_entries, config.augment, config.run.seed, train_shards.index.bands)

    def train_stream(step: int) -> Iterator[Batch]:
        if rank == 0:
            tell(Started(step, world_size))
        stream = train_batches(
            train_shards, config.run.seed, config.optim.global_batch_size, step, rank, world_size, loader_workers,
            data.shuffle_window, draws, lanes, data.fixed_lanes, ranks_here, config.optim.steps,
        )  # fmt: skip
        for batch in stream:
            for report in batch.pop("bad"):
                skipped("train", report)
            yield batch

    stream = None
    if data.follow:
        stream = Follower(
            config, folder, train_shards, rank=rank, world_size=world_size, device=device, entries=draws,
            loader_workers=loader_workers, ranks_here=ranks_here, skipped=lambda report: skipped("train", report),
            started=lambda step: tell(Started(step, world_size)), waiting=lambda step: tell(Waiting(step)),
            warn=lambda text: tell(Warned(text)), check_lease=check_lease,
        )  # fmt: skip
    with closing(stream) if stream else nullcontext():
        return trainer.train(
            config, data_info(train_shards.index, splits, data.normalize), run=folder, train_batches=train_stream,
            validation_images=lambda: whole_images(
                validation_shards, rank, world_size, lambda report: skipped("val", report), loader_workers, ranks_here
            ),
            rank=rank, world_size=world_size, device=device, observe=observe, mlflow_run_id=run_id,
            stop_requested=stop_requested, validated=validated, stream=stream,
        )  # fmt: skip


def open_splits(config: Config, folder: Path) -> tuple[Shards, Shards]:
    """Return the training split, cropped, and the validation split, with the generations that a run began with.

    Args:
        config: settings of the training.
        folder: folder of the run.
    """
    data = config.data
    crops = Crops(data.crop, data.foreground_crops, config.run.seed, data.copy_paste)
    options: dict[str, Any] = {"on_bad_sample": data.on_bad_sample, "cache": cache_of(config), "bands": data.bands}
    # What is appended while the run is trained does not change it.
    generations = runs.generations_of(folder)
    train_shards = Shards(
        storage.join(data.path, "train"), data.normalize, crops, generations=generations.get("train"), **options
    )
    validation_shards = Shards(
        storage.join(data.path, "val"), data.normalize, generations=generations.get("val"), **options
    )
    # Validation normalises as predictions will, by the training set.
    validation_shards.mean, validation_shards.std = train_shards.mean, train_shards.std
    return train_shards, validation_shards


def event_of(kind: Any, step: int, values: dict[str, Any]) -> Measured | Panel | Warned:
    """Return the event for one call of the trainer's `observe`.

    Args:
        kind: "train", "validation", "stream", "generation", "panel" or "warning".
        step: number of steps done.
        values: metrics by name; for a panel {"images": list of PanelImage}; for a warning {"text": str}.
    """
    if kind == "panel":
        return Panel(step, values["images"])
    if kind == "warning":
        return Warned(values["text"])
    assert kind in ("train", "validation", "stream", "generation")
    return Measured(kind, step, values)


def data_info(index: Index, splits: dict[str, dict[str, str | int]], normalize: str) -> DataInfo:
    """Return what the trainer must know about the data.

    Args:
        index: index of the training split.
        splits: identity of each split.
        normalize: data.normalize.
    """
    mean, std = index.normalization(normalize)
    return DataInfo(
        index.bands,
        index.num_classes,
        index.ignore_index,
        list(mean),
        list(std),
        index.preparation,
        splits,
        index.classes,
    )
