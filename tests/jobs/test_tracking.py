"""The tracker sends to a real MLflow server that is stopped, killed and restarted."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from deepskip.cluster.local import end_with_parent, free_ports
from deepskip.jobs import tracking
from deepskip.jobs.journal import MEASURED as JOURNAL
from deepskip.jobs.journal import write_down

# One worker runs all of these tests, so the server starts once.

CONFIG = {"optim": {"steps": 10}}


class Server:
    """An MLflow server over a database in a folder, always on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, (self.port,) = folder, free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent(),
        )
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert time.monotonic() < deadline, "the MLflow server does not come up"
                time.sleep(0.2)

    def send_signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("mlflow"))
    running.start()
    yield running
    running.send_signal(signal.SIGKILL)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "LAST_FLUSH_SECONDS", 1.0)


def losses(server: Server, run_id: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient(server.uri).get_metric_history(run_id, "train/loss")
    return sorted((metric.step, metric.value) for metric in history)


def tracker_of(server: Server, name: str, folder: Path, run_id: str | None = None) -> tracking.Tracker:
    run_id = tracking.start_run(server.uri, folder, "deepskip", name, run_id, CONFIG)
    return tracking.Tracker(server.uri, run_id, 255, folder / JOURNAL)


def train(tracker: tracking.Tracker, journal: Path, steps: range) -> None:
    for step in steps:
        values = {"loss": 1 / step}
        tracker.take("train", step, values, write_down(journal, "train", step, values))


def test_a_slow_server_has_more_time_for_the_start(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tests.stress itself imports the server of this module.
    from tests.stress import SlowWay

    way = SlowWay(server.port, 0)
    monkeypatch.setattr(way, "rng", SimpleNamespace(uniform=lambda low, high: 1.6))
    # These stand for ten and thirty seconds.
    monkeypatch.setattr(tracking, "SECONDS", "1")
    monkeypatch.setenv(tracking.TIMEOUT, "1")
    monkeypatch.setattr(tracking, "START_SECONDS", "30")
    run_id = tracking.start_run(way.uri, tmp_path, "slow", "a", None, CONFIG)
    assert mlflow.MlflowClient(server.uri).get_run(run_id).data.params
    assert os.environ[tracking.TIMEOUT] == "1"
    # A user's own value is kept.
    monkeypatch.setattr(tracking, "SECONDS", "10")
    with pytest.raises(tracking.TrackingUnreachable):
        tracking.start_run(way.uri, tmp_path, "slow", "b", None, CONFIG)


def test_what_is_measured_while_the_server_hangs_or_is_away_arrives_later_and_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, journal = tracker_of(server, "away", tmp_path), tmp_path / JOURNAL
    train(tracker, journal, range(1, 4))
    assert tracker.send() is None
    # The server hangs, and the request is given up here.
    server.send_signal(signal.SIGSTOP)
    train(tracker, journal, range(4, 6))
    assert tracker.send() is not None
    server.send_signal(signal.SIGCONT)
    # The server takes a request, but its answer is lost, so the same is sent a second time.
    take = tracker.client.log_batch

    def answer_lost(*arguments: Any) -> None:
        take(*arguments)
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", answer_lost)
        assert tracker.send() is not None
    train(tracker, journal, range(6, 7))
    assert tracker.send() is None
    assert losses(server, tracker.run_id) == [(step, 1 / step) for step in range(1, 7)]
    server.send_signal(signal.SIGKILL)
    train(tracker, journal, range(7, 2000))
    assert tracker.send() is not None
    server.start()
    assert tracker.send() is None
    assert tracker.finish("FINISHED") is None
    assert losses(server, tracker.run_id) == [(step, 1 / step) for step in range(1, 2000)]
    assert mlflow.MlflowClient(server.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_later_part_of_the_training_sends_what_an_earlier_one_could_not(server: Server, tmp_path: Path) -> None:
    first, journal = tracker_of(server, "parts", tmp_path), tmp_path / JOURNAL
    train(first, journal, range(1, 4))
    assert first.send() is None
    # The driver is killed with a step unsent, and half a line written.
    train(first, journal, range(4, 6))
    with journal.open("a") as file:
        file.write('["train", 6, {"train/lo')
    second = tracker_of(server, "parts", tmp_path, first.run_id)
    # From its checkpoint, it repeats some steps.
    train(second, journal, range(3, 8))
    assert second.send() is None
    assert losses(server, second.run_id) == [(step, 1 / step) for step in range(1, 8)]
    assert [step for step, _ in second.history["train/loss"]] == list(range(1, 8))
    # A third part begins and ends while the server is away.
    server.send_signal(signal.SIGKILL)
    third = tracker_of(server, "parts", tmp_path, first.run_id)
    train(third, journal, range(8, 10))
    assert third.finish("FAILED") is not None
    server.start()
    assert tracker_of(server, "parts", tmp_path, first.run_id).finish("FAILED") is None
    assert losses(server, first.run_id) == [(step, 1 / step) for step in range(1, 10)]
    client = mlflow.MlflowClient(server.uri)
    runs = client.search_runs(
        [client.get_experiment_by_name("deepskip").experiment_id], "attributes.run_name = 'parts'"
    )
    assert [run.info.status for run in runs] == ["FAILED"]


def test_a_slow_server_holds_up_nobody_and_gets_everything_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, journal = tracker_of(server, "slow", tmp_path), tmp_path / JOURNAL
    take, requests = tracker.client.log_batch, []

    def slow(run_id: str, metrics: list[Any]) -> None:
        requests.append(threading.current_thread().name)
        time.sleep(4)
        take(run_id, metrics)

    monkeypatch.setattr(tracking, "SEND_SECONDS", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", slow)
        tracker.start()
        started = time.monotonic()
        train(tracker, journal, range(1, 3))
        while not requests:
            time.sleep(0.01)
        # A request is on its way. Events are still accepted, and the end does not wait for it forever.
        train(tracker, journal, range(3, 50))
        assert time.monotonic() - started < 3.5
        assert tracker.finish("FINISHED") == "a request to the tracking server takes more than 1 s"
        assert tracker.sender is not None
        tracker.sender.join()
    # The thread finished its request, and nobody else sent at the same time.
    assert requests == ["tracker"]
    assert 1 <= len(losses(server, tracker.run_id)) <= 2
    later = tracker_of(server, "slow", tmp_path, tracker.run_id)
    later.start()
    assert later.finish("FINISHED") is None
    assert losses(server, tracker.run_id) == [(step, 1 / step) for step in range(1, 50)]
    assert mlflow.MlflowClient(server.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_events_that_are_taken_while_others_are_sent_arrive_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SEND_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "LAST_FLUSH_SECONDS", 60.0)
    tracker, journal = tracker_of(server, "both", tmp_path), tmp_path / JOURNAL
    tracker.start()
    train(tracker, journal, range(1, 1500))
    assert tracker.finish("FINISHED") is None
    assert losses(server, tracker.run_id) == [(step, 1 / step) for step in range(1, 1500)]


def test_a_run_that_the_server_no_longer_knows_is_made_anew(server: Server, tmp_path: Path) -> None:
    tracker = tracker_of(server, "forgotten", tmp_path, "0" * 32)
    assert tracker.run_id != "0" * 32
    assert mlflow.MlflowClient(server.uri).get_run(tracker.run_id).info.status == "RUNNING"


def test_a_full_disk_under_the_journal_stops_no_metric(server: Server, tmp_path: Path) -> None:
    tracker, journal = tracker_of(server, "full", tmp_path), Path("/dev/full")
    train(tracker, journal, range(1, 3))
    assert tracker.send() is None
    assert losses(server, tracker.run_id) == [(1, 1.0), (2, 0.5)]


def test_an_experiment_that_another_training_makes_in_between(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mlflow.MlflowClient(server.uri)
    there = client.create_experiment("raced")
    look, looked = mlflow.MlflowClient.get_experiment_by_name, []

    def too_early(self: mlflow.MlflowClient, name: str) -> object:
        looked.append(name)
        return look(self, name) if len(looked) > 1 else None

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", too_early)
    assert tracking.experiment_id(server.uri, tmp_path, "raced") == there
    assert looked == ["raced", "raced"]


def test_an_address_that_would_be_read_as_another_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(tracking.TrackingUnreachable, match=r"MLflow at foo://bar cannot be used.*set neither"):
        tracking.start_run("foo://bar", tmp_path, "e", "n", None, {})
    for name in ("100%25", "what?x=1"):
        uri = tracking.tracking_uri(tmp_path / name, None)
        with pytest.raises(tracking.TrackingUnreachable, match=r"holds % or \?"):
            tracking.start_run(uri, tmp_path / name, "e", "n", None, {})
    assert not list(tmp_path.iterdir())


def test_mlflow_reports_to_nobody() -> None:
    # The variables exclude those of pytest and of continuous integration, by which MLflow detects tests.
    variables = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "PYTHONPATH")}
    code = "import deepskip.jobs.tracking, mlflow.telemetry.client as c; print(c.get_telemetry_client())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "None\n"


def test_each_generation_of_a_stream_is_sent_once_whatever_its_step(tmp_path: Path) -> None:
    tracker = tracking.Tracker("http://127.0.0.1:1", "run", 255, tmp_path / "metrics.jsonl")
    # A step ends a segment and begins the next one, of two generations; a restart measures the second one again.
    tracker.take("stream", 3, {"samples_behind": 0}, 1)
    for number, iou in ((1, 0.5), (2, 0.6), (2, 0.6), (3, 0.7)):
        tracker.take("generation", 3 if number < 3 else 6, {"generation": number, "iou": iou}, 2)
    sent = [(metric.key, metric.value, metric.step) for event in tracker.waiting for metric in event.value]
    assert sent == [
        ("stream/samples_behind", 0, 3),
        *(pair for number, iou, step in ((1, 0.5, 3), (2, 0.6, 3), (3, 0.7, 6))
          for pair in (("stream/generation", number, step), ("stream/iou", iou, step))),
    ]  # fmt: skip
