"""The MLflow run of a training: one run however often the training restarts, which never blocks the training."""

import logging
import math
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

# set before mlflow is imported, which reads some of them once: an unreachable server must not delay anything for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# it reports to MLflow's makers, from a thread that takes variables out of the environment while requests go through it: a
# request then fails with a KeyError
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from deepskip.cluster.settings import past_proxies

# a server on loopback must not be requested through a proxy
os.environ.update(past_proxies(os.environ))

import mlflow
import numpy as np
import torch
from mlflow.entities import Metric, Param
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from deepskip import figures
from deepskip.inference import Segmenter
from deepskip.jobs.journal import PREFIXES, read_measured
from deepskip.jobs.settings import flatten

VARIABLE = "MLFLOW_TRACKING_URI"
# seconds that a request may take; START_SECONDS is for requests that a training needs to start
TIMEOUT, SECONDS, START_SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT", "10", "30"
DATABASE = "mlflow.db"
# name of the model in its run
MODEL = "model"
ARTIFACTS = "mlartifacts"
SEND_SECONDS = 0.5
RETRY_SECONDS = 5.0
LAST_FLUSH_SECONDS = 20.0
# MLflow accepts no more metrics in one request
MOST_METRICS = 1000


class TrackingUnreachable(RuntimeError):
    """The MLflow server does not answer; the message names its address."""


def tracking_uri(storage: Path, configured: str | None) -> str:
    """Return the tracking URI.

    Args:
        storage: folder of the SQLite database that is used if no URI is set.
        configured: URI of the settings, which has precedence over MLFLOW_TRACKING_URI; None if there is none.
    """
    return configured or os.environ.get(VARIABLE) or f"sqlite:///{storage / DATABASE}"


def start_run(uri: str, storage: Path, experiment: str, name: str, run_id: str | None, config: dict[str, Any]) -> str:
    """Create the MLflow run of a training, or resume the one that it had.

    If the server does not answer for an earlier run, the training continues with a warning.

    Args:
        uri: tracking URI.
        storage: folder of the artifacts, for an SQLite database.
        experiment: name of the MLflow experiment.
        name: name of a new run.
        run_id: the earlier run; None creates one, and so does one that the server does not know.
        config: settings by section, logged as parameters and as config.yaml.

    Returns:
        The ID of the run.

    Raises:
        TrackingUnreachable: a run cannot be created.
    """
    if uri.startswith("sqlite:///") and {"%", "?"} & {*uri}:
        raise TrackingUnreachable(f"{uri} holds % or ?; choose another run.storage, or --run.tracking_uri none")
    client = use(uri)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
            return run_id
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                # the run exists; measurements wait in the queue for the server
                print(
                    f"warning: MLflow at {uri} does not answer, the training continues: {in_short(error)}", flush=True
                )
                return run_id
    try:
        with patience():
            run = client.create_run(experiment_id(uri, storage, experiment), run_name=name)
            parameters = [Param(key, str(value)) for key, value in flatten(config).items()]
            client.log_batch(run.info.run_id, params=parameters)
            client.log_dict(run.info.run_id, config, "config.yaml")
        return str(run.info.run_id)
    # requests, sqlalchemy and mlflow raise different errors for this
    except Exception as error:
        raise unreachable(uri, error) from error


@contextmanager
def patience() -> Iterator[None]:
    """Allow a slow server more time while the block runs, unless the user has set the timeout.

    A training does not start without its run. Later requests need no such time, because they are retried.
    """
    usual = os.environ.get(TIMEOUT)
    if usual == SECONDS:
        os.environ[TIMEOUT] = START_SECONDS
    try:
        yield
    finally:
        if usual is not None:
            os.environ[TIMEOUT] = usual


