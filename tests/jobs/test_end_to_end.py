"""The steps of a user on the built-in coins: submit a training, look at its results, resume it and predict."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import deepskip
from deepskip import checkpoint
from deepskip.cluster.local import MARK
from deepskip.complexity import conv_weights
from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.entries import SampleEntry
from deepskip.data_shards.index import load_index
from deepskip.data_shards.order import Slot
from deepskip.jobs import runs, submit
from deepskip.jobs.journal import read_measured
from deepskip.metrics import SegmentationMetrics
from tests.jobs.serving import answers_strangers

SMALL = ["--model.base_channels", "4", "--model.levels", "3", "--cluster.workers", "2", "--optim.warmup_steps", "2"]
TWELVE = [*SMALL, "--data.crop", "64", "--optim.steps", "12", "--run.log_every", "2", "--run.validate_every", "6"]
TWELVE += ["--run.checkpoint_every", "4", "--data.on_bad_sample", "skip"]
ROOT = Path(__file__).parents[2]
# This program runs as on a machine without Ray and MLflow.
WITHOUT = "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None; from deepskip.jobs.train import main; main()"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    pack_coins(folder / "data" / "coins", {"train": 24, "val": 6})
    entry, shard = bad_sample(folder)
    data = bytearray(shard.read_bytes())
    data[entry.mask.offset + 30] ^= 1
    shard.write_bytes(data)
    return folder


def bad_sample(home: Path) -> tuple[SampleEntry, Path]:
    """Return the place of the training sample that is damaged, and its shard."""
    folder = home / "data" / "coins" / "train"
    index = load_index(folder)
    return index.entries([3])[0], folder / index.shards[0].name


def command(home: Path, *arguments: str) -> tuple[list[str], dict[str, Any]]:
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    variables = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RAY_", "MLFLOW_")) and key.lower() not in proxies
    }
    options = {"cwd": home, "env": variables | {"HOME": str(home)}, "text": True}
    return [sys.executable, "-m", *arguments], options


def call(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    line, options = command(home, *arguments)
    options["env"] |= variables
    return subprocess.run(line, capture_output=True, timeout=800, check=False, **options)


@pytest.fixture(scope="module")
def proxy() -> Iterator[tuple[str, list[bytes]]]:
    """Yield a company's proxy: its URL, and the first bytes of each connection to it, which it closes."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.settimeout(5)
                    with connection, suppress(TimeoutError):
                        asked.append(connection.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)


def behind(proxy: tuple[str, list[bytes]]) -> dict[str, str]:
    """Return the environment of a network that only a proxy can reach."""
    return {name: proxy[0] for each in ("http", "https", "all") for name in (f"{each}_proxy", f"{each.upper()}_PROXY")}


def asked_of(proxy: tuple[str, list[bytes]]) -> list[bytes]:
    """Return what a proxy was asked, except Ray's check whether it runs in a cloud."""
    clouds = (b"GET http://169.254.169.254/", b"GET http://metadata.google.internal/")
    return [line for line in proxy[1] if not line.startswith(clouds)]


@pytest.fixture(scope="module")
def trained(home: Path, proxy: tuple[str, list[bytes]]) -> tuple[Path, str]:
    done = call(home, "deepskip.jobs.submit", "train", *TWELVE, "--run.name", "small", **behind(proxy))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{proxy[1]}"
    return home / "runs" / "small", done.stdout


def test_the_terminal(trained: tuple[Path, str]) -> None:
    lines = trained[1].splitlines()
    assert lines[0] == "starting Ray on 127.0.0.1"
    assert "training small on 2 CPU workers, 12 steps" in lines
    assert any(line.startswith("step 12/12  loss ") for line in lines)
    for name in ("IoU", "Dice", "pixel accuracy", "precision", "recall", "F1", "parameters", "images/s"):
        assert any(line.startswith(f"  {name} ") for line in lines), name
    for start in ("MLflow page:", "resume:", "predict:"):
        assert any(line.startswith(start) for line in lines), start


def test_a_bad_sample_is_left_out_and_listed(trained: tuple[Path, str], home: Path) -> None:
    entry, shard = bad_sample(home)
    listed = [json.loads(line) for line in (trained[0] / "bad_samples.jsonl").read_text().splitlines()]
    assert [(line["split"], line["key"], line["shard"]) for line in listed] == [("train", entry.key, str(shard))]
    summary = json.loads((trained[0] / "summary.json").read_text())
    assert summary["bad_samples"] == 1
    client = mlflow.MlflowClient(f"sqlite:///{home / 'runs' / 'mlflow.db'}")
    assert "bad_samples.jsonl" in [file.path for file in client.list_artifacts(summary["mlflow_run_id"])]


