"""The grid's cells: their order, which are done, and their files, written whole or not at all."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepskip import files
from jobs.comparison.cell import Cell
from jobs.comparison.rows import Grid, bf16, trained_as
from jobs.comparison.samples import digest_of, size_of

NETWORKS = "networks.json"
# how cells that do not say it were trained
OLDER = {"head": "drawn", "momentum": 0.95, "enlarge": 1}


def cells(grid: Grid) -> Iterator[Cell]:
    """Gives all cells: turns outermost, then seeds, then categories, so that what is cut off leaves whole tables."""
    rows = {name: row for name, row in grid.networks.items() if grid.only is None or name in grid.only}
    for turn in sorted({row.turn for row in rows.values()}):
        for number, seed in enumerate(grid.seeds):
            for category in grid.categories:
                for name, row in rows.items():
                    if row.turn == turn and (row.seeds is None or number < row.seeds):
                        yield Cell(category, name, seed, grid.steps, grid.batch_size, grid.validations, bf16(grid))


def path_of(out: Path, cell: Cell) -> Path:
    """Names a cell's file."""
    return out / "cells" / cell.category / cell.network / f"{cell.seed}.json"


def read(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file; None where there is none that is whole."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def is_done(out: Path, cell: Cell) -> bool:
    """Says whether a cell is there, without an error."""
    return done(out, cell) is not None


def done(out: Path, cell: Cell) -> dict[str, Any] | None:
    """Reads a cell that is there, without an error; None where there is none."""
    record = read(path_of(out, cell))
    return None if record is None or record.get("error") is not None else record


def trained_otherwise(grid: Grid) -> str | None:
    """Names the first cell that is there and is of another budget, other data or another training than the grid's.

    Older cells do not say all of it. So no cell is taken for what it is not, and none is written over.
    """
    out = Path(grid.out)
    for cell in cells(grid):
        record = done(out, cell) or {}
        budget = {key: getattr(cell, key) for key in ("steps", "batch_size", "validations")}
        path = Path(grid.data) / f"{cell.category}.npz"
        of_data = {"image_size": size_of(path), "data": digest_of(path)} if record else {}
        trained = trained_as(grid.networks[cell.network], cell.category)
        row = (OLDER if record else {}) | record.get("row", {})
        for found, asked in ((record, budget | of_data), (row, trained)):
            for key, value in asked.items():
                if found.get(key, value) != value:
                    return (
                        f"{path_of(out, cell)} was trained with {key} {found[key]}, and the grid has {value}; "
                        "name another --out, or remove what should be trained again"
                    )
    return None


def write(out: Path, cell: Cell, record: dict[str, Any], panel: dict[str, np.ndarray]) -> None:
    """Writes a cell; its panel first, as the record is what says that the cell is done."""
    path = path_of(out, cell)
    if panel:
        write_panel(path.with_suffix(".npz"), panel)
    # a curve or metric that is nan is no JSON
    files.write(path, json.dumps(record, allow_nan=False).encode())


def write_panel(path: Path, panel: dict[str, np.ndarray]) -> None:
    """Writes a panel's arrays."""
    data = io.BytesIO()
    np.savez_compressed(data, **panel)  # type: ignore[arg-type]
    files.write(path, data.getvalue())


def write_error(out: Path, cell: Cell, error: str) -> None:
    """Writes that a cell failed; the next run tries it again."""
    place = {key: getattr(cell, key) for key in ("category", "network", "seed", "steps", "batch_size")}
    files.write(path_of(out, cell), json.dumps(place | {"error": error}).encode())


def read_networks(out: Path) -> dict[str, Any]:
    """Reads what networks.json says of each network."""
    return read(out / NETWORKS) or {}


def write_networks(out: Path, networks: dict[str, Any]) -> None:
    """Writes networks.json."""
    files.write(out / NETWORKS, json.dumps(networks, indent=1).encode())
