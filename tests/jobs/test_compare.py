"""The comparison's grid at toy size: every network and row, a kill in the middle, cells that fail, Ray with MLflow."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import yaml

from jobs.comparison.cell import Cell
from jobs.comparison.grid import cells, is_done, trained_otherwise, write, write_error, write_networks
from jobs.comparison.rows import Grid, Row, described, read_grid, trained_as
from jobs.comparison.run import Clock, run
from jobs.comparison.work import Outcome, Task
from tests.deepskip.networks.small import SMALL
from tests.jobs.squares import write_squares

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "jobs/configs/compare.yaml"
METRICS = {
    "iou", "miou", "pixel_accuracy", "precision", "recall", "f1", "object_recall", "false_alarms_per_image",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One category of bright squares, 32 x 32, and the config with small rivals."""
    folder = tmp_path_factory.mktemp("data")
    settings = yaml.safe_load(CONFIG.read_text())
    # `make compare-smoke` has the real widths
    for row in settings["networks"].values():
        row["widths"] = row.get("widths", {}) | SMALL.get(row.get("network", ""), {})
    (folder / "compare.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    write_squares(folder)
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "jobs.compare", "--config", str(data / "compare.yaml"), "--data", str(data), "--out", str(out),
        "--categories", "[squares]", "--steps", "1", "--validations", "1", "--batch_size", "2", "--workers", "2",
        *more,
    ]  # fmt: skip


def files_of(out: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("cells/*/*/*.json")}


