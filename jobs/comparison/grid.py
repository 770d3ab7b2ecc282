"""Define a comparison: its grid of networks, categories of data and seeds, and the training of each cell."""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from deepskip.config import Config
from deepskip.jobs import runs
from deepskip.jobs.plain_yaml import read_settings
from deepskip.jobs.settings import absolute, configured, parse_settings, stop

CELL = "cell.json"
# The folder in a run's folder that holds the report of its test.
TEST = "test"


@dataclass(kw_only=True)
class Row:
    """A network with its training settings: a row of the table."""

    label: str | None = None
    """name of the network in the table; null takes the name of the row"""
    settings: dict[str, Any] = field(default_factory=dict)
    """settings of its trainings, as in their YAML: {model: {network: unet}, optim: {optimizer: adamw}}"""
    flips: bool = False
    """average the probabilities of each image and its three mirrored copies in the test"""
    seeds: int | None = None
    """number of seeds, from the first; null takes all"""


@dataclass(kw_only=True)
class Grid:
    """Train and test every network on every category of data with every seed; see docs/compare.md."""

    networks: dict[str, Row]
    """networks by name, each a row; all others are compared with the first"""
    categories: dict[str, str]
    """data by name: YAML files of training settings, whose data.path holds train, val and the split to test on"""
    out: str = "runs/comparison"
    """folder of the cells' runs and of the results"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """seeds of the weights, the order of samples and the augmentation"""
    settings: dict[str, Any] = field(default_factory=dict)
    """settings of every training; they override those of the category, and those of the network override them"""
    test: str = "test"
    """split to test on"""
    threshold: Literal["validation", "half"] = "validation"
    """threshold of models with one class: the best on the validation split, or a probability of 0.5"""
    checkpoint: Literal["best", "last"] = "best"
    """checkpoint to test: the best on the validation split, or that of the last step"""
    only: list[str] | None = None
    """names of the networks to train now; null trains all"""
    workers: int = 1
    """cells that run at the same time on this machine; they share its cores and its GPU"""
    ray: bool = False
    """run cells as tasks on the Ray cluster at RAY_ADDRESS, whose machines must see `out` and the data"""
    cpus: float = 1.0
    """CPU cores of a cell, with ray"""
    gpus: float = 0.0
    """GPUs of a cell, or a share of one, with ray"""


@dataclass(frozen=True)
class Cell:
    """Describe one training and its test.

    Attributes:
        category: Name of its data.
        network: Name of its network.
        seed: Seed of the weights, the order of samples and the augmentation.
        folder: Folder of its run.
        config: Settings of its training.
        flips: Whether the test averages over mirrored copies of each image.
    """

    category: str
    network: str
    seed: int
    folder: Path
    config: Config
    flips: bool

    def __str__(self) -> str:
        return f"{self.category}, {self.network}, seed {self.seed}"


def read_grid(argv: list[str]) -> Grid:
    """Read the grid from --config and the command line, and validate the settings of every cell.

    Args:
        argv: Arguments of the command line.

    Raises:
        SystemExit: The grid, or the settings of a cell, are invalid.
    """
    grid = parse_settings("compare", Grid, argv)
    grid.out = str(absolute(grid.out, "out"))
    faults = [f"{name} is empty; a comparison needs one or more" for name in ("networks", "categories", "seeds")
              if not getattr(grid, name)]  # fmt: skip
    if len({*grid.seeds}) < len(grid.seeds):
        faults.append(f"seeds is {grid.seeds}; each seed may be named once")
    if grid.workers < 1:
        faults.append(f"workers is {grid.workers}; it must be 1 or more")
    faults += [f"only has {name!r}; the networks are {', '.join(grid.networks)}"
               for name in set(grid.only or ()) - set(grid.networks)]  # fmt: skip
    faults += [f"{kind} has {name!r}; it must be a valid folder name" for kind in ("networks", "categories")
               for name in getattr(grid, kind) if not name or "/" in name or name.startswith(".")]  # fmt: skip
    for path in grid.categories.values():
        if not Path(path).is_file():
            faults.append(f"categories: {path} is not a file")
    if faults:
        stop("\n".join(faults))
    # Import torch only now, so that --help is quick.
    from deepskip import networks

    # Build the outline of each network once, so that its error names it.
    for cell in {cell.network: cell for cell in cells(grid)}.values():
        try:
            networks.outline(asdict(cell.config.model), 3, 1)
        except (ValueError, ImportError) as error:
            stop(f"networks.{cell.network}: {error}")
    return grid


def cells(grid: Grid) -> Iterator[Cell]:
    """Yield all cells, with seeds outermost, so that an interrupted comparison still has whole tables.

    Raises:
        SystemExit: The settings of a cell are invalid.
    """
    tracked = {"run": {"tracking_uri": f"sqlite:///{Path(grid.out, 'mlflow.db')}", "experiment": "comparison"}}
    for place, seed in enumerate(grid.seeds):
        for category, path in grid.categories.items():
            common = merged(merged(tracked, read_yaml(path)), grid.settings)
            for name, row in grid.networks.items():
                if row.seeds is not None and place >= row.seeds:
                    continue
                storage = Path(grid.out, category, name)
                run = {"name": f"seed-{seed}", "seed": seed, "storage": str(storage)}
                settings = merged(merged(common, row.settings), {"run": run})
                config = configured(settings, f"networks.{name} on {category}")
                if "://" not in config.data.path:
                    config.data.path = str(absolute(config.data.path, f"data.path of {category}"))
                yield Cell(category, name, seed, storage / f"seed-{seed}", config, row.flips)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of settings, overridden section by section by others.

    Args:
        below: The settings to override.
        above: The settings that take precedence.
    """
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return result


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        SystemExit: The file is not valid.
    """
    try:
        return read_settings(Path(path))
    except ValueError as error:
        stop(f"categories: {path} {error}")


def write_cell(cell: Cell, grid: Grid) -> Path:
    """Write the settings that a cell's process needs into its run's folder, and return the file's path."""
    path = cell.folder / CELL
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON is valid YAML.
    runs.write_json(path, content_of(cell, grid))
    return path


def content_of(cell: Cell, grid: Grid) -> dict[str, Any]:
    """Return the settings that a cell's process needs."""
    config = asdict(cell.config)
    if config["cluster"]["cpus_per_worker"] is None:
        config["cluster"]["cpus_per_worker"] = threads_of(grid)
    tested = {"test": grid.test, "threshold": grid.threshold, "checkpoint": grid.checkpoint}
    return {"config": config, "flips": cell.flips, **tested}


def threads_of(grid: Grid) -> int:
    """Return the number of CPU cores of a cell."""
    return max(1, int(grid.cpus) if grid.ray else len(os.sched_getaffinity(0)) // grid.workers)


def read_cell(folder: Path) -> dict[str, Any]:
    """Return the settings of the last process of a cell, or {} if it never ran."""
    found = runs.read_json(folder / CELL)
    # Earlier versions tested the best checkpoint.
    return {"checkpoint": "best"} | found if found else {}
