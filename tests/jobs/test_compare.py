"""A grid of normal trainings is killed and resumed, and its table is computed by hand; wrong grids are refused."""

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from deepskip.data_shards.commands import pack_coins
from deepskip.jobs import compare, runs
from deepskip.jobs.comparison import table
from deepskip.jobs.comparison.grid import Grid, Row, cells, read_grid

ROOT = Path(__file__).parents[2]
TINY = {
    "optim": {"steps": 2, "warmup_steps": 1, "global_batch_size": 2},
    "run": {"tracking_uri": "none"},
    "cluster": {"gpu": False},
}


def write_grid(folder: Path, seeds: Sequence[int] = (0, 1)) -> Path:
    data = {"data": {"path": str(folder / "coins"), "crop": 64}, "model": {"base_channels": 4}}
    (folder / "coins.yaml").write_text(yaml.safe_dump(data))
    networks = {
        "deepskip": {"label": "DeepSkip"},
        "unet": {"flips": True, "settings": {"model": {"network": "plain_unet", "base_channels": 2}}},
    }
    grid = {"categories": {"coins": str(folder / "coins.yaml")}, "networks": networks, "settings": TINY,
            "seeds": list(seeds), "out": str(folder / "out")}  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder / "grid.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("grid")
    pack_coins(made / "coins", {"train": 6, "val": 2, "test": 3})
    write_grid(made)
    return made


