"""Rows of measurements in a file that stays readable if its writer dies: one JSON object a line, each in one write."""

import json
import os
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Append a row in one write, and sync it to the disk.

    Args:
        path: file of the rows.
        row: values of the row; the time is added.

    Raises:
        OSError: if the row cannot be written, for example on a full disk.
        ValueError: if JSON cannot represent a value, such as NaN or an infinity.
    """
    line = json.dumps({**row, "at": round(time.time(), 3)}, allow_nan=False) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # A line that a killed writer left incomplete must not corrupt this one.
        if _cut_off(path):
            os.write(file, b"\n")
        data = line.encode()
        if os.write(file, data) != len(data):
            raise OSError(f"{path}: a row was not written whole; is the disk full?")
        os.fsync(file)
    finally:
        os.close(file)


def _cut_off(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def read(path: Path) -> tuple[list[Row], int]:
    """Read the rows, and count incomplete lines."""
    rows, broken = [], 0
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            broken += bool(line.strip())
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    return rows, broken