def experiment_id(uri: str, storage: Path, experiment: str) -> str:
    """Return the ID of an experiment, which is created if it does not exist.

    Args:
        uri: tracking URI.
        storage: folder of the artifacts, for an SQLite database.
        experiment: name of the experiment.

    Raises:
        TrackingUnreachable: the server does not answer, or refuses.
    """
    client = use(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return str(found.experiment_id)
        # mlflow's default for sqlite is ./mlruns in the current folder
        location = (storage / ARTIFACTS).as_uri() if uri.startswith("sqlite:") else None
        try:
            return str(client.create_experiment(experiment, artifact_location=location))
        except Exception:
            # another training may have created it in the meantime
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
            return str(found.experiment_id)
    except Exception as error:
        raise unreachable(uri, error) from error


def unreachable(uri: str, error: Exception) -> TrackingUnreachable:
    """Return the error for a tracking server that cannot be used, which says what to do.

    Args:
        uri: tracking URI.
        error: what went wrong; a TrackingUnreachable is returned unchanged.
    """
    if isinstance(error, TrackingUnreachable):
        return error
    return TrackingUnreachable(
        f"MLflow at {uri} cannot be used: {in_short(error)}. Start that server, or set run.tracking_uri or "
        "MLFLOW_TRACKING_URI to another, or set neither to use sqlite."
    )


def use(uri: str) -> mlflow.MlflowClient:
    """Set the tracking server of this process, as some MLflow calls accept no other way to name it, and return a client of it.

    Args:
        uri: tracking URI.

    Raises:
        TrackingUnreachable: the URI is of no kind that MLflow knows.
    """
    # mlflow logs migrations and retries at length; real errors, and what mlflow.store logs, are raised
    for logger in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)
    asked = os.environ.get(VARIABLE)
    mlflow.set_tracking_uri(uri)
    # mlflow writes the URI to the environment too, where it would look like the user's choice for every other run
    os.environ.pop(VARIABLE, None)
    if asked is not None:
        os.environ[VARIABLE] = asked
    try:
        return mlflow.MlflowClient(uri)
    except mlflow.MlflowException as error:
        raise unreachable(uri, error) from error


def in_short(error: Exception) -> str:
    """Return the message of an error on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


@contextmanager
def system_metrics(run_id: str) -> Iterator[None]:
    """Log this machine's CPU, memory and GPU use to a run while the block runs."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=5, samples_before_logging=1)
    try:
        monitor.start()
        yield
    finally:
        monitor.finish()


class Unsent(NamedTuple):
    """An event that MLflow has not received: "metrics" with Metrics, a "panel" with its Figure, or a "file" with its Path."""

    kind: str
    step: int
    value: Any


