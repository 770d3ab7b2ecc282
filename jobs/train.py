"""The training job: settings in, a run folder with checkpoints and summary.json and an MLflow run out.

`deepskip train` starts it, or any `ray job submit -- python -m deepskip.jobs.train ...`. Started by hand, it starts its
own Ray. With --local it trains in this process without Ray, and without MLflow if that is not installed.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepskip import checkpoint, initial_weights, networks, weight_files
from deepskip.cluster.settings import DRIVER_SETTINGS, of_loopback
from deepskip.config import Config
from deepskip.data_shards import storage, trouble
from deepskip.data_shards.admission import replay_size
from deepskip.data_shards.bands import BandError, choose_bands
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.index import BrokenIndex, Index, MissingIndex, load_index
from deepskip.data_shards.origin import class_conflict
from deepskip.identity import TARS, Identity
from deepskip.jobs import admissions, journal, report, runs
from deepskip.jobs.settings import NotHere, absolute, cache_of, ended_by_sigterm, parse, stop
from deepskip.jobs.training.tracked import log_model, send_late, tracked

if TYPE_CHECKING:
    # It imports MLflow, which need not be installed.
    from deepskip.jobs.tracking import Tracker

# What training and validation images must have in common of how they were prepared.
PREPARED = ("bands", "longest_side", "nodata")


def check(argv: list[str]) -> None:
    """Validate the settings and the data, and a run of that name on this machine, without starting Ray.

    Args:
        argv: command-line arguments.

    Raises:
        SystemExit: status 2 after `error:` lines, if the training cannot start or the run has other settings or data;
            NotHere if the data is missing.
    """
    config, _, local = parse("train", argv)
    if local:
        stop("--local trains in the process itself, so there is no job to submit; run deepskip train --local ...")
    data = check_data(config)
    # on a cluster of other machines this path may be another folder
    if config.run.name and of_loopback(os.environ.get("RAY_ADDRESS")):
        folder = absolute_paths(config)
        try:
            runs.check_name(folder / config.run.name, asdict(config), data)
        except runs.RunError as error:
            stop(str(error))


def absolute_paths(config: Config) -> Path:
    """Make data.path, publish.path and run.weights absolute in place, as a run's record has it, and return the folder of runs.

    Args:
        config: settings of the training, changed in place.

    Raises:
        SystemExit: status 2 if a path cannot be used on a cluster.
    """
    folder = absolute(config.run.storage, "run.storage")
    config.data.path = config.data.path.removeprefix("file://")
    if not storage.is_remote(config.data.path):
        config.data.path = str(absolute(config.data.path, "data.path"))
    if config.publish.path is not None and not storage.is_remote(config.publish.path):
        config.publish.path = str(absolute(config.publish.path.removeprefix("file://"), "publish.path"))
    weights = config.run.weights
    if weights is not None and not storage.is_remote(weights):
        path = Path(weights.removeprefix("file://"))
        # The name of a model that comes with DeepSkip is no path, unless there is one.
        if path.exists() or weights not in weight_files.installed():
            config.run.weights = str(absolute(str(path), "run.weights"))
    return folder


def recorded(split: Index) -> Identity:
    """Return what a run's record holds of a split: its identity, and the digest that earlier versions recorded alone."""
    shards = [[shard.sha256, shard.samples] for shard in split.shards]
    text = json.dumps([split.bands, split.num_classes, split.ignore_index, shards])
    return identity_of(split) | {TARS: hashlib.sha256(text.encode()).hexdigest()}