# a minute on a quiet machine
@pytest.mark.timeout(900)
def test_the_whole_grid_goes_on_where_it_was_killed(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(data, out, "--seeds", "[0]", "--device", "cpu", "--ray", "false")
    first = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(files_of(out)) < 3:
        assert first.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(first.pid).children(recursive=True)
    assert len(workers) >= 2
    first.send_signal(signal.SIGKILL)
    first.wait()
    # in the middle of a cell, too
    assert not psutil.wait_procs(workers, timeout=10)[1]
    before = files_of(out)
    networks = json.loads((out / "networks.json").read_text())
    failed = Cell("squares", "deepskip", 0, 1, 2, 1)
    write_error(out, failed, "as if")
    second = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stdout + second.stderr
    after = files_of(out)
    rows = yaml.safe_load(CONFIG.read_text())["networks"]
    assert {path.parts[-2] for path in after} == set(rows) == set(networks)
    for path, seen in before.items():
        assert after[path] == seen or path.parts[-2] == "deepskip"
    for path, (_, text) in after.items():
        record = json.loads(text)
        assert record["error"] is None, record
        assert set(record["test"]) == set(record["validation"]) == METRICS
        assert sum(size["objects"] for size in record["by_size"]) == 4
        assert [image["key"] for image in record["images"]] == ["6", "7"]
        assert record["parameters"] == networks[path.parts[-2]]["parameters"]
        with np.load(path.with_suffix(".npz")) as panel:
            assert panel["median_image"].shape == (32, 32, 3)
    assert networks["deepskip"]["parameters"] == 645_665
    assert len({networks[name]["parameters"] for name in ("deepskip", "tuned-deep-supervision", "ablation-both")}) == 1


@pytest.mark.timeout(900)
def test_cells_as_ray_tasks_with_a_child_run_each(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    more = ("--only", "[ablation-none, pspnet]", "--device", "cpu", "--ray", "true")
    for seeds in ("[0]", "[0, 1]"):
        done = subprocess.run(
            command(data, out, *more, "--seeds", seeds),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    client = mlflow.MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {
        r.data.tags["mlflow.runName"]: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert set(children) == {f"squares/{name}/{seed}" for name in ("ablation-none", "pspnet") for seed in (0, 1)}
    record = json.loads((out / "cells/squares/pspnet/1.json").read_text())
    logged = children["squares/pspnet/1"].data.metrics
    assert logged["test/iou"] == record["test"]["iou"]
    assert logged["curves/train/loss"] == record["curves"]["train"][-1]["loss"]


class Answering:
    """A pool that answers at once: with an error for some networks, and for others with a cell of so many seconds."""

    def __init__(self, grid: Grid, broken: str = "") -> None:
        self.grid, self.broken, self.tasks, self.seen = grid, broken, [], []

    def free(self) -> int:
        return self.grid.workers - len(self.tasks)

    def start(self, task: Task) -> None:
        self.tasks.append(task)
        self.seen.append(task)

    def finished(self, timeout: float) -> list[Outcome]:
        task = self.tasks.pop(0)
        if task.network == self.broken:
            return [Outcome(task, None, "it broke")]
        timing = {"seconds_per_step": 0.1, "seconds_per_image": 0.1, "peak_memory_bytes": None, "cuda_graph": False}
        measured = {"parameters": 1, "gflops": 1.0} | timing
        return [Outcome(task, measured if task.cell is None else {"seconds": 50.0, "test": {"iou": 0.5}})]

    def close(self) -> None:
        pass


def grid_of(out: Path, **settings: object) -> Grid:
    rows = {name: Row(name, "rival") for name in ("one", "two")}
    return Grid(rows, ["a", "b"], out=str(out), seeds=[0, 1], steps=10, **settings)  # type: ignore[arg-type]


def test_order_and_failures(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    grid.networks["one"].seeds = 1
    order = [(cell.seed, cell.category, cell.network) for cell in cells(grid)]
    assert order == [
        (0, "a", "one"),
        (0, "a", "two"),
        (0, "b", "one"),
        (0, "b", "two"),
        (1, "a", "two"),
        (1, "b", "two"),
    ]
    pool = Answering(grid, "two")
    assert run(grid, pool) == {"done": 2, "failed": 4, "left": 0}
    assert json.loads((tmp_path / "cells/b/two/1.json").read_text())["error"] == "it broke"
    assert json.loads((tmp_path / "networks.json").read_text())["two"]["parameters"] is None
    assert not any(is_done(tmp_path, cell) for cell in cells(grid))


def test_a_cell_that_was_trained_otherwise_is_not_taken_for_one_of_the_grid(tmp_path: Path) -> None:
    for category in ("a", "b"):
        write_squares(tmp_path, category)
    grid = grid_of(tmp_path, data=str(tmp_path))
    first, second = list(cells(grid))[:2]
    for cell in (first, second):
        record = {"steps": 10, "batch_size": 8, "row": trained_as(grid.networks[cell.network], cell.category)}
        write(tmp_path, cell, record, {})
    assert trained_otherwise(grid) is None
    grid.networks["one"].label = "another name"
    write(tmp_path, first, {"steps": 10, "batch_size": 8}, {})
    assert trained_otherwise(grid) is None
    grid.networks["one"].head = "prior"
    assert "one/0.json was trained with head drawn, and the grid has prior" in (trained_otherwise(grid) or "")
    grid.networks["one"].head, grid.networks["one"].momentum = "drawn", 0.9
    assert "one/0.json was trained with momentum 0.95, and the grid has 0.9" in (trained_otherwise(grid) or "")
    grid.networks["one"].momentum = 0.95
    grid.networks["two"].by_category = {second.category: {"alpha": 0.7}}
    assert (trained_otherwise(grid) or "").startswith(
        f"{tmp_path / 'cells' / 'a' / 'two' / '0.json'} was trained with alpha 0.5, and the grid has 0.7; name another --out"
    )


def test_a_cell_of_another_budget_or_other_data_is_neither_taken_nor_written_over(tmp_path: Path) -> None:
    write_squares(tmp_path)
    rows = {"one": Row("one", "rival")}
    grid = Grid(rows, ["squares"], data=str(tmp_path), out=str(tmp_path / "out"), seeds=[0], steps=10)
    (cell,) = cells(grid)
    digest = hashlib.sha256((tmp_path / "squares.npz").read_bytes()).hexdigest()
    whole = {"steps": 10, "batch_size": 8, "validations": 8, "image_size": 32, "data": digest}
    for key, other in (("steps", 300), ("batch_size", 4), ("validations", 5), ("image_size", 256), ("data", "0" * 64)):
        write(tmp_path / "out", cell, whole | {key: other}, {})
        said = f"0.json was trained with {key} {other}, and the grid has {whole[key]}; name another --out"
        assert said in (trained_otherwise(grid) or "")
    # older cells do not say all of it
    for record in (whole, {key: whole[key] for key in ("steps", "batch_size", "image_size")}):
        write(tmp_path / "out", cell, record, {})
        assert trained_otherwise(grid) is None
        assert is_done(tmp_path / "out", cell)
    # one that failed is tried again, with whatever budget
    write_error(tmp_path / "out", cell, "it broke")
    grid.steps = 300
    assert trained_otherwise(grid) is None
    assert not is_done(tmp_path / "out", cell)


def test_rows_that_are_not_run_stay_as_they_were_run(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, device="cpu")
    write_networks(tmp_path, {name: described(row) | {"parameters": 1} for name, row in grid.networks.items()})
    for row in grid.networks.values():
        row.learning_rate = 0.5
    grid.only = ["two"]
    run(grid, Answering(grid))
    networks = json.loads((tmp_path / "networks.json").read_text())
    assert [networks[name]["learning_rate"] for name in ("one", "two")] == [1e-3, 0.5]


def test_no_cell_is_begun_that_would_not_end_in_time(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, budget_seconds=40.0, device="cpu")
    pool = Answering(grid)
    # the first cell is guessed from its steps; it says 50 s, so those of the other network, of equal steps, take that too
    assert run(grid, pool) == {"done": 1, "failed": 0, "left": 7}
    assert Clock(grid).fits(Task("one", next(iter(cells(grid)))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--steps", "0"], "steps is 0; it must be 1 or more"),
        (["--categories", "[none]"], "category none: there is no"),
        (["--only", "[nobody]"], "only: there is no network 'nobody'"),
        (["--stepps", "3"], "stepps is no setting"),
        (["--networks", "{x: {label: x, group: rival, network: vgg}}"], "networks.x.network is 'vgg'"),
        (
            ["--networks", "{x: {label: x, group: rival, network: mask_rcnn, optimizer: muon}}"],
            "muon is for networks of",
        ),
        (["--networks", "{x: {label: x, group: rival, network: fcn, deep_supervision: 1}}"], "deep_supervision is for"),
        (["--networks", "{x: {label: x, group: rival, network: mask_rcnn}}"], "networks.x.loss is cross_entropy"),
        (
            ["--networks", "{x: {label: x, group: rival, network: mask_rcnn, head: prior}}"],
            "networks.x: head: prior is",
        ),
    ],
)
def test_bad_settings_are_named(
    data: Path, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_grid(["--config", str(CONFIG), "--data", str(data), "--categories", "[squares]", *settings])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
