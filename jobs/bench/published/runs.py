"""Train and test one network on one set, and keep what is done in a CSV."""

import csv
import hashlib
import io
import json
import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from deepskip import checkpoint
from deepskip.config import Config, ModelConfig, is_free
from deepskip.data_shards import storage
from deepskip.jobs import journal
from deepskip.jobs import runs as run_folders
from deepskip.jobs.compare import data_here, done_otherwise, kind_of
from deepskip.jobs.comparison.cell import complete
from deepskip.jobs.comparison.grid import Cell, Grid, merged, read_yaml, write_cell
from deepskip.jobs.runs import NOT_TRACKED, UNKNOWN_BEFORE
from deepskip.jobs.settings import configured, flatten, stop
from deepskip.kernels.bench.measure import cpu_name

METRICS = ("iou", "niou", "pd", "fa")
# what makes a run, so that a row with the same values means that it is done
KEY = ("set", "part", "network", "model", "seed", "recipe")
COLUMNS = (
    *KEY, "steps", "batch", "crop", "images", *METRICS, "precision", "recall", "object_recall", "false_alarms_per_image",
    "parameters", "seconds", "images_per_second", "hardware", "date", "command", "weights_sha256",
)  # fmt: skip
RECIPES = "recipes"
Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """What is run.

    Attributes:
        set: key of data.SETS.
        part: one of data.PARTS.
        network: value of model.network.
        seed: seed of the weights, the order of samples and the augmentation.
        recipe: YAML of the training's settings.
        settings: YAML of settings that override the recipe.
    """

    set: str
    part: str
    network: str
    seed: int
    recipe: Path
    settings: str = "{}"

    def command(self) -> str:
        """Return the command of the run, without the paths of a machine."""
        recipe = self.recipe.name if self.recipe.is_absolute() else str(self.recipe)
        words = ["python", "-m", "deepskip.jobs.bench.published", "run", self.set, "--data", f"data/{self.set}"]
        words += ["--part", self.part, "--network", self.network, "--seeds", str(self.seed), "--recipe", recipe]
        return shlex.join(words + (["--settings", self.settings] if self.settings != "{}" else []))


def run(trial: Trial, data: Path, out: Path, table: Path) -> Row:
    """Train and test, from where an earlier process stopped, and add a row to the table.

    The checkpoint of the last step is tested at a probability of 0.5, without flips: on test images, or on the
    validation images of the part search.

    Args:
        trial: what is run.
        data: folder that `data.pack` made.
        out: folder of the runs.
        table: CSV of all runs, made if it does not exist. The settings go into the folder RECIPES next to it.

    Returns:
        The row, of this run or of an earlier one.

    Raises:
        SystemExit: status 2 for invalid settings or data, or if the run's folder has other settings; STOPPED after a
            SIGTERM, once a checkpoint is written.
    """
    config = config_of(trial, data)
    recipe = recipe_of(config)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    key: Row = {
        "set": trial.set,
        "part": trial.part,
        "network": trial.network,
        "model": model_of(config),
        "seed": trial.seed,
    }
    key |= {"recipe": digest}
    for row in read_rows(table):
        if all(row[name] == str(value) for name, value in key.items()):
            print(f"{table} has this run")
            return row
    model = hashlib.sha256(key["model"].encode()).hexdigest()[:6]
    folder = out.absolute() / f"{trial.set}-{trial.part}" / f"{trial.network}-{model}-{digest}"
    config.run.storage, config.run.name = str(folder), f"seed-{trial.seed}"
    cell = Cell(trial.set, trial.network, trial.seed, folder / config.run.name, config, flips=False)
    split = "val" if trial.part == "search" else "test"
    grid = Grid(networks={}, categories={}, out=str(out.absolute()), test=split, threshold="half", checkpoint="last")
    if fault := done_otherwise(cell, grid, data_here([cell], grid)[kind_of(cell)]):
        stop(f"{fault}; remove {cell.folder} to run it again")
    report = complete(write_cell(cell, grid))
    row = key | result_of(cell, report) | {"command": trial.command()}
    table.parent.mkdir(parents=True, exist_ok=True)
    (table.parent / RECIPES).mkdir(exist_ok=True)
    run_folders.write_json(table.parent / RECIPES / f"{digest}.json", recipe)
    add_row(table, row)
    return {name: str(row[name]) for name in COLUMNS}