def check_data(config: Config, generations: int | None = None) -> dict[str, Identity] | None:
    """Check that the shards exist and fit the settings.

    Args:
        config: settings of the training.
        generations: number of generations of the training split that the run began with; None takes all.

    Returns:
        The identity of each split, or None if the built-in data is not packed yet.

    Raises:
        SystemExit: status 2 if the shards do not fit the settings; NotHere if there are none.
    """
    path = config.data.path
    if config.data.builtin and not Path(path).exists():
        check_network(config, 3, 1)
        return None
    try:
        train = load_index(storage.join(path, "train"), cache_of(config), generations)
        validation = load_index(storage.join(path, "val"), cache_of(config))
    except (MissingIndex, BrokenIndex, storage.StorageError) as error:
        stop(f"data.path is {path}: {error}", NotHere if isinstance(error, MissingIndex) else SystemExit)
    faults = []
    try:
        train, validation = (choose_bands(split, config.data.bands) for split in (train, validation))
    except BandError as error:
        faults.append(f"data.bands is {config.data.bands}: {error}")
    for key, asked, found in (
        ("model.in_channels", config.model.in_channels, train.bands),
        ("model.num_classes", config.model.num_classes, train.num_classes),
    ):
        if asked is not None and asked != found:
            faults.append(
                f"{key} is {asked}, but the shards at {path} have {found}; remove the setting to use the shards' value"
            )
    if (train.bands, train.num_classes) != (validation.bands, validation.num_classes):
        faults.append(
            f"{path}/train has {train.bands} bands and num_classes {train.num_classes}, "
            f"{path}/val {validation.bands} and {validation.num_classes}; pack both splits with the same options"
        )
    faults += unlike(train, validation)
    for split in (train, validation):
        try:
            split.normalization(config.data.normalize)
        except ValueError as error:
            faults.append(str(error))
    if config.loss.class_weights is not None and len(config.loss.class_weights) != train.num_classes:
        faults.append(
            f"loss.class_weights has {len(config.loss.class_weights)} weights for {train.num_classes} classes"
            + (", background among them" if train.num_classes > 1 else "")
        )
    weights = config.loss.class_weights or [1.0]
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        faults.append(f"loss.class_weights is {weights}; none may be negative or infinite, one must be positive")
    batch, replay = config.optim.global_batch_size, config.data.replay
    if replay and not replay_size(batch, replay):
        faults.append(
            f"data.replay is {replay:g} of optim.global_batch_size {batch}, which replays no sample: raise either"
        )
    if config.data.copy_paste and train.num_samples and max(train.shard_sizes) < 2:
        faults.append(
            f"data.copy_paste is {config.data.copy_paste:g}: it takes objects from other samples of a shard, "
            f"but each shard of {path}/train holds one; remove the setting, or pack more samples into a shard"
        )
    if faults:
        stop("\n".join(faults))
    check_network(config, train.bands, train.num_classes)
    return {"train": recorded(train), "val": recorded(validation)}


def unlike(train: Index, validation: Index) -> list[str]:
    """Return why two splits were not packed alike: validation would measure something else than was trained, and not say so."""
    faults = []
    for name in PREPARED:
        found, other = train.preparation.get(name), validation.preparation.get(name)
        if found != other:
            mine, its = ("none" if value is None else value for value in (found, other))
            faults.append(f"{train.location} was packed with {name} {mine}, {validation.location} with {its}")
    if train.ignore_index != validation.ignore_index:
        faults.append(
            f"ignored pixels are {train.ignore_index} in {train.location}, {validation.ignore_index} in {validation.location}"
        )
    if reason := class_conflict(validation.classes, train.classes, train.location):
        faults.append(f"in {validation.location} {reason}")
    return [f"{fault}; pack both splits with the same options" for fault in faults]


def check_network(config: Config, bands: int, num_classes: int) -> None:
    """Check that the network can be built for the data.

    Args:
        config: settings of the training.
        bands: bands of the images.
        num_classes: 1 for a binary task, else the number of exclusive classes.

    Raises:
        SystemExit: status 2 if it cannot be built, or not with these settings.
    """
    try:
        network = networks.outline(asdict(config.model), bands, num_classes)
        if config.model.network in networks.installed():
            networks.check_output(network, f"model.network is {config.model.network}", bands, num_classes)
    except (ValueError, ImportError) as error:
        stop(str(error))
    # A training that has begun has its own weights.
    begun = config.run.name is not None and checkpoint.step_paths(storage.local(config.run.storage) / config.run.name)
    if config.run.weights is not None and not begun:
        try:
            initial_weights.fitting(network, config.run.weights, bands, num_classes)
        except (ValueError, ImportError, OSError, checkpoint.CheckpointError) as error:
            stop(f"run.weights is {config.run.weights}: {error}")
    if config.run.compile != "none" and networks.brings_loss(network):
        stop(
            f"run.compile is {config.run.compile}, but {config.model.network} has its own loss, which cannot be compiled; "
            "set run.compile to none"
        )


def main(argv: list[str] | None = None) -> None:
    """Train; the exit status is 0 when the training is complete and its summary is written.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: the training cannot start, failed, or was stopped.
    """
    with trouble.told(runs.GOES_ON):
        run_job(sys.argv[1:] if argv is None else argv)