class Tracker:
    """Sender of events to an MLflow run, in order; what the server does not accept is kept and sent again.

    After `start` a thread sends the events, so that `take` never waits for a server; without `start` the caller calls
    `send`. Only one thread sends at a time: that thread, and after its end `finish`.
    The tracker begins with the journal of earlier parts of the training, so it sends what those could not. A metric
    that arrives twice has the same time stamp, by which MLflow recognizes it.

    Args:
        uri: tracking URI.
        run_id: the MLflow run.
        ignore_index: label of pixels that do not count, for the pictures of predictions.
        journal: file of the measurements of earlier parts.

    Attributes:
        waiting: queue of events that are not sent yet.
        history: pairs (step, value) of each metric of the run.
        last_step: latest step of each kind of event; of generations the latest number.

    Raises:
        BrokenFile: a line of the journal is not a measurement.
        OSError: the journal cannot be read.
    """

    def __init__(self, uri: str, run_id: str, ignore_index: int, journal: Path) -> None:
        self.client, self.run_id, self.ignore_index = mlflow.MlflowClient(uri), run_id, ignore_index
        self.waiting: deque[Unsent] = deque()
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.last_step: dict[str, float] = {}
        self.next_try = 0.0
        # held while the queue changes, and never during a request
        self.lock = threading.Lock()
        self.ending = threading.Event()
        self.sender: threading.Thread | None = None
        for kind, step, values, stamp in read_measured(journal):
            self.take(kind, step, values, stamp)

    def take(self, kind: str, step: int, values: dict[str, Any], stamp: int) -> None:
        """Add an event of the trainer to the queue; an event of a step that a kind has passed is ignored.

        Several generations of a stream may be measured at one step, each once.

        Args:
            kind: "train", "validation", "stream" or "generation" for metrics, or "panel" for pictures of predictions.
            step: training step.
            values: metrics by name, or {"images": pictures} for a panel.
            stamp: time of the event, milliseconds since the epoch.
        """
        # a restarted training repeats some steps
        place = values.get("generation", step) if kind == "generation" else step
        if place <= self.last_step.get(kind, -1):
            return
        self.last_step[kind] = place
        if kind == "panel":
            if values["images"]:
                self._append(kind, step, figures.panel(values["images"], self.ignore_index))
            return
        prefix = PREFIXES.get(kind, kind)
        metrics = {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}
        for name, value in metrics.items():
            self.history.setdefault(name, []).append((step, value))
        self._append("metrics", step, [Metric(name, value, stamp, step) for name, value in metrics.items()])

    def _append(self, kind: str, step: int, value: Any) -> None:
        with self.lock:
            self.waiting.append(Unsent(kind, step, value))

    def start(self) -> None:
        """Start a thread that sends the events until `finish`."""
        self.sender = threading.Thread(target=self._send_until_the_end, name="tracker", daemon=True)
        self.sender.start()

    def _send_until_the_end(self) -> None:
        while not self.ending.wait(SEND_SECONDS):
            self.send()

    def send(self) -> str | None:
        """Send the waiting events, unless a request failed within the last RETRY_SECONDS.

        Returns:
            The error message, or None.
        """
        if time.monotonic() < self.next_try:
            return None
        while self.waiting:
            if self.ending.is_set() and threading.current_thread() is self.sender:
                # `finish` sends the rest, or the next part of the training does
                return None
            with self.lock:
                kind, step, value = self.waiting[0]
                metrics, count = self._next_metrics() if kind == "metrics" else ([], 1)
            try:
                if kind == "panel":
                    self.client.log_figure(self.run_id, value, f"panels/step-{step:08d}.png")
                elif kind == "file":
                    self.client.log_artifact(self.run_id, str(value))
                else:
                    self.client.log_batch(self.run_id, metrics)
            # whatever the error is, the training continues and the event stays first in the queue
            except Exception as error:
                self.next_try = time.monotonic() + RETRY_SECONDS
                return in_short(error)
            with self.lock:
                for _ in range(count):
                    self.waiting.popleft()
        return None

    def _next_metrics(self) -> tuple[list[Metric], int]:
        """Return the metrics at the head of the queue that fit into one request, and their number of events."""
        metrics: list[Metric] = []
        count = 0
        for kind, _, value in self.waiting:
            if kind != "metrics" or (metrics and len(metrics) + len(value) > MOST_METRICS):
                break
            metrics, count = metrics + value, count + 1
        return metrics, count

    def take_file(self, path: Path) -> None:
        """Add a file to the queue, to be logged as an artifact.

        Args:
            path: the file.
        """
        self._append("file", 0, path)

    def finish(self, status: str) -> str | None:
        """Send the rest within LAST_FLUSH_SECONDS and end the run.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".

        Returns:
            The error message, or None.
        """
        if status == "KILLED":
            # a killed job has little time left, so the status is sent first
            with suppress(Exception):
                self.client.set_terminated(self.run_id, status)
        deadline = time.monotonic() + LAST_FLUSH_SECONDS
        if self.sender is not None:
            self.ending.set()
            self.sender.join(LAST_FLUSH_SECONDS)
            if self.sender.is_alive():
                # the request may still succeed; no other thread sends, so no event leaves the queue twice
                return f"a request to the tracking server takes more than {LAST_FLUSH_SECONDS:g} s"
        while True:
            fault = self.send()
            if fault is None and not self.waiting:
                break
            if time.monotonic() > deadline:
                return fault or "the tracking server was unreachable"
            time.sleep(0.5)
        try:
            if self.history:
                self.client.log_figure(self.run_id, figures.curves(self.history), "curves.png")
            self.client.set_terminated(self.run_id, status)
        except Exception as error:
            return in_short(error)
        return None