@pytest.mark.usefixtures("trained")
def test_nothing_on_loopback_asked_the_proxy(proxy: tuple[str, list[bytes]]) -> None:
    url, asked = proxy
    assert asked_of(proxy) == []
    asked.clear()
    # A request to the proxy would have been seen.
    with suppress(OSError):
        urllib.request.build_opener(urllib.request.ProxyHandler({"http": url})).open(
            "http://127.0.0.1:9/api/jobs/", timeout=5
        )
    assert [line.split(b"\r\n")[0] for line in asked] == [b"GET http://127.0.0.1:9/api/jobs/ HTTP/1.1"]


def test_the_summary_is_what_the_checkpoint_gives(trained: tuple[Path, str], home: Path) -> None:
    summary = json.loads((trained[0] / "summary.json").read_text())
    assert summary["conv_weights"] == conv_weights(3, 1, 4, 3)
    assert (summary["name"], summary["steps"]) == ("small", 12)
    assert summary["val"]["iou_best_threshold"] >= (summary["val"]["iou"] or 0.0)
    # Measure again from the best checkpoint, image by image, without the trainer.
    segmenter = deepskip.load(trained[0])
    assert summary["parameters"] == sum(p.numel() for p in segmenter.network.parameters())
    metrics = SegmentationMetrics(1, 255)
    shards = Shards(home / "data" / "coins" / "val")
    for number in range(len(shards)):
        item = shards[[Slot(0, number, 1)]]
        labels = segmenter.predict(item["image"][0].permute(1, 2, 0).numpy())
        metrics.update(torch.from_numpy(labels), item["mask"][0].long())
    for name, value in metrics.compute().items():
        found = summary["val"][name]
        assert np.isnan(value) if found is None else found == pytest.approx(value, abs=2e-3), name


def test_the_mlflow_run_is_complete(trained: tuple[Path, str], home: Path) -> None:
    summary = json.loads((trained[0] / "summary.json").read_text())
    uri = f"sqlite:///{home / 'runs' / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.steps"] == "12"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/iou")] == [6, 12]
    assert any(name.startswith("system/") for name in run.data.metrics)
    artifacts = {
        item.path for folder in ("", "panels") for item in client.list_artifacts(run.info.run_id, folder or None)
    }
    assert {"curves.png", "config.yaml", "panels/step-00000012.png"} <= artifacts
    panel = Image.open(client.download_artifacts(run.info.run_id, "panels/step-00000012.png"))
    assert panel.size[0] > panel.size[1] > 300
    # The model runs at a size and a batch that it was not logged with.
    mlflow.set_tracking_uri(uri)
    models = client.search_logged_models([run.info.experiment_id])
    assert len(models) == 1
    model = mlflow.pyfunc.load_model(models[0].model_uri)
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 75, 90)).astype(np.float32)
    expected = deepskip.load(trained[0]).predict_proba(image[0].transpose(1, 2, 0)).transpose(2, 0, 1)
    np.testing.assert_allclose(model.predict(image)[0], expected, atol=1e-5)


