"""The training job: settings in, a run folder with checkpoints and summary.json and an MLflow run out.

Started by `python -m jobs.submit train`, by any `ray job submit -- python -m jobs.train ...`, or by hand, where it starts
a Ray of its own.
"""

import math
import os
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.settings import DRIVER_SETTINGS, LOOPBACK_ONLY
from data_shards import storage
from data_shards.index import BrokenIndex, Index, MissingIndex, load_index
from deepskip.config import Config
from jobs import report, runs
from jobs.settings import NotHere, parse, stop

POLL_SECONDS = 0.5
# a job that is stopped waits so long for its workers' last checkpoint; less than heads give it (RAY_JOB_STOP_WAIT_TIME_S)
STOP_SECONDS = 15.0
# exit status of a program that SIGTERM has ended
STOPPED = 128 + signal.SIGTERM
# longest side of the pictures in a panel, pixels
PANEL_SIDE = 512


def check(argv: list[str]) -> None:
    """Reads the settings and looks at the data; ends the program with `error:` lines where they cannot be trained on."""
    config, _ = parse("train", argv)
    check_data(config)


def check_data(config: Config) -> None:
    """Ends the program where there are no shards (and none to be packed), or they do not fit the model."""
    path = config.data.path
    if config.data.builtin and not Path(path).exists():
        return
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


def cache_of(config: Config) -> storage.Cache:
    """Gives the cache for remote shards that the config describes."""
    return storage.Cache(Path(config.data.cache_dir), int(config.data.cache_gb * 1e9))


def main(argv: list[str] | None = None) -> None:
    """Trains; the exit status is 0 when the training is done and its summary is written."""
    try:
        run_job(sys.argv[1:] if argv is None else argv)
    except OSError as error:
        if text := runs.disk_full(error):
            stop(text)
        raise


def run_job(argv: list[str]) -> None:
    """Trains, with the arguments of the command line."""
    config, stem = parse("train", argv)
    folder = absolute(config.run.storage, "run.storage")
    config.data.path = config.data.path.removeprefix("file://")
    if not storage.is_remote(config.data.path):
        config.data.path = str(absolute(config.data.path, "data.path"))
    if config.data.builtin and not Path(config.data.path).exists():
        from data_shards.__main__ import pack_coins

        print(f"packing the built-in {config.data.builtin} into {config.data.path}", flush=True)
        pack_coins(Path(config.data.path))
    check_data(config)
    settings = asdict(config)
    try:
        run = runs.claim(folder, config.run.name, stem, settings)
    except runs.RunFinished as error:
        print(f"{error.folder} is finished already; this is its result")
        report.print_table(runs.read_json(error.folder / runs.SUMMARY))
        send_late(error.folder, config)
        return
    except runs.RunError as error:
        stop(str(error))
    listen_to_sigterm()

    from jobs import tracking

    uri = tracking.tracking_uri(folder, config.run.tracking_uri)
    try:
        run_id = tracking.start_run(uri, folder, config.run.experiment, run.name, run.mlflow_run_id, settings)
    except tracking.TrackingUnreachable as error:
        stop(str(error))
    runs.record(run, settings, run_id)
    validation = load_index(storage.join(config.data.path, "val"), cache_of(config))
    tracker = tracking.Tracker(uri, run_id, validation.ignore_index, run.folder / runs.JOURNAL)
    tracker.start()
    status = "FAILED"
    try:
        with tracking.system_metrics(run_id):
            summary = fit(config, run, run_id, tracker)
        summary = {"name": run.name, "mlflow_run_id": run_id} | summary
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt) as error:
        # a fault that was told apart ends with 2; anything else is somebody stopping the job
        status = "FAILED" if getattr(error, "code", None) == 2 else "KILLED"
        raise
    finally:
        if fault := tracker.finish(status):
            print(f"warning: MLflow at {uri} did not take everything, the same command sends it: {fault}", flush=True)
            with suppress(OSError):
                runs.write_json(run.folder / runs.UNSENT, {"status": status})
    log_model(run, run_id)
    runs.write_json(run.folder / runs.SUMMARY, runs.without_nan(summary))
    report.print_table(summary)
    report.print_next_steps(config, run, uri, argv)


