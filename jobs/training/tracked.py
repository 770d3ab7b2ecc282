"""The MLflow run around a training, and what MLflow has not taken of it, which the same command sends later."""

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepskip.config import Config
from deepskip.data_shards import storage
from deepskip.data_shards.index import load_index
from deepskip.jobs import runs
from deepskip.jobs.settings import cache_of, stop

UNSENT = "unsent.json"
# a slow server gets the model within so long, or with the next call of the same command
MODEL_SECONDS = 120.0


@dataclass
class Tracked:
    """uri, tracker: None where the training is not tracked; run_id: then that of an earlier part, if that was."""

    uri: str | None
    run_id: str | None
    tracker: Any


@contextmanager
def tracked(config: Config, run: runs.Run, settings: dict[str, Any], required: bool) -> Iterator[Tracked]:
    """Start or take up the MLflow run of a training, record the run, and close it when the block ends, however it ends.

    required: whether MLflow must be installed; else a training without it is not tracked. Ends the program where the server
    does not answer.
    """
    if config.run.tracking_uri == runs.NOT_TRACKED or not (required or find_spec("mlflow")):
        runs.record(run, settings, run.mlflow_run_id)
        yield Tracked(None, run.mlflow_run_id, None)
        return
    tracking = import_module("deepskip.jobs.tracking")
    uri = tracking.tracking_uri(run.folder.parent, config.run.tracking_uri)
    try:
        run_id = tracking.start_run(
            uri, run.folder.parent, config.run.experiment, run.name, run.mlflow_run_id, settings
        )
    except tracking.TrackingUnreachable as error:
        stop(str(error))
    tracker = tracker_of(tracking, uri, run_id, config, run.folder)
    tracker.start()
    runs.record(run, settings, run_id)
    status = "FAILED"
    try:
        with tracking.system_metrics(run_id):
            yield Tracked(uri, run_id, tracker)
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt) as error:
        # a fault that was told apart ends with 2; anything else is somebody stopping the job
        status = "FAILED" if getattr(error, "code", None) == 2 else "KILLED"
        raise
    finally:
        with suppress(OSError):
            finish(tracker, uri, run.folder, status)


def tracker_of(tracking: Any, uri: str, run_id: str, config: Config, folder: Path) -> Any:
    """Make the tracker of a run, which begins with what the run's journal has."""
    validation = load_index(storage.join(config.data.path, "val"), cache_of(config))
    return tracking.Tracker(uri, run_id, validation.ignore_index, folder / runs.JOURNAL)


def finish(tracker: Any, uri: str, folder: Path, status: str) -> bool:
    """Send the rest and close the run; what the server did not take is noted. Tells whether it took everything."""
    if fault := tracker.finish(status):
        print(f"warning: MLflow at {uri} did not take everything, the same command sends it: {fault}", flush=True)
        note(folder, status=status)
    else:
        note(folder, status=None)
    return not fault


def note(folder: Path, **what: Any) -> None:
    """Note what MLflow has not got of a run: `status`, with the metrics and files before it, or `model`; None: it has."""
    left = {key: value for key, value in (runs.read_json(folder / UNSENT) | what).items() if value is not None}
    if left:
        runs.write_json(folder / UNSENT, left)
    else:
        (folder / UNSENT).unlink(missing_ok=True)


def send_late(folder: Path, config: Config) -> None:
    """Send what MLflow did not take of a run that is finished."""
    unsent, run_id = runs.read_json(folder / UNSENT), runs.read_json(folder / runs.RECORD).get("mlflow_run_id")
    if not unsent or not run_id or config.run.tracking_uri == runs.NOT_TRACKED:
        return
    if find_spec("mlflow") is None:
        print("warning: MLflow has not got all of this run, and is not installed here: pip install mlflow", flush=True)
        return
    tracking = import_module("deepskip.jobs.tracking")
    uri = tracking.tracking_uri(folder.parent, config.run.tracking_uri)
    if "status" in unsent and not finish(
        tracker_of(tracking, uri, run_id, config, folder), uri, folder, unsent["status"]
    ):
        return
    if "model" in unsent and not log_model(folder, uri, run_id):
        return
    print(f"MLflow at {uri} has now what it did not take before")


def log_model(folder: Path, uri: str, run_id: str) -> bool:
    """Log the best checkpoint's model to a finished MLflow run, and tell whether there is nothing left to log.

    A server that is away, or takes more than MODEL_SECONDS, costs a warning and not the training; it is noted until it is done.
    """
    note(folder, model=True)
    tracking = import_module("deepskip.jobs.tracking")
    fault, again = f"it takes more than {MODEL_SECONDS:g} s", True
    with tempfile.TemporaryDirectory(prefix="deepskip-model-", ignore_cleanup_errors=True) as temporary:
        found: list[tuple[str | None, bool]] = []
        thread = threading.Thread(target=_log, args=(folder, uri, run_id, Path(temporary), found), daemon=True)
        thread.start()
        thread.join(MODEL_SECONDS)
        if found:
            fault, again = found[0][0] or "", found[0][1]
    # mlflow has set it to running, or to failed
    with contextlib.suppress(Exception):
        tracking.terminate(uri, run_id)
    if fault:
        later = "; the same command tries again" if again else ""
        print(f"warning: the model was not logged to MLflow: {fault}{later}", flush=True)
    if not again:
        note(folder, model=None)
    return not again


def _log(folder: Path, uri: str, run_id: str, temporary: Path, found: list[tuple[str | None, bool]]) -> None:
    """Log the model; leaves what went wrong, or None, and whether it should be tried again."""
    from deepskip import checkpoint
    from deepskip.inference import build_segmenter
    from deepskip.jobs import models, tracking

    try:
        state = checkpoint.load_for_inference(folder)
        segmenter = build_segmenter(state)
        if reason := getattr(segmenter.network, "not_exported", None):
            found.append((reason, False))
            return
        path = temporary / Path(models.CHECKPOINT).name
        checkpoint.save(models.for_inference(state), path)
        tracking.log_model(uri, run_id, segmenter, path)
        found.append((None, False))
    # mlflow, torch.export and the network each have their own errors; the checkpoint is safe on disk
    except Exception as error:
        found.append((tracking.in_short(error), tracking.is_of_the_server(error)))