def test_torchruns_ranks_without_ray_and_mlflow_have_the_same_losses(trained: tuple[Path, str], home: Path) -> None:
    (home / "alone.py").write_text(WITHOUT)
    words = ["--standalone", "--nproc_per_node", "2", "alone.py", *TWELVE, "--run.name", "alone"]
    done = call(home, "torch.distributed.run", *words, "--cluster.cpus_per_worker", "1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    alone = trained[0].parent / "alone"
    losses, on_ray = ([each[:3] for each in read_measured(run / runs.JOURNAL)] for run in (alone, trained[0]))
    assert {step for kind, step, _ in losses if kind == "train"} == set(range(2, 13, 2))
    assert [(kind, step, values["loss"]) for kind, step, values in losses] == [
        (kind, step, values["loss"]) for kind, step, values in on_ray
    ]
    mine, theirs = (json.loads((run / "summary.json").read_text()) for run in (alone, trained[0]))
    assert mine["val"] == theirs["val"]


def test_rays_result_has_the_metrics_of_every_validation(trained: tuple[Path, str]) -> None:
    from ray.train import Result

    journal = {(kind, step): values for kind, step, values, *_ in read_measured(trained[0] / runs.JOURNAL)}
    result = Result.from_path(str(trained[0] / "ray"))
    assert result.metrics_dataframe is not None
    steps = result.metrics_dataframe["step"].tolist()
    assert steps == [step for kind, step in journal if kind == "validation"] == [6, 12]
    for step, row in zip(steps, result.metrics_dataframe.to_dict("records"), strict=True):
        expected = {"step": step}
        for kind, prefix in (("train", "train"), ("validation", "val")):
            values = journal[kind, step].items()
            expected |= {f"{prefix}/{name}": value for name, value in values if math.isfinite(value)}
        # a metric that is not finite at one step is nan in the table
        assert {name: value for name, value in row.items() if not math.isnan(value)} == expected
    assert result.metrics is not None
    assert result.metrics["step"] == 12
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        pointer = json.loads((Path(folder) / "deepskip.json").read_text())
    assert pointer == {"step": 12, "checkpoints": str(trained[0] / "checkpoints")}


def test_the_finished_run_may_grow(trained: tuple[Path, str], home: Path, proxy: tuple[str, list[bytes]]) -> None:
    summary = json.loads((trained[0] / "summary.json").read_text())
    state, _ = checkpoint.newest(trained[0])
    assert state is not None
    settings = [*TWELVE, "--run.name", "small", "--optim.steps", "16"]
    proxy[1].clear()
    done = call(home, "deepskip.jobs.train", *settings, **behind(proxy))
    assert done.returncode == 0, done.stderr
    assert asked_of(proxy) == []
    assert "step 14/16" in done.stdout
    assert "step 12/" not in done.stdout
    longer = json.loads((trained[0] / "summary.json").read_text())
    assert (longer["steps"], longer["mlflow_run_id"]) == (16, summary["mlflow_run_id"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.in_channels", "4"], "model.in_channels is 4, but the shards"),
        (["--model.num_classes", "3"], "model.num_classes is 3, but the shards"),
        (["--loss.class_weights", "[1, 1]"], "has 2 weights for 1 classes"),
    ],
)
def test_bad_input_ends_at_once_without_ray(
    home: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(submit, "start_head", None)
    with pytest.raises(SystemExit) as ended:
        submit.main(["train", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_tracker_that_is_away(home: Path) -> None:
    away = call(home, "deepskip.jobs.train", "--run.tracking_uri", "http://127.0.0.1:9", "--run.name", "away")
    assert away.returncode == 2
    assert "MLflow at http://127.0.0.1:9 cannot be used" in away.stderr
    assert "Traceback" not in away.stderr


def ask(process: psutil.Process, what: str, *arguments: str) -> list[Any]:
    # Ray starts and ends processes in the meantime.
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return getattr(process, what)(*arguments)
    return []


@pytest.fixture
def stays_for_nobody(home: Path) -> Iterator[None]:
    """Kill what a failed test has left; a training that continues would slow all later tests."""
    yield
    for process in processes_of(home):
        process.kill()


@pytest.mark.usefixtures("stays_for_nobody")
def test_nothing_listens_beyond_loopback_and_once_stopped_nothing_stays(home: Path) -> None:
    line, options = command(
        home, "deepskip.jobs.submit", "train", *TWELVE, "--optim.steps", "100000", "--run.name", "stopped"
    )
    process = subprocess.Popen(line, stdout=subprocess.PIPE, **options)
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("step "):
            break
    processes = processes_of(home)
    names = " ".join(" ".join(ask(each, "cmdline")) for each in processes)
    assert all(
        part in names for part in ("gcs_server", "raylet", "dashboard", "RayTrainWorker", "deepskip.jobs.submit")
    )
    doors = {
        (door.laddr.ip.removeprefix("::ffff:"), door.laddr.port)
        for each in processes
        for door in ask(each, "net_connections", "inet")
        if door.status == psutil.CONN_LISTEN or (door.type == socket.SOCK_DGRAM and not door.raddr)
    }
    # These are the head, its dashboard, raylet and agents, and the store where ranks find each other.
    assert len(doors) >= 8
    assert {address for address, _ in doors} <= {"127.0.0.1", "::1"}
    # The dashboard's page is open to all, but shows nothing of the cluster.
    with ThreadPoolExecutor(len(doors)) as pool:
        # Some ports say nothing until their time is up.
        assert sum(pool.map(answers_strangers, {port for _, port in doors})) <= 1
    # The token is in no file.
    token = next(each.environ()["RAY_AUTH_TOKEN"] for each in processes if "gcs_server" in each.name())
    head = Path(next(each.environ()[MARK] for each in processes if MARK in each.environ()))
    for file in (*home.rglob("*"), *head.rglob("*")):
        if file.is_file() and file.stat().st_size < 1e6:
            assert token.encode() not in file.read_bytes(), file
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=400) == 128 + signal.SIGTERM
    run_id = json.loads((home / "runs" / "stopped" / "run.json").read_text())["mlflow_run_id"]
    assert mlflow.MlflowClient(f"sqlite:///{home / 'runs' / 'mlflow.db'}").get_run(run_id).info.status == "KILLED"
    assert not processes_of(home)


def processes_of(home: Path) -> list[psutil.Process]:
    """Find the processes that were started for the user of this home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home):
                process.net_connections("inet")
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