def send_late(folder: Path, config: Config) -> None:
    """Sends what MLflow did not take of a run that is finished, its status above all."""
    from jobs import tracking

    unsent = runs.read_json(folder / runs.UNSENT)
    if not unsent:
        return
    uri = tracking.tracking_uri(folder.parent, config.run.tracking_uri)
    run_id = runs.read_json(folder / runs.RECORD)["mlflow_run_id"]
    validation = load_index(storage.join(config.data.path, "val"), cache_of(config))
    fault = tracking.Tracker(uri, run_id, validation.ignore_index, folder / runs.JOURNAL).finish(unsent["status"])
    if fault:
        print(f"warning: MLflow at {uri} did not take everything, the same command sends it: {fault}", flush=True)
        return
    (folder / runs.UNSENT).unlink()
    print(f"MLflow at {uri} has now what it did not take before")


def absolute(path: str, key: str) -> Path:
    """Makes a path absolute; ends the program where it is relative to a folder that Ray will remove."""
    if storage.is_remote(path):
        stop(
            f"{key} is {path}: a job keeps its lock, its record and its tracking database beside the checkpoints, and needs a "
            "file system for them; give a path that every machine sees (deepskip.trainer.train alone takes URLs)"
        )
    if not Path(path).is_absolute() and "runtime_resources" in Path.cwd().parts:
        stop(f"{key} is {path}, relative to a copy of your folder on the cluster; give a path that every machine sees")
    return Path(path).absolute()


def listen_to_sigterm() -> None:
    """Makes SIGTERM an ordinary end of the program: whoever stops the job gets a last checkpoint and an ended MLflow run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))


def prepare_environment(collective_timeout: float) -> None:
    """Sets what Ray reads when it is imported; what is set already stays."""
    settings = DRIVER_SETTINGS | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{collective_timeout:g}"}
    if not os.environ.get("RAY_ADDRESS"):
        settings |= LOOPBACK_ONLY
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def fit(config: Config, run: runs.Run, run_id: str, tracker: Any) -> dict[str, Any]:
    """Runs the training on Ray and passes on what it says while it goes; gives the trainer's summary."""
    asked = config.cluster
    prepare_environment(asked.collective_timeout)

    import ray
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    from jobs import scaling

    ray.init(log_to_driver=False, logging_level="ERROR", **scaling.own_ray())
    # ray has put itself before our handler, and would abort the process 3 s after the signal
    listen_to_sigterm()
    given = scaling.resources(asked)
    mailbox = ray.remote(Mailbox).options(**scaling.beside_driver()).remote(run.folder / runs.JOURNAL)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "run": str(run.folder), "run_id": run_id, "mailbox": mailbox},
        scaling_config=scaling.scaling_config(asked, given),
        torch_config=scaling.ProcessGroup(timeout_s=asked.collective_timeout),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run.folder),
            # how often is for the driver to say, which sees whether the training came further
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[scaling.Failures(mailbox)],
        ),
    )
    scaling.claim_machines(trainer, run.folder / runs.MACHINES)
    result: dict[str, Any] = {}
    bad_samples = runs.BadSamples(run.folder)
    watch = scaling.Watch(asked, config.run.checkpoint_every)
    done, stopped = threading.Event(), threading.Event()

    def deliver() -> None:
        for kind, step, values, stamp in ray.get(mailbox.drain.remote(), timeout=asked.collective_timeout):
            if kind in ("summary", "fatal"):
                result[kind] = values
            elif kind in ("warning", "stopped"):
                print(f"warning: {values['text']}", flush=True)
                if kind == "stopped":
                    stopped.set()
            elif kind == "bad_sample":
                if bad_samples.add(values):
                    print(f"warning: left out {values['key']} of {values['shard']}: {values['reason']}", flush=True)
            elif kind == "failure":
                watch.failed(values["text"])
                if "fatal" not in result:
                    print(f"warning: the workers stopped: {values['text']}", flush=True)
            elif kind == "start":
                watch.started(step)
                if watch.starts > 1:
                    workers = f"{values['workers']} worker{'s' * (values['workers'] > 1)}"
                    print(f"going on after step {step} with {workers}", flush=True)
            else:
                if kind == "train":
                    watch.came_to(step)
                    print(report.progress_line(step, config.optim.steps, values), flush=True)
                tracker.take(kind, step, values, stamp)

    def follow() -> None:
        while not done.wait(POLL_SECONDS):
            try:
                deliver()
            except Exception as error:
                # with nobody to listen the training would go on unseen
                result["fatal"] = {"text": f"what the workers said could not be passed on: {error!r}"}
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if given.fewest < given.most:
                scaling.look_at_machines()
            if "fatal" not in result and (reason := watch.reason_to_give_up()):
                result["fatal"] = {"text": reason}
                # only the main thread can leave trainer.fit
                os.kill(os.getpid(), signal.SIGTERM)

    print(f"training {run.name} on {given}, {config.optim.steps} steps", flush=True)
    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        done.set()
        follower.join()
        deliver()
        if "fatal" not in result:
            stop(f"the training failed:\n{error}")
    except SystemExit:
        if "fatal" not in result:
            if watch.waiting_since is None:
                stopped.clear()
                mailbox.stop.remote()
                stopped.wait(STOP_SECONDS)
            # ray makes 1 of whatever status a program ends with inside of its calls
            sys.exit(STOPPED)
    finally:
        # until it has ended: what it drained and has not passed on is in nobody else's hands. It waits for no server, and for
        # the mailbox no longer than the collective timeout
        done.set()
        follower.join()
    if "fatal" in result:
        stop(result["fatal"]["text"])
    deliver()
    if len(bad_samples):
        tracker.take_file(bad_samples.path)
        print(f"warning: {len(bad_samples)} samples were left out; {bad_samples.path} lists them", flush=True)
    if "fatal" in result:
        stop(result["fatal"]["text"])
    return result["summary"] | {"bad_samples": len(bad_samples)}