def config_of(trial: Trial, data: Path) -> Config:
    """Return the settings of a run's training.

    Args:
        trial: what is run.
        data: folder that `data.pack` made.

    Raises:
        SystemExit: status 2 if they are invalid.
    """
    try:
        above = yaml.safe_load(trial.settings) or {}
    except yaml.YAMLError as error:
        stop(f"--settings is not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(above, dict):
        stop(f"--settings is {trial.settings!r}; it must be settings by section: {{optim: {{steps: 2000}}}}")
    settings = merged({"run": {"tracking_uri": NOT_TRACKED}}, read_yaml(str(trial.recipe)))
    settings = merged(merged(settings, above), {"model": {"network": trial.network}, "run": {"seed": trial.seed}})
    config = configured(settings, str(trial.recipe))
    config.data.path = str((data / trial.part).absolute())
    return config


def recipe_of(config: Config) -> dict[str, Any]:
    """Return the settings by which any network is trained: all that change the result, apart from network, seed and path.

    A setting that did not exist once is omitted if it is off, so that the digest of a recipe stays the same.

    Args:
        config: settings of a training.
    """
    return {
        key: value
        for key, value in flatten(asdict(config)).items()
        if not is_free(key)
        and not key.startswith("model.")
        and key not in ("run.seed", "run.panels", "run.experiment", "data.path")
        and not (key in UNKNOWN_BEFORE and UNKNOWN_BEFORE[key] == value)
    }


def model_of(config: Config) -> str:
    """Return the settings of the network that are not the default, as JSON."""
    default = asdict(ModelConfig())
    changed = {key: value for key, value in asdict(config.model).items() if value != default[key] and key != "network"}
    return json.dumps(changed, sort_keys=True)


def result_of(cell: Cell, report: dict[str, Any]) -> Row:
    """Return the columns of a run that are measured.

    Args:
        cell: the run.
        report: report of its test.
    """
    summary = run_folders.read_json(cell.folder / run_folders.SUMMARY)
    path = checkpoint.step_path(cell.folder, summary["steps"])
    state = checkpoint.read_model(path)
    metrics = {name: report["metrics"][name] for name in COLUMNS if name in report["metrics"]}
    optim, name = cell.config.optim, report["device"]
    if name.startswith("cuda"):
        name = torch.cuda.get_device_name(name)
    else:
        name = f"{cpu_name()}, {int(cell.config.cluster.cpus_per_worker or len(os.sched_getaffinity(0)))} cores"
    return {
        "steps": summary["steps"], "batch": optim.global_batch_size, "crop": cell.config.data.crop,
        "images": report["data"]["images"], **metrics, "parameters": summary["parameters"],
        "seconds": round(summary["seconds"], 1), "images_per_second": round(summary["images_per_second"], 2),
        "hardware": name, "date": time.strftime("%Y-%m-%d"),
        "weights_sha256": weights_digest(state["model"] if state["ema"] is None else state["ema"]),
    }  # fmt: skip


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a network's weights and buffers: of name, dtype, shape and values, in the order of names.

    Args:
        weights: tensors of any shape (*,), by name.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def read_rows(table: Path) -> list[Row]:
    """Return the rows of a CSV of runs, [] if it does not exist.

    Raises:
        SystemExit: status 2 if it has other columns.
    """
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            stop(f"{table} has other columns than {','.join(COLUMNS)}")
        return list(reader)


def add_row(table: Path, row: Row) -> None:
    """Append a row to a CSV of runs, completely or not at all; a new file gets a header.

    Args:
        table: the CSV.
        row: value of each of COLUMNS.
    """
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="").writerow(row)
    if not table.is_file():
        storage.write_bytes(table, f"{','.join(COLUMNS)}\n".encode())
    journal.append(table, text.getvalue())
