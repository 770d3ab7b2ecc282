"""The admission log of a run that follows a stream: admissions.jsonl, a line for each generation, written before it is used.

With the seed and the settings it determines which samples each step takes (`data_shards.admission`).
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from deepskip.data_shards import manifest, storage
from deepskip.jobs import journal

FILE = "admissions.jsonl"


class Entry(NamedTuple):
    """A line of the log, a JSON object of these entries.

    Attributes:
        generation: number of the generation.
        step: step from which it is trained on, counted from the start of the training.
        shards: number of samples in each of its shards.
        digest: sha256 of its manifest, as hexadecimal digits.
    """

    generation: int
    step: int
    shards: list[int]
    digest: str


class OtherLog(ValueError):
    """The log of a run is not the one that is expected; the message says where, and what to do."""


def read(folder: Path) -> list[Entry]:
    """Read the admission log of a run.

    Args:
        folder: folder of the run.

    Returns:
        The entries: generations 0, 1, 2, ...; [] if there is no log.

    Raises:
        journal.BrokenFile: a line is not such an entry, or a generation is missing.
        OSError: the file cannot be read.
    """
    path = folder / FILE
    found = journal.checked(path, is_entry, lambda value: Entry(**value))
    for number, entry in enumerate(found):
        if entry.generation != number or (number and entry.step < found[number - 1].step):
            raise journal.broken(
                path, number + 1, f"generation {entry.generation} from step {entry.step} is out of order"
            )
    return found


def is_entry(value: Any) -> bool:
    """Return whether a JSON value is an entry of the log."""

    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**62

    return (
        isinstance(value, dict)
        and value.keys() == set(Entry._fields)
        and whole(value["generation"])
        and whole(value["step"])
        and isinstance(value["shards"], list)
        and all(map(whole, value["shards"]))
        and isinstance(value["digest"], str)
        and len(value["digest"]) == 64
        and not value["digest"].strip("0123456789abcdef")
    )


def text_of(entries: Iterable[Entry]) -> bytes:
    """Return the lines of entries."""
    return "".join(f"{json.dumps(entry._asdict())}\n" for entry in entries).encode()


def append(folder: Path, entries: list[Entry]) -> None:
    """Append entries to the log of a run; when this returns, they are durable.

    A crash can leave some of the lines. They are an earlier end of the same log, which no step has used. The generations that
    a run begins with are written by `replace`.

    Args:
        folder: folder of the run.
        entries: the next entries.

    Raises:
        OtherLog: the log does not end before them: another process has written to it.
        OSError: they cannot be written.
    """
    path = folder / FILE
    with storage.opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
        size = journal.cut_back(file.fileno())
        last = last_line(file.fileno(), size)
        number = json.loads(last)["generation"] + 1 if last else 0
        if number != entries[0].generation:
            raise OtherLog(
                f"{path} has {number} generations where this training knows {entries[0].generation}: another process has "
                "written to it. Stop that one, and run the same command again"
            )
        data = text_of(entries)
        try:
            if os.write(file.fileno(), data) != len(data):
                raise OSError(28, os.strerror(28), str(path))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
    storage.sync_folder(folder)


def last_line(descriptor: int, size: int) -> bytes:
    """Return the last line of a file of whole lines; b"" if it is empty.

    Args:
        descriptor: file descriptor, open for reading.
        size: size of the file, bytes.
    """
    found, begin = b"", size
    while begin and b"\n" not in found[:-1]:
        length = min(65536, begin)
        begin -= length
        found = os.pread(descriptor, length, begin) + found
    return found[:-1].rpartition(b"\n")[2]


def replace(folder: Path, entries: list[Entry]) -> None:
    """Write the whole log of a run, as a checkpoint has it.

    Args:
        folder: folder of the run.
        entries: all entries.

    Raises:
        OSError: it cannot be written.
    """
    storage.write_bytes(folder / FILE, text_of(entries))


def begun_with(folder: Path) -> int | None:
    """Return the number of generations that a run began with, or None if it has no log.

    Args:
        folder: folder of the run.

    Raises:
        journal.BrokenFile: as `read`.
        OSError: as `read`.
    """
    return sum(entry.step == 0 for entry in read(folder)) or None


def has_more(folder: Path, path: str) -> bool:
    """Return whether a data set has generations that a run has not been trained on.

    Args:
        folder: folder of the run.
        path: folder or URL of the data set.

    Raises:
        journal.BrokenFile: as `read`.
        OSError: as `read`, or the data cannot be read.
    """
    return manifest.read_if_exists(storage.join(path, "train"), len(read(folder))) is not None