def run_job(argv: list[str]) -> None:
    """Train on Ray, or in this process with --local or under torchrun.

    Args:
        argv: command-line arguments.
    """
    config, stem, local = parse("train", argv)
    # torchrun would read --local as an abbreviation of its own options
    if local or "TORCHELASTIC_RUN_ID" in os.environ:
        train_here(config, stem, argv)
    else:
        launch(config, stem, on_ray, argv)


def train_here(config: Config, stem: str, argv: list[str] | None = None) -> dict[str, Any]:
    """Train in this process, alone or as one of the ranks that torchrun started.

    Args:
        config: settings of the training.
        stem: name of the run if the settings have none.
        argv: command-line arguments, for the commands that are printed at the end; None prints none.

    Returns:
        The summary on rank 0, {} on other ranks.
    """
    from deepskip.jobs.training import local as here

    with here.ranks(config) as ranks:
        if ranks.rank:
            here.follow(config, ranks)
            return {}
        with here.others_told(ranks):
            return launch(config, stem, partial(here.fit, ranks=ranks), argv)


def on_ray(config: Config, run: runs.Run, run_id: str | None, tracker: "Tracker | None") -> dict[str, Any]:
    """Train on Ray, which is imported only here.

    Args:
        config: settings of the training.
        run: the run, locked.
        run_id: the MLflow run; None if the training is not tracked.
        tracker: sends events to the MLflow run; None if the training is not tracked.

    Returns:
        The trainer's summary.
    """
    prepare_environment(config.cluster.collective_timeout)
    from deepskip.jobs.training.driver import fit

    return fit(config, run, run_id, tracker)


Fit = Callable[[Config, runs.Run, str | None, "Tracker | None"], dict[str, Any]]


def launch(config: Config, stem: str, fit: Fit, argv: list[str] | None = None) -> dict[str, Any]:
    """Claim the folder of a run, train, and write and track the result.

    Args:
        config: settings of the training.
        stem: name of the run if the settings have none.
        fit: trains; if it trains in this process, MLflow may be missing.
        argv: command-line arguments, for the commands that are printed at the end; None prints none.

    Returns:
        The summary of the run, which may have been finished before.

    Raises:
        SystemExit: status 2 after `error:` lines, if the training cannot start.
    """
    folder = absolute_paths(config)
    if config.data.builtin and not Path(config.data.path).exists():
        from deepskip.data_shards.commands import pack_coins

        print(f"packing the built-in {config.data.builtin} into {config.data.path}", flush=True)
        pack_coins(Path(config.data.path))
    followed = folder / config.run.name if config.data.follow and config.run.name else None
    try:
        data = check_data(config, admissions.begun_with(followed) if followed else None)
    except (journal.BrokenFile, OSError) as error:
        stop(str(error))
    settings = asdict(config)
    try:
        run = runs.claim(folder, config.run.name, stem, settings, data)
    except runs.RunFinished as error:
        print(f"{error.folder} is finished already; this is its result")
        summary: dict[str, Any] = runs.read_json(error.folder / runs.SUMMARY)
        report.print_table(summary)
        send_late(error.folder, config)
        return summary
    except runs.RunError as error:
        stop(str(error))
    with run.lock, ended_by_sigterm():
        with tracked(config, run, settings, required=fit is on_ray) as mlflow_run:
            summary = fit(config, run, mlflow_run.run_id, mlflow_run.tracker)
        summary = runs.without_nan({"name": run.name, "mlflow_run_id": mlflow_run.run_id} | summary)
        runs.write_json(run.folder / runs.SUMMARY, summary)
        if mlflow_run.uri and mlflow_run.run_id:
            log_model(run.folder, mlflow_run.uri, mlflow_run.run_id)
    report.print_table(summary)
    if argv is not None:
        report.print_next_steps(config, run, mlflow_run.uri, argv)
    return summary


def prepare_environment(collective_timeout: float) -> None:
    """Set the variables that Ray reads when it is imported; variables that are already set are kept.

    Args:
        collective_timeout: seconds after which a worker that does not answer counts as lost.
    """
    settings = DRIVER_SETTINGS | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{collective_timeout:g}"}
    settings |= of_loopback(os.environ.get("RAY_ADDRESS"))
    for name, value in settings.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()