def log_model(uri: str, run_id: str, segmenter: Segmenter, checkpoint_file: Path) -> None:
    """Log a trained model, from raw images to probabilities, as an exported program for any batch, height and width.

    Args:
        uri: tracking URI.
        run_id: the MLflow run.
        segmenter: the model.
        checkpoint_file: the checkpoint that it was made from, which is kept with it for `jobs.models`.
    """
    use(uri)
    bands, classes = segmenter.bands, segmenter.num_classes
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, bands, -1, -1))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, classes, -1, -1))]),
    )
    # a batch of 2: torch.export would tie the program to a batch of 1
    example = np.random.default_rng(0).random((2, bands, 128, 128), dtype=np.float32)
    requirements = [f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}"]
    with mlflow.start_run(run_id=run_id, log_system_metrics=False), warnings.catch_warnings():
        # torch's archive writer warns of weights that share storage, which is all of them
        warnings.filterwarnings("ignore", message="No complete tensor found")
        mlflow.pytorch.log_model(
            segmenter.eval(),
            name=MODEL,
            signature=signature,
            input_example=example,
            extra_files=[str(checkpoint_file)],
            pip_requirements=requirements,
        )


def terminate(uri: str, run_id: str) -> None:
    """Set the status of a completed run to FINISHED."""
    mlflow.MlflowClient(uri).set_terminated(run_id, "FINISHED")


def is_of_the_server(error: Exception) -> bool:
    """Return whether an error comes from MLflow or the connection, so that a retry may help, and not from the model.

    Args:
        error: what `log_model` raised.
    """
    return isinstance(error, mlflow.exceptions.MlflowException | OSError)


def model_location(uri: str, model_id: str) -> str:
    """Return the place of the files of a logged model, whose ID is m-..."""
    return str(use(uri).get_logged_model(model_id).artifact_location)


def download(uri: str, artifact_uri: str, folder: str) -> Path:
    """Copy a file that a tracking server knows into a folder; a file on this machine is not copied.

    Args:
        uri: tracking URI.
        artifact_uri: address of the file.
        folder: folder for the copy.

    Returns:
        The path of the file or its copy.
    """
    use(uri)
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=artifact_uri, dst_path=folder, tracking_uri=uri))


def log_report(
    uri: str,
    run_id: str | None,
    experiment: str,
    name: str,
    settings: dict[str, Any],
    metrics: dict[str, float],
    step: int,
    folder: Path,
    place: str,
) -> str:
    """Log metrics and a folder of files to an existing run or a new one.

    Args:
        uri: tracking URI.
        run_id: the existing run; None creates one.
        experiment: MLflow experiment of a new run.
        name: name of a new run.
        settings: settings of the evaluation, logged as parameters of a new run.
        metrics: values by name; those that are not finite are not logged.
        step: training step of the model.
        folder: folder of the files.
        place: folder of the run's artifacts for the files.

    Returns:
        The ID of the run.

    Raises:
        TrackingUnreachable: there is no database, or no run can be created.
        Exception: errors of MLflow and its libraries.
    """
    database, own = Path(uri.removeprefix("sqlite:///")), run_id is None
    if run_id is None:
        if uri.startswith("sqlite:///"):
            database.parent.mkdir(parents=True, exist_ok=True)
        run_id = start_run(uri, database.parent, experiment, name, None, {"evaluate": settings})
    elif uri.startswith("sqlite:///") and not database.is_file():
        # mlflow would create an empty database
        raise TrackingUnreachable(f"there is no database at {database}; set tracking_uri, or track: new")
    client = use(uri)
    now = int(time.time() * 1000)
    client.log_batch(run_id, [Metric(key, value, now, step) for key, value in metrics.items() if math.isfinite(value)])
    client.log_artifacts(run_id, str(folder), place)
    if own:
        client.set_terminated(run_id)
    return run_id
