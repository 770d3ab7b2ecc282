"""The MLflow run of a training: one run however often the training restarts, never in the training's way."""

import contextlib
import logging
import math
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# set before mlflow is imported, which reads some of them once: a server that is away must not hold anything up for minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# it reports to MLflow's makers, from a thread that takes variables out of the environment while requests go through it: a
# request then fails with a KeyError
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from deepskip.cluster.settings import past_proxies

# a server on loopback is reached by no proxy
os.environ.update(past_proxies(os.environ))

import mlflow
import numpy as np
import torch
from mlflow.entities import Metric, Param
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from deepskip import figures
from deepskip.inference import Segmenter
from deepskip.jobs.journal import read_measured
from deepskip.jobs.settings import flatten

VARIABLE = "MLFLOW_TRACKING_URI"
# seconds that a request may take, and one without which no training begins
TIMEOUT, SECONDS, START_SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT", "10", "30"
DATABASE = "mlflow.db"
# what a run's model is called in it
MODEL = "model"
ARTIFACTS = "mlartifacts"
# between looks at what waits, and after a request that failed
SEND_SECONDS = 0.5
RETRY_SECONDS = 5.0
LAST_FLUSH_SECONDS = 20.0
# MLflow takes no more in one request
MOST_METRICS = 1000


class TrackingUnreachable(RuntimeError):
    """The MLflow server does not answer; says where it was looked for."""


def tracking_uri(storage: Path, configured: str | None) -> str:
    """Gives the tracking URI: the config's, MLFLOW_TRACKING_URI, or sqlite in `storage`."""
    return configured or os.environ.get(VARIABLE) or f"sqlite:///{storage / DATABASE}"


def start_run(uri: str, storage: Path, experiment: str, name: str, run_id: str | None, config: dict[str, Any]) -> str:
    """Makes the run of a training, or takes up the one it had, and gives its id; raises TrackingUnreachable."""
    use(uri)
    client = mlflow.MlflowClient(uri)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
            return run_id
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                # the run is there; what is measured waits for the server
                print(f"warning: MLflow at {uri} does not answer, the training goes on: {in_short(error)}", flush=True)
                return run_id
    try:
        with patience():
            run = client.create_run(experiment_id(uri, storage, experiment), run_name=name)
            parameters = [Param(key, str(value)) for key, value in flatten(config).items()]
            client.log_batch(run.info.run_id, params=parameters)
            client.log_dict(run.info.run_id, config, "config.yaml")
        return run.info.run_id
    # requests, sqlalchemy and mlflow each have their own errors for this
    except Exception as error:
        raise unreachable(uri, error) from error


@contextmanager
def patience() -> Iterator[None]:
    """Gives a slow server more time in a block, unless a user has said how much.

    Later, what it does not answer is asked again; a training that cannot begin its run does not begin.
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
    """Gives the id of an experiment, which is made where there is none; raises TrackingUnreachable."""
    use(uri)
    client = mlflow.MlflowClient(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return found.experiment_id
        # mlflow's default for sqlite is ./mlruns of whatever folder a program runs in
        location = (storage / ARTIFACTS).as_uri() if uri.startswith("sqlite:") else None
        try:
            return client.create_experiment(experiment, artifact_location=location)
        except Exception:
            # another training has made it in between
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise
            return found.experiment_id
    except Exception as error:
        raise unreachable(uri, error) from error


def unreachable(uri: str, error: Exception) -> TrackingUnreachable:
    """Makes an error that says what to do."""
    if isinstance(error, TrackingUnreachable):
        return error
    return TrackingUnreachable(
        f"MLflow at {uri} cannot be used: {in_short(error)}. Start that server, or set run.tracking_uri or "
        "MLFLOW_TRACKING_URI to another, or leave both out for sqlite."
    )


def use(uri: str) -> None:
    """Makes a tracking server that of this process: some of mlflow's calls know no other, whatever they are told."""
    # migrations and retries are logged at length; what goes wrong is raised
    for logger in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    # what it logs here it raises too
    logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)
    asked = os.environ.get(VARIABLE)
    mlflow.set_tracking_uri(uri)
    # it writes it into the environment too, where it would pass for what the user wants of every other run
    os.environ.pop(VARIABLE, None)
    if asked is not None:
        os.environ[VARIABLE] = asked


def in_short(error: Exception) -> str:
    """Puts an error on one line."""
    return " ".join(str(error).split())[:300]


