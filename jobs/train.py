"""The training job: settings in, a run folder with checkpoints and summary.json and an MLflow run out.

Started by `deepskip train`, by any `ray job submit -- python -m deepskip.jobs.train ...`, or by hand, where it starts
a Ray of its own; with --local it trains in this process, without Ray, and without MLflow where that is not installed.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from deepskip import networks
from deepskip.cluster.settings import DRIVER_SETTINGS, of_loopback
from deepskip.config import Config
from deepskip.data_shards import storage, trouble
from deepskip.data_shards.index import BrokenIndex, Index, MissingIndex, load_index
from deepskip.jobs import report, runs
from deepskip.jobs.settings import NotHere, absolute, cache_of, ended_by_sigterm, parse, stop
from deepskip.jobs.training.tracked import log_model, send_late, tracked


def check(argv: list[str]) -> None:
    """Reads the settings and looks at the data, and at the run of that name on this machine, with no Ray started.

    Ends the program with `error:` lines where they cannot be trained on, or the run is one of other settings or data.
    """
    config, _, local = parse("train", argv)
    if local:
        stop("--local trains in the process itself, with no job to submit: deepskip train --local ...")
    data = check_data(config)
    # on a cluster the folder may be another one
    if config.run.name and of_loopback(os.environ.get("RAY_ADDRESS")):
        folder = absolute_paths(config)
        try:
            runs.check_name(folder / config.run.name, asdict(config), data)
        except runs.RunError as error:
            stop(str(error))


def absolute_paths(config: Config) -> Path:
    """Make data.path absolute, as a run's record has it, and return the folder of runs."""
    folder = absolute(config.run.storage, "run.storage")
    config.data.path = config.data.path.removeprefix("file://")
    if not storage.is_remote(config.data.path):
        config.data.path = str(absolute(config.data.path, "data.path"))
    return folder


def digest_of(split: Index) -> str:
    """Return a digest of what a split holds; packing the same samples again leaves it as it is."""
    shards = [[shard.sha256, shard.samples] for shard in split.shards]
    return hashlib.sha256(json.dumps([split.bands, split.num_classes, split.ignore_index, shards]).encode()).hexdigest()


def check_data(config: Config) -> dict[str, str] | None:
    """Ends the program where there are no shards (and none to be packed), or they do not fit the model.

    Returns a digest of each split, or None where it is still to be packed.
    """
    path = config.data.path
    if config.data.builtin and not Path(path).exists():
        check_network(config, 3, 1)
        return None
    try:
        train, validation = (load_index(storage.join(path, split), cache_of(config)) for split in ("train", "val"))
    except (MissingIndex, BrokenIndex, storage.StorageError) as error:
        stop(f"data.path is {path}: {error}", NotHere if isinstance(error, MissingIndex) else SystemExit)
    faults = []
    for key, asked, found in (
        ("model.in_channels", config.model.in_channels, train.bands),
        ("model.num_classes", config.model.num_classes, train.num_classes),
    ):
        if asked is not None and asked != found:
            faults.append(f"{key} is {asked}, but the shards at {path} have {found}; leave it out to take theirs")
    if (train.bands, train.num_classes) != (validation.bands, validation.num_classes):
        faults.append(
            f"{path}/train has {train.bands} bands and num_classes {train.num_classes}, "
            f"{path}/val {validation.bands} and {validation.num_classes}; pack them together"
        )
    if config.loss.class_weights is not None and len(config.loss.class_weights) != train.num_classes:
        faults.append(
            f"loss.class_weights has {len(config.loss.class_weights)} weights for {train.num_classes} classes"
        )
    if config.data.copy_paste and train.num_samples and max(train.shard_sizes) < 2:
        faults.append(
            f"data.copy_paste is {config.data.copy_paste:g}: it takes objects from other samples of a shard, and each shard of "
            f"{path}/train holds one; leave it out, or pack more into a shard"
        )
    if faults:
        stop("\n".join(faults))
    check_network(config, train.bands, train.num_classes)
    return {"train": digest_of(train), "val": digest_of(validation)}


def check_network(config: Config, bands: int, num_classes: int) -> None:
    """Ends the program where the network cannot be built for such data, or not as the settings say."""
    try:
        network = networks.outline(asdict(config.model), bands, num_classes)
    except (ValueError, ImportError) as error:
        stop(str(error))
    if config.run.compile != "none" and networks.brings_loss(network):
        stop(
            f"run.compile is {config.run.compile}; {config.model.network} has a loss of its own, which is not compiled"
        )


def main(argv: list[str] | None = None) -> None:
    """Trains; the exit status is 0 when the training is done and its summary is written."""
    with trouble.told(runs.GOES_ON):
        run_job(sys.argv[1:] if argv is None else argv)


def run_job(argv: list[str]) -> None:
    """Trains, with the arguments of the command line: on Ray, or with --local in this process."""
    config, stem, local = parse("train", argv)
    # torchrun takes --local for an abbreviation of its own options
    if local or "TORCHELASTIC_RUN_ID" in os.environ:
        train_here(config, stem, argv)
    else:
        launch(config, stem, on_ray, argv)


def train_here(config: Config, stem: str, argv: list[str] | None = None) -> dict[str, Any]:
    """Trains in this process, as one of torchrun's ranks where it started several; gives the summary, on rank 0."""
    from deepskip.jobs.training import local as here

    with here.ranks(config) as ranks:
        if ranks.rank:
            here.follow(config, ranks)
            return {}
        with here.others_told(ranks):
            return launch(config, stem, partial(here.fit, ranks=ranks), argv)


def on_ray(config: Config, run: runs.Run, run_id: str | None, tracker: Any) -> dict[str, Any]:
    """Trains on Ray, which is imported only now, and gives the trainer's summary."""
    prepare_environment(config.cluster.collective_timeout)
    from deepskip.jobs.training.driver import fit

    return fit(config, run, run_id, tracker)


Fit = Callable[[Config, runs.Run, str | None, Any], dict[str, Any]]


def launch(config: Config, stem: str, fit: Fit, argv: list[str] | None = None) -> dict[str, Any]:
    """Claims the run's folder, has `fit` train, keeps what comes of it, tracked by MLflow, and gives the run's summary.

    stem: the run's name where the settings have none. argv: of the command line, for what is said at the end. With `fit` in
    this process MLflow may be missing. Ends the program, with `error:` lines, where the training cannot be.
    """
    folder = absolute_paths(config)
    if config.data.builtin and not Path(config.data.path).exists():
        from deepskip.data_shards.commands import pack_coins

        print(f"packing the built-in {config.data.builtin} into {config.data.path}", flush=True)
        pack_coins(Path(config.data.path))
    data = check_data(config)
    settings = asdict(config)
    try:
        run = runs.claim(folder, config.run.name, stem, settings, data)
    except runs.RunFinished as error:
        print(f"{error.folder} is finished already; this is its result")
        summary = runs.read_json(error.folder / runs.SUMMARY)
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
    """Sets what Ray reads when it is imported; what is set already stays."""
    settings = DRIVER_SETTINGS | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{collective_timeout:g}"}
    settings |= of_loopback(os.environ.get("RAY_ADDRESS"))
    for name, value in settings.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()