def test_a_grid_that_was_killed_goes_on_and_its_table_is_that_of_its_reports(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-u", "-m", "deepskip.jobs.compare", "--config", str(folder / "grid.yaml")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        for line in killed.stdout:
            if line.startswith("1/4"):
                killed.send_signal(signal.SIGKILL)
    done = list((folder / "out").glob("coins/*/*/test/report.json"))
    assert 1 <= len(done) < 4
    before = {path: path.stat().st_mtime_ns for path in done}
    again = subprocess.run([*command, "--workers", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"4 cells, {len(done)} done" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in done} == before

    with (folder / "out" / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["network"], row["seed"]) for row in rows] == [
        ("deepskip", "0"),
        ("unet", "0"),
        ("deepskip", "1"),
        ("unet", "1"),
    ]
    iou: dict[str, list[float]] = {"deepskip": [], "unet": []}
    for row in rows:
        run = folder / "out" / "coins" / row["network"] / f"seed-{row['seed']}"
        report, validation = (json.loads((run / split / "report.json").read_text()) for split in ("test", "threshold"))
        assert float(row["iou"]) == report["metrics"]["iou"]
        # The threshold is the best one on validation.
        assert float(row["threshold"]) == report["threshold"] == validation["classes"][0]["best_threshold"]
        assert report["flips"] is (row["network"] == "unet")
        assert report["data"]["images"] == 3
        assert int(row["found_under_16_pixels"]) == report["by_size"][0]["found"]
        iou[row["network"]].append(100 * report["metrics"]["iou"])
    first, second = iou["deepskip"], iou["unet"]
    line = (folder / "out" / "table.md").read_text().splitlines()[2]
    parameters = int(rows[0]["parameters"]) / 1e6
    spread = f"{statistics.fmean(first):.1f} ± {statistics.stdev(first):.1f}"
    assert line.startswith(f"| DeepSkip | {parameters:.2f} M | {spread} |")
    changes = [b - a for a, b in zip(first, second, strict=True)]
    # With two seeds, the interval is 12.706 standard errors either way.
    half = 12.706 * statistics.stdev(changes) / 2**0.5
    mean = statistics.fmean(changes)
    line = (folder / "out" / "table.md").read_text().splitlines()[3]
    assert line.endswith(f"| 2 | {mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f}) |")
    assert table.read(folder / "out" / "cells.csv") == table.collect(read_grid(command[4:]))
    for figure in ("categories", "parameters"):
        assert "<svg" in (folder / "out" / f"{figure}.svg").read_text()

    # A cell is a normal training.
    run = folder / "out" / "coins" / "deepskip" / "seed-1"
    record = runs.read_json(run / "run.json")["config"]
    assert (record["run"]["seed"], record["optim"]["steps"], record["model"]["base_channels"]) == (1, 2, 4)
    with pytest.raises(SystemExit):
        compare.main(["--config", str(folder / "grid.yaml"), "--settings", '{"run": {"tracking_uri": "none"}}'])

    # Without its data a finished grid still has its table, and with other data it has none.
    written, reader = (folder / "out" / "table.md").read_text(), capsys.readouterr
    shutil.move(folder / "coins", folder / "aside")
    with pytest.raises(SystemExit, match="0"):
        compare.main(["--config", str(folder / "grid.yaml")])
    assert (folder / "out" / "table.md").read_text() == written
    for split, number, said in (("train", 5, "trained"), ("test", 2, "tested")):
        shutil.copytree(folder / "aside", folder / "coins")
        shutil.rmtree(folder / "coins" / split)
        pack_coins(folder / "coins", {split: number})
        reader()
        with pytest.raises(SystemExit, match="2"):
            compare.main(["--config", str(folder / "grid.yaml")])
        lines = reader().err.splitlines()
        start = (
            f"error: coins, deepskip, seed 0 was {said} on other data than is there now: {split} has samples {number}"
        )
        assert lines[0].startswith(start)
        assert len(lines) == 5
        shutil.rmtree(folder / "coins")
    shutil.move(folder / "aside", folder / "coins")


def test_on_ray_and_a_cell_that_fails(folder: Path, tmp_path: Path) -> None:
    command = ["--config", str(folder / "grid.yaml"), "--seeds", "[0]", "--out", str(tmp_path / "out"), "--ray", "true"]
    explodes = {"optim": {"learning_rate": 10, "clip_norm": 0}, "loss": {"beta": 1e38}}
    broken = json.dumps({"deepskip": {}, "broken": {"settings": explodes}})
    found = subprocess.run(
        [sys.executable, "-m", "deepskip.jobs.compare", *command, "--networks", broken],
        cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 1, found.stdout + found.stderr
    assert "coins, deepskip, seed 0: done" in found.stdout
    assert "coins, broken, seed 0: exit status 2, error: the loss of step" in found.stdout
    assert "1 cells done, 1 failed, 0 left" in found.stdout


def test_means_are_of_seeds_for_which_all_categories_are_done() -> None:
    grid = Grid(networks={"one": Row(label="One"), "two": Row()}, categories={"a": "", "b": ""}, seeds=[0, 1])
    values = {
        ("one", "a", 0): 0.2,
        ("one", "b", 0): 0.4,
        ("one", "a", 1): 0.9,
        ("two", "a", 0): 0.5,
        ("two", "b", 0): None,
    }
    results = [
        {"network": network, "category": category, "seed": seed, "iou": iou, "parameters": 650_000, "precision": 0.25,
         "recall": None, "dice": iou, "object_recall": 0.5, "false_alarms_per_image": 2.0,
         "milliseconds_per_image": 10.0 if category == "a" else 40.0, "objects_under_16_pixels": 5,
         "found_under_16_pixels": 2 if category == "a" else 3}
        for (network, category, seed), iou in values.items()
    ]  # fmt: skip
    assert table.markdown(grid, results).splitlines()[2:] == [
        "| One | 0.65 M | 30.0 | 25.0 | 0.0 | 30.0 | 50.0 | 2.0 | 25.0 | 1 |  |",
        "| two | 0.65 M | 25.0 | 25.0 | 0.0 | 25.0 | 50.0 | 2.0 | 25.0 | 1 | -5.0 |",
        "",
        "| IoU | a | b | smallest objects found |",
        "|---|---:|---:|---:|",
        "| One | 55.0 ± 49.5 | 40.0 | 7 of 15 |",
        "| two | 50.0 | 0.0 | 5 of 10 |",
    ]


def test_the_projects_grid_can_be() -> None:
    grid = read_grid(["--config", str(ROOT / "jobs" / "configs" / "compare.yaml")])
    every = list(cells(grid))
    assert len(every) == 7 * 8
    assert len({cell.folder for cell in every}) == len(every)
    tuned = next(cell.config for cell in every if (cell.category, cell.network) == ("cars", "tuned"))
    # The category's settings count, and the network's override them.
    assert (tuned.augment.rotate90, tuned.optim.learning_rate, tuned.model.norm) == (False, 0.008, "instance-batch")


def test_the_tables_of_the_page_are_those_of_its_csv() -> None:
    grid = read_grid(["--config", str(ROOT / "jobs" / "configs" / "compare.yaml")])
    page = (ROOT / "docs" / "compare.md").read_text()
    for made in table.markdown(grid, table.read(ROOT / "docs" / "comparison.csv")).split("\n\n"):
        assert made.strip() in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "[]"], "seeds is empty"),
        (["--seeds", "[0, 1, 0]"], "seeds is [0, 1, 0]; each seed may be named once"),
        (["--workers", "0"], "workers is 0"),
        (["--only", "[vgg]"], "only has 'vgg'; the networks are deepskip, unet"),
        (["--categories", "{x: nowhere.yaml}"], "nowhere.yaml is not a file"),
        (["--networks", "{a/b: {}}"], "networks has 'a/b'"),
        (["--networks", "{a: {settings: {model: {network: vgg}}}}"], "networks.a on coins: model.network is 'vgg'"),
        (["--networks", "{a: {settings: {optim: {stepz: 3}}}}"], "networks.a on coins: unknown setting optim.stepz"),
        (["--settings", "{optim: {steps: 0}}"], "networks.deepskip on coins: optim.steps is 0"),
    ],
)
def test_grids_that_cannot_be(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(["--config", str(folder / "grid.yaml"), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