@contextmanager
def system_metrics(run_id: str) -> Iterator[None]:
    """Logs this machine's CPU, memory and GPU use to the run while the block runs."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=5, samples_before_logging=1)
    try:
        monitor.start()
        yield
    finally:
        monitor.finish()


class Tracker:
    """Sends events to the run in order; what a server does not take is kept and sent again.

    `start` has a thread send them, so that whoever takes an event never waits for a server. One thread at a time sends: that
    one, and after it has ended `finish`. Whoever does not start it calls `send`.
    It begins with the journal of earlier parts of the training: what one part could not send the next one does. A metric that
    arrives twice has the same time stamp, by which MLflow knows it.
    history: (step, value) pairs of every metric of the run.
    """

    def __init__(self, uri: str, run_id: str, ignore_index: int, journal: Path) -> None:
        self.client, self.run_id, self.ignore_index = mlflow.MlflowClient(uri), run_id, ignore_index
        self.waiting: deque[tuple[str, int, Any]] = deque()
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.last_step: dict[str, int] = {}
        self.next_try = 0.0
        # around the line of events, and never around a request
        self.lock = threading.Lock()
        self.ending = threading.Event()
        self.sender: threading.Thread | None = None
        for kind, step, values, stamp in read_measured(journal):
            self.take(kind, step, values, stamp)

    def take(self, kind: str, step: int, values: dict[str, Any], stamp: int) -> None:
        """Takes one event of the trainer, "train" or "validation" metrics or a "panel", and when it was, in ms."""
        # a restarted training comes past some steps again
        if step <= self.last_step.get(kind, -1):
            return
        self.last_step[kind] = step
        if kind == "panel":
            if values["images"]:
                self._append(kind, step, figures.panel(values["images"], self.ignore_index))
            return
        prefix = "val" if kind == "validation" else kind
        metrics = {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}
        for name, value in metrics.items():
            self.history.setdefault(name, []).append((step, value))
        self._append("metrics", step, [Metric(name, value, stamp, step) for name, value in metrics.items()])

    def _append(self, kind: str, step: int, value: Any) -> None:
        with self.lock:
            self.waiting.append((kind, step, value))

    def start(self) -> None:
        """Send from a thread of its own until `finish`."""
        self.sender = threading.Thread(target=self._send_until_the_end, name="tracker", daemon=True)
        self.sender.start()

    def _send_until_the_end(self) -> None:
        while not self.ending.wait(SEND_SECONDS):
            self.send()

    def send(self) -> str | None:
        """Sends what waits, unless the server was away a moment ago; gives what went wrong, or None."""
        if time.monotonic() < self.next_try:
            return None
        while self.waiting:
            if self.ending.is_set() and threading.current_thread() is self.sender:
                # the rest is for `finish`, or for the next part of the training
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
            # whatever it is, the training goes on and the event stays first in the line
            except Exception as error:
                self.next_try = time.monotonic() + RETRY_SECONDS
                return in_short(error)
            with self.lock:
                for _ in range(count):
                    self.waiting.popleft()
        return None

    def _next_metrics(self) -> tuple[list[Metric], int]:
        """Gives as many metrics from the head of the line as one request may have, and how many events they are."""
        metrics: list[Metric] = []
        count = 0
        for kind, _, value in self.waiting:
            if kind != "metrics" or (metrics and len(metrics) + len(value) > MOST_METRICS):
                break
            metrics, count = metrics + value, count + 1
        return metrics, count

    def take_file(self, path: Path) -> None:
        """Takes a file to keep beside the metrics."""
        self._append("file", 0, path)

    def finish(self, status: str) -> str | None:
        """Sends the rest within LAST_FLUSH_SECONDS and closes the run; gives what went wrong, or None."""
        if status == "KILLED":
            # whoever kills a job does not wait long: the status comes first
            with contextlib.suppress(Exception):
                self.client.set_terminated(self.run_id, status)
        deadline = time.monotonic() + LAST_FLUSH_SECONDS
        if self.sender is not None:
            self.ending.set()
            self.sender.join(LAST_FLUSH_SECONDS)
            if self.sender.is_alive():
                # it may still arrive; nobody else sends, so nothing is taken from the line twice
                return f"a request to the tracking server takes more than {LAST_FLUSH_SECONDS:g} s"
        while True:
            fault = self.send()
            if fault is None and not self.waiting:
                break
            if time.monotonic() > deadline:
                return fault or "the tracking server was away"
            time.sleep(0.5)
        try:
            if self.history:
                self.client.log_figure(self.run_id, figures.curves(self.history), "curves.png")
            self.client.set_terminated(self.run_id, status)
        except Exception as error:
            return in_short(error)
        return None


def log_model(uri: str, run_id: str, segmenter: Segmenter, checkpoint_file: Path) -> None:
    """Logs a trained model, from raw images to probabilities, as an exported program of any batch, height and width.

    checkpoint_file: what it was made from; it is kept with the model, for `jobs.models`.
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
    """Set the status of a run that is done to finished."""
    mlflow.MlflowClient(uri).set_terminated(run_id, "FINISHED")


def is_of_the_server(error: Exception) -> bool:
    """Tell whether an error is of MLflow or the way to it, which may be better later, and not of the model."""
    return isinstance(error, mlflow.exceptions.MlflowException | OSError)


def model_location(uri: str, model_id: str) -> str:
    """Gives where the files of a logged model (m-...) lie."""
    use(uri)
    return mlflow.MlflowClient(uri).get_logged_model(model_id).artifact_location


def download(uri: str, artifact_uri: str, folder: str) -> Path:
    """Copies one file that a tracking server knows into a folder, or names it where it is on this machine."""
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
    """Logs metrics and a folder of files to a run that is there, or to a new one, and gives its id; raises MLflow's errors.

    place: folder of the run's artifacts that takes the files.
    """
    database = Path(uri.removeprefix("sqlite:///"))
    if run_id is None:
        database.parent.mkdir(parents=True, exist_ok=True)
        run_id = start_run(uri, database.parent, experiment, name, None, {"evaluate": settings})
        own = True
    elif uri.startswith("sqlite:///") and not database.is_file():
        # mlflow would make an empty one
        raise TrackingUnreachable(f"there is no database at {database}; set tracking_uri, or track: new")
    else:
        own = False
    use(uri)
    client = mlflow.MlflowClient(uri)
    now = int(time.time() * 1000)
    client.log_batch(run_id, [Metric(key, value, now, step) for key, value in metrics.items() if math.isfinite(value)])
    client.log_artifacts(run_id, str(folder), place)
    if own:
        client.set_terminated(run_id)
    return run_id
