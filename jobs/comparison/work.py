"""What a worker does, whoever started it: one task after another, with the libraries and the data kept."""

import fcntl
import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from jobs.comparison import grid as results
from jobs.comparison.cell import Cell, run_cell
from jobs.comparison.profile import hardware, profile
from jobs.comparison.rows import Grid, bf16, device_of, trained_as
from jobs.comparison.samples import Category, digest_of, load, size_of
from jobs.comparison.scores import with_pictures

TIMING = ".timing"


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a result, or an error."""

    task: "Task"
    result: dict[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class Task:
    """A cell to run, or, where there is none, a network to measure."""

    network: str
    cell: Cell | None = None

    def __str__(self) -> str:
        if self.cell is None:
            return self.network
        return f"{self.cell.category}/{self.network}/{self.cell.seed}"


def do(grid: Grid, task: Task, command: str) -> dict[str, Any]:
    """Does a task: gives the entry of networks.json, or a cell's record, which is written; raises what went wrong."""
    device = device_of(grid.device)
    row = grid.networks[task.network]
    # what the last task's network took is for the other workers
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if task.cell is None:
        size = max(size_of(Path(grid.data) / f"{name}.npz") for name in grid.categories)
        return profile(row, size, grid.batch_size, device, bf16(grid), partial(alone, Path(grid.out)))
    path = Path(grid.data) / f"{task.cell.category}.npz"
    category = category_of(path, device)
    record, panel = run_cell(row, category, task.cell, task.cell.seed == min(grid.seeds))
    if panel and grid.pictures:
        panel = with_pictures(panel, category.splits["test"])
    record |= {
        "row": trained_as(row, task.cell.category),
        "data": digest_of(path),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "command": command,
    }
    results.write(Path(grid.out), task.cell, record, panel)
    return record


def attempt(grid: Grid, task: Task, command: str) -> tuple[dict[str, Any] | None, str | None]:
    """Does a task; gives its result, or what went wrong and where."""
    try:
        return do(grid, task, command), None
    # whatever it is, it is the cell's failure and not the grid's end
    except Exception as failure:
        where = traceback.extract_tb(failure.__traceback__)[-1]
        text = " ".join(str(failure).split())[:500]
        return (
            None,
            f"{type(failure).__name__}: {text} ({where.name}, line {where.lineno} of {Path(where.filename).name})",
        )


# cells come category by category
@lru_cache(maxsize=1)
def category_of(path: Path, device: torch.device) -> Category:
    """Reads a category, unless it is the last one that was read."""
    return load(path, device)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Waits for the other workers of a grid that measure."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / TIMING).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
