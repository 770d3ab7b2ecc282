"""Files of a run that grow line by line: measurements and skipped samples.

A line is appended completely or not at all, and never through a symbolic link. An incomplete last line, as a power failure
or a full disk leaves it, is ignored, and removed when the next line is appended.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

from deepskip.data_shards import storage

MEASURED = "metrics.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
# Kinds of measurements whose metrics have another prefix than the kind.
PREFIXES = {"validation": "val", "generation": "stream"}
T = TypeVar("T")


class Measurement(NamedTuple):
    """A line of metrics.jsonl, a JSON list of these fields.

    Attributes:
        kind: "train", "validation", "stream" or "generation".
        step: training step.
        values: metrics by name.
        stamp: time in ms since the epoch.
    """

    kind: str
    step: int
    values: dict[str, float]
    stamp: int


class SkippedSample(TypedDict):
    """A line of bad_samples.jsonl, a JSON object of these entries in this order.

    Attributes:
        split: "train" or "val".
        shard: location of the shard.
        key: key of the sample.
        epoch: epoch in which it was read.
        reason: what is wrong with it.
    """

    split: str
    shard: str
    key: str
    epoch: int
    reason: str


class BrokenFile(ValueError):
    """A file of a run has content that DeepSkip does not write; the message says where, and what to do."""


def append(path: Path, line: str) -> None:
    """Append a line to a file, after removing an incomplete last line.

    Args:
        path: the file, created if it does not exist.
        line: the line, without a line feed.

    Raises:
        OSError: the line cannot be written, or the path is a symbolic link; the complete lines of the file are
            unchanged.
    """
    with storage.opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
        size = cut_back(file.fileno())
        data = f"{line}\n".encode()
        try:
            if os.write(file.fileno(), data) != len(data):
                # a disk that is nearly full may accept only a part of the line
                raise OSError(28, os.strerror(28), str(path))
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def cut_back(descriptor: int) -> int:
    """Truncate a file after its last line feed.

    Args:
        descriptor: file descriptor, open for reading and writing.

    Returns:
        The size of the truncated file, bytes.
    """
    size = end = os.fstat(descriptor).st_size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        length = min(4096, end)
        end += os.pread(descriptor, length, end - length).rfind(b"\n") + 1 - length
    if end != size:
        os.ftruncate(descriptor, end)
    return end


def whole_lines(path: Path) -> list[tuple[int, Any]]:
    """Read the JSON value of each line of a file, and ignore an incomplete last line with a message.

    A process that only reads must not remove it: another one may be writing it.

    Args:
        path: the file; one that does not exist has no lines.

    Returns:
        Pairs of line number, from 1, and JSON value.

    Raises:
        BrokenFile: the path is not a regular file, or a line is not JSON.
        OSError: the file cannot be read, or is a symbolic link.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise BrokenFile(f"{path} is not a regular file; remove it")
    with storage.opened(path, os.O_RDONLY) as file:
        whole, _, torn = file.read().rpartition(b"\n")
    if torn:
        print(f"{path}: ignored the incomplete last line ({len(torn)} bytes)", flush=True)
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise broken(path, number, str(error)) from error
    return found


def broken(path: Path, number: int, reason: str) -> BrokenFile:
    """Return the error for an invalid line.

    Args:
        path: the file.
        number: number of the line, from 1.
        reason: what is wrong with it.
    """
    return BrokenFile(
        f"{path}, line {number} is not one that DeepSkip writes ({' '.join(reason.split())[:200]}). Remove that line, or the "
        "file: checkpoints do not depend on it"
    )


def write_down(path: Path, kind: str, step: int, values: dict[str, float]) -> int:
    """Append the values measured at a step, unless the disk does not accept them.

    Args:
        path: the journal of the run.
        kind: kind of the measurement.
        step: training step.
        values: metrics by name.

    Returns:
        The time stamp of the values, milliseconds since the epoch.
    """
    stamp = int(time.time() * 1000)
    # the training itself reports a full disk; the values are still in memory
    with suppress(OSError):
        append(path, json.dumps(Measurement(kind, step, values, stamp)))
    return stamp


def read_measured(path: Path) -> list[Measurement]:
    """Read all measurements of a run.

    Args:
        path: the journal of the run.

    Returns:
        The measurements, in the order in which they were written.

    Raises:
        BrokenFile: a line is not a measurement.
        OSError: the file cannot be read.
    """
    return checked(path, is_measured, lambda value: Measurement(*value))


def checked(path: Path, check: Callable[[Any], bool], make: Callable[[Any], T]) -> list[T]:
    """Read the lines of a file, and validate and convert the JSON value of each.

    Args:
        path: the file.
        check: returns whether a JSON value is valid.
        make: converts a valid JSON value.

    Returns:
        The converted values.

    Raises:
        BrokenFile: a line is invalid.
        OSError: the file cannot be read.
    """
    found = []
    for number, value in whole_lines(path):
        if not check(value):
            raise broken(path, number, "it has unexpected fields")
        found.append(make(value))
    return found


def is_measured(value: Any) -> bool:
    """Return whether a JSON value is [kind, step, values, time stamp]."""
    return (
        isinstance(value, list)
        and [type(each) for each in value] == [str, int, dict, int]
        and all(isinstance(each, int | float) for each in value[2].values())
    )


def is_report(value: Any) -> bool:
    """Return whether a JSON value is the report of a skipped sample."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("split", "shard", "key"))


class BadSamples:
    """The samples that a training skipped, each listed once in bad_samples.jsonl; several ranks may append to it.

    Args:
        folder: folder of the run.

    Attributes:
        path: the file.
        seen: split, shard and key of each listed sample.

    Raises:
        BrokenFile: a line of the file is not such a report.
        OSError: the file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / BAD_SAMPLES
        self.seen = set(checked(self.path, is_report, self._identity))

    def __len__(self) -> int:
        return len(self.seen)

    def add(self, report: SkippedSample) -> bool:
        """Append the report of a sample, unless the sample is already listed.

        Args:
            report: the report.

        Returns:
            Whether the report was appended.

        Raises:
            OSError: the report cannot be written.
        """
        if self._identity(report) in self.seen:
            return False
        self.seen.add(self._identity(report))
        append(self.path, json.dumps(report))
        return True

    @staticmethod
    def _identity(report: SkippedSample) -> tuple[str, str, str]:
        return report["split"], report["shard"], report["key"]