class Mailbox:
    """Takes events from workers and hands them out; outlives the workers that put them in.

    What was measured is in the journal before the worker hears that it was taken, so a driver may be killed at any time.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.events: list[tuple[str, int, dict[str, Any], int]] = []
        self.over = False

    def put(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Takes one event."""
        self.over = self.over or kind == "fatal"
        stamp = runs.write_down(self.journal, kind, step, values) if kind in ("train", "validation") else 0
        self.events.append((kind, step, values, stamp))

    def drain(self) -> list[tuple[str, int, dict[str, Any], int]]:
        """Hands out all events since the last call."""
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        """Takes note that the job is being stopped."""
        self.over = True

    def is_over(self) -> bool:
        """Says whether the job is being stopped, or a worker met a fault that no restart mends."""
        return self.over


def train_worker(settings: dict[str, Any]) -> None:
    """Trains on one worker; Ray starts it once on each, and again after a worker died."""
    import ray
    import torch
    from ray.train.torch import get_device

    from data_shards.crops import Crops
    from data_shards.sample import BadSample
    from data_shards.scan import BrokenShard
    from data_shards.stream import Shards, train_batches, whole_images
    from deepskip import checkpoint, trainer
    from jobs import preemption

    mailbox = settings["mailbox"]
    # a fault that is told already would only be met again
    if ray.get(mailbox.is_over.remote()):
        return
    config: Config = settings["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    preemption.listen()
    if rank == 0:
        preemption.follow(mailbox)
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))

    folder = Path(settings["run"])
    pen = runs.take_pen(folder) if rank == 0 else ""

    def observe(kind: str, step: int, values: dict[str, Any]) -> None:
        runs.check_pen(folder, pen)
        if kind == "panel":
            values = {"images": [for_panel(item) for item in values["images"]]}
        # workers that nobody hears any more get no further
        ray.get(mailbox.put.remote(kind, step, values), timeout=config.cluster.collective_timeout)

    try:
        data = config.data
        crops = Crops(data.crop, data.foreground_crops, config.run.seed, data.copy_paste)
        options: dict[str, Any] = {"on_bad_sample": data.on_bad_sample, "cache": cache_of(config)}
        train_shards = Shards(storage.join(data.path, "train"), data.normalize, crops, **options)
        validation_shards = Shards(storage.join(data.path, "val"), data.normalize, **options)
        device = get_device()
        loader_workers = data.loader_workers
        if loader_workers is None:
            loader_workers = 4 if device.type == "cuda" else 0

        def train_stream(step: int) -> Any:
            if rank == 0:
                mailbox.put.remote("start", step, {"workers": world_size})
            stream = train_batches(
                train_shards,
                config.run.seed,
                config.optim.global_batch_size,
                step,
                rank,
                world_size,
                loader_workers,
                data.shuffle_window,
            )
            for batch in stream:
                for report in batch.pop("bad"):
                    skipped("train", report)
                yield batch

        def skipped(split: str, report: dict[str, Any]) -> None:
            mailbox.put.remote("bad_sample", 0, {"split": split} | report)

        summary = trainer.train(
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
    except trainer.Preempted as error:
        # ray starts the workers again, which go on from that checkpoint
        if rank == 0:
            ray.get(mailbox.put.remote("stopped", error.step, {"text": str(error)}))
        raise
    except (
        BadSample,
        BrokenShard,
        MissingIndex,
        BrokenIndex,
        storage.StorageError,
        trainer.NonFiniteLoss,
        checkpoint.CheckpointNotWritten,
        checkpoint.CheckpointTooNew,
    ) as error:
        ray.get(mailbox.put.remote("fatal", 0, {"text": str(error)}))
        raise
    except Exception as error:
        if text := runs.disk_full(error):
            ray.get(mailbox.put.remote("fatal", 0, {"text": text}))
        raise
    if rank == 0:
        ray.get(mailbox.put.remote("summary", 0, summary))


def data_info(index: Index) -> Any:
    """Gives what the trainer must know of the data."""
    from deepskip.trainer import DataInfo

    return DataInfo(
        index.bands, index.num_classes, index.ignore_index, list(index.mean), list(index.std), index.preparation
    )


def for_panel(item: dict[str, Any]) -> dict[str, Any]:
    """Makes a validation image small enough to send: three bands, at most PANEL_SIDE pixels a side, numpy, (H, W, bands)."""
    bands, height, width = item["image"].shape
    step = math.ceil(max(height, width) / PANEL_SIDE)
    shown = item["image"] if bands <= 3 else item["image"][[0, bands // 2, bands - 1]]
    return {
        "image": shown[:, ::step, ::step].permute(1, 2, 0).numpy(),
        "mask": item["mask"][::step, ::step].numpy(),
        "labels": item["labels"][::step, ::step].numpy(),
        "key": item["key"],
    }


def log_model(run: runs.Run, run_id: str) -> None:
    """Logs the best checkpoint's model to MLflow; a server that is away costs a warning, not the training."""
    from deepskip import checkpoint
    from deepskip.inference import build_segmenter
    from jobs import models, tracking

    try:
        state = checkpoint.load_for_inference(run.folder)
        with tempfile.TemporaryDirectory(prefix="deepskip-model-") as folder:
            path = Path(folder) / Path(models.CHECKPOINT).name
            checkpoint.save(models.for_inference(state), path)
            tracking.log_model(run_id, build_segmenter(state), path)
    # mlflow, torch.export and the network each have their own errors; the checkpoint is safe on disk
    except Exception as error:
        print(f"warning: the model was not logged to MLflow: {' '.join(str(error).split())[:300]}", flush=True)


if __name__ == "__main__":
    main()
