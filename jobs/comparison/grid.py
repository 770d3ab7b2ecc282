"""What a comparison is made of: networks, categories of data and seeds, and the ordinary training that each cell is."""

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
# of a run's folder, where the report of its test is
TEST = "test"


@dataclass(kw_only=True)
class Row:
    """A network with the way it is trained: a row of the table."""

    label: str | None = None
    """its name in the table; null takes the name of the row"""
    settings: dict[str, Any] = field(default_factory=dict)
    """of its trainings, as in their YAML: {model: {network: unet}, optim: {optimizer: adamw}}"""
    flips: bool = False
    """test on the mean over each image and its mirrorings"""
    seeds: int | None = None
    """only the first so many seeds; null takes all"""


@dataclass(kw_only=True)
class Grid:
    """Trains and tests every network on every category with every seed; see docs/compare.md."""

    networks: dict[str, Row]
    """rows by name; the others are compared with the first"""
    categories: dict[str, str]
    """data by name: YAML files of settings of a training, of which data.path has train, val and a split to test on"""
    out: Path = Path("runs/comparison")
    """folder of the cells' runs and of the results"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """of weights, order and augmentation"""
    settings: dict[str, Any] = field(default_factory=dict)
    """of every training, over those of its category and below those of its network"""
    test: str = "test"
    """the split that is tested on"""
    threshold: Literal["validation", "half"] = "validation"
    """of one class: the best on validation, or a probability of 0.5"""
    only: list[str] | None = None
    """networks to train now; null trains all"""
    workers: int = 1
    """cells at a time on this machine; they share its cores and its GPU"""
    ray: bool = False
    """cells as tasks on the Ray cluster at RAY_ADDRESS, which sees `out` and the data"""
    cpus: float = 1.0
    """with ray: CPU cores of a cell"""
    gpus: float = 0.0
    """with ray: GPUs of a cell, or share of one"""


@dataclass(frozen=True)
class Cell:
    """One training and its test: where it stands in the grid, its run's folder, and its settings."""

    category: str
    network: str
    seed: int
    folder: Path
    config: Config
    flips: bool

    def __str__(self) -> str:
        return f"{self.category}, {self.network}, seed {self.seed}"


def read_grid(argv: list[str]) -> Grid:
    """Read the grid from --config and the command line; bad input, of any cell, ends the program."""
    grid = parse_settings("compare", Grid, argv)
    grid.out = absolute(str(grid.out), "out")
    faults = [f"{name} is empty; a comparison needs one or more" for name in ("networks", "categories", "seeds")
              if not getattr(grid, name)]  # fmt: skip
    if grid.workers < 1:
        faults.append(f"workers is {grid.workers}; it must be 1 or more")
    faults += [f"only has {name!r}; the networks are {', '.join(grid.networks)}"
               for name in set(grid.only or ()) - set(grid.networks)]  # fmt: skip
    faults += [f"{kind} has {name!r}; it becomes a folder's name, so it must be one" for kind in ("networks", "categories")
               for name in getattr(grid, kind) if not name or "/" in name or name.startswith(".")]  # fmt: skip
    for path in grid.categories.values():
        if not Path(path).is_file():
            faults.append(f"categories: there is no file {path}")
    if faults:
        stop("\n".join(faults))
    # torch is for trainings, not for --help
    from deepskip import networks

    # each names what is wrong with it
    for cell in {cell.network: cell for cell in cells(grid)}.values():
        try:
            networks.outline(asdict(cell.config.model), 3, 1)
        except (ValueError, ImportError) as error:
            stop(f"networks.{cell.network}: {error}")
    return grid


def cells(grid: Grid) -> Iterator[Cell]:
    """Yield all cells, seeds outermost, so that what is cut off leaves whole tables; bad settings end the program."""
    tracked = {"run": {"tracking_uri": f"sqlite:///{grid.out / 'mlflow.db'}", "experiment": "comparison"}}
    for place, seed in enumerate(grid.seeds):
        for category, path in grid.categories.items():
            common = merged(merged(tracked, read_yaml(path)), grid.settings)
            for name, row in grid.networks.items():
                if row.seeds is not None and place >= row.seeds:
                    continue
                storage = grid.out / category / name
                run = {"name": f"seed-{seed}", "seed": seed, "storage": str(storage)}
                settings = merged(merged(common, row.settings), {"run": run})
                config = configured(settings, f"networks.{name} on {category}")
                if "://" not in config.data.path:
                    config.data.path = str(absolute(config.data.path, f"data.path of {category}"))
                yield Cell(category, name, seed, storage / f"seed-{seed}", config, row.flips)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings, by section, over others."""
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return result


def read_yaml(path: str) -> dict[str, Any]:
    """Read a file of settings; ends the program where it is none."""
    try:
        return read_settings(Path(path))
    except ValueError as error:
        stop(f"categories: {path} {error}")


def write_cell(cell: Cell, grid: Grid) -> Path:
    """Write what a cell's process needs, into its run's folder, and return the file."""
    path = cell.folder / CELL
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON is YAML
    runs.write_json(path, content_of(cell, grid))
    return path


def content_of(cell: Cell, grid: Grid) -> dict[str, Any]:
    """Return what the process of a cell is told."""
    config = asdict(cell.config)
    if config["cluster"]["cpus_per_worker"] is None:
        config["cluster"]["cpus_per_worker"] = threads_of(grid)
    return {"config": config, "flips": cell.flips, "test": grid.test, "threshold": grid.threshold}


def threads_of(grid: Grid) -> int:
    """Return the CPU cores of a cell."""
    return max(1, int(grid.cpus) if grid.ray else len(os.sched_getaffinity(0)) // grid.workers)


def read_cell(folder: Path) -> dict[str, Any]:
    """Return what the process of a cell was told last; {} where there was none."""
    return runs.read_json(folder / CELL)
