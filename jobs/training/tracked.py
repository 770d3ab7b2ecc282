"""The MLflow run of a training, and a record of what MLflow has not received, which the same command sends later."""

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepskip.config import Config
from deepskip.data_shards import storage
from deepskip.data_shards.index import load_index
from deepskip.jobs import runs
from deepskip.jobs.settings import cache_of, stop

if TYPE_CHECKING:
    # It imports MLflow, which need not be installed.
    from deepskip.jobs.tracking import Tracker

UNSENT = "unsent.json"
# Time to upload the model, in seconds; if a server takes longer, the next call of the same command uploads it again.
MODEL_SECONDS = 120.0


@dataclass
class Tracked:
    """How a training is tracked by MLflow.

    Attributes:
        uri: MLflow's address; None if the training is not tracked.
        run_id: the MLflow run's id. If the training is not tracked: that of an earlier, tracked part of it, or None.
        tracker: sends metrics and images to MLflow; None if the training is not tracked.
    """

    uri: str | None
    run_id: str | None
    tracker: "Tracker | None"


@contextmanager
def tracked(config: Config, run: runs.Run, settings: dict[str, Any], required: bool) -> Iterator[Tracked]:
    """Start or continue the MLflow run of a training, write the run's record, and close the MLflow run after the block.

    The MLflow run's status is FINISHED after the block, FAILED after an error, and KILLED if the job was stopped.

    Args:
        config: the settings of the training.
        run: the run's folder, which this process has claimed.
        settings: the settings as a dict, for the record and MLflow's parameters.
        required: whether MLflow must be installed; if not, a training on a machine without it is not tracked.

    Yields:
        The address, run id and tracker.

    Raises:
        SystemExit: if the tracking server does not answer; an `error:` line is printed.
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
        # `stop` ends the program with status 2 after a failure; with any other status, somebody stopped the job.
        status = "FAILED" if getattr(error, "code", None) == 2 else "KILLED"
        raise
    finally:
        with suppress(OSError):
            finish(tracker, uri, run.folder, status)


def tracker_of(tracking: Any, uri: str, run_id: str, config: Config, folder: Path) -> "Tracker":
    """Return a tracker for a run, which first sends the metrics that are in the run's journal.

    Args:
        tracking: the module deepskip.jobs.tracking, which imports MLflow.
        uri: MLflow's address.
        run_id: the MLflow run's id.
        config: the settings of the training, for the ignore_index of its validation split.
        folder: the run's folder.
    """
    validation = load_index(storage.join(config.data.path, "val"), cache_of(config))
    tracker: Tracker = tracking.Tracker(uri, run_id, validation.ignore_index, folder / runs.JOURNAL)
    return tracker


def finish(tracker: "Tracker", uri: str, folder: Path, status: str) -> bool:
    """Send the remaining events, close the MLflow run, and record in the folder what the server did not receive.

    Args:
        tracker: the run's tracker.
        uri: MLflow's address, for messages.
        folder: the run's folder.
        status: MLflow's status of the run: FINISHED, FAILED or KILLED.

    Returns:
        Whether the server received everything.
    """
    if fault := tracker.finish(status):
        print(
            f"warning: MLflow at {uri} has not received everything, the same command sends the rest: {fault}",
            flush=True,
        )
        note(folder, status=status)
    else:
        note(folder, status=None)
    return not fault


def note(folder: Path, **what: Any) -> None:
    """Record in the folder what MLflow has not received of a run; the file is removed when nothing is missing.

    Args:
        folder: the run's folder.
        **what: `status`, which stands for all metrics and files too, or `model`; None if MLflow has received it.
    """
    left = {key: value for key, value in (runs.read_json(folder / UNSENT) | what).items() if value is not None}
    if left:
        runs.write_json(folder / UNSENT, left)
    else:
        (folder / UNSENT).unlink(missing_ok=True)


def send_late(folder: Path, config: Config) -> None:
    """Send what MLflow has not received of a finished run, if anything; problems are printed as warnings."""
    unsent, run_id = runs.read_json(folder / UNSENT), runs.read_json(folder / runs.RECORD).get("mlflow_run_id")
    if not unsent or not run_id or config.run.tracking_uri == runs.NOT_TRACKED:
        return
    if find_spec("mlflow") is None:
        print(
            "warning: MLflow has not received all of this run, and is not installed here: pip install mlflow",
            flush=True,
        )
        return
    tracking = import_module("deepskip.jobs.tracking")
    uri = tracking.tracking_uri(folder.parent, config.run.tracking_uri)
    if "status" in unsent and not finish(
        tracker_of(tracking, uri, run_id, config, folder), uri, folder, unsent["status"]
    ):
        return
    if "model" in unsent and not log_model(folder, uri, run_id):
        return
    print(f"MLflow at {uri} has now received what was missing")


def log_model(folder: Path, uri: str, run_id: str) -> bool:
    """Log the best checkpoint's model to a finished MLflow run.

    If the server does not answer, or takes more than MODEL_SECONDS, a warning is printed, and the same command tries again.

    Args:
        folder: the run's folder.
        uri: MLflow's address.
        run_id: the MLflow run's id.

    Returns:
        Whether nothing is left to log: the model was logged, or it cannot be.
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
    # Logging a model has set the run's status to running, or to failed.
    with contextlib.suppress(Exception):
        tracking.terminate(uri, run_id)
    if fault:
        later = "; the same command tries again" if again else ""
        print(f"warning: the model was not logged to MLflow: {fault}{later}", flush=True)
    if not again:
        note(folder, model=None)
    return not again


def _log(folder: Path, uri: str, run_id: str, temporary: Path, found: list[tuple[str | None, bool]]) -> None:
    """Log the model; append to `found` the error's text, or None, and whether to try again."""
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
    # MLflow, torch.export and the network each raise their own errors; the checkpoint is safe on disk.
    except Exception as error:
        found.append((tracking.in_short(error), tracking.is_of_the_server(error)))
