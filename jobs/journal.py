"""Files of a run that grow by lines: what was measured, and the samples that were left out.

A line is added whole or not at all, through no link; what a power failure or a full disk left of a last line is cut off.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepskip.data_shards import storage

MEASURED = "metrics.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
# (kind, step, values, time stamp in ms)
Measured = tuple[str, int, dict[str, float], int]


class BrokenFile(ValueError):
    """A file of a run that DeepSkip did not write as it is; says where, and what to do."""


def append(path: Path, line: str) -> None:
    """Adds a line; raises OSError, after which the file is as it was."""
    with storage.opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
        size = cut_back(file.fileno())
        data = f"{line}\n".encode()
        try:
            if os.write(file.fileno(), data) != len(data):
                # a disk that is nearly full takes a part
                raise OSError(28, os.strerror(28), str(path))
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def cut_back(descriptor: int) -> int:
    """Cuts off what is behind a file's last line feed; gives its bytes."""
    size = end = os.fstat(descriptor).st_size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        length = min(4096, end)
        end += os.pread(descriptor, length, end - length).rfind(b"\n") + 1 - length
    if end != size:
        os.ftruncate(descriptor, end)
    return end


def whole_lines(path: Path) -> list[tuple[int, Any]]:
    """Reads a file's lines as (number, JSON); a torn last one is cut off, which is said. Raises BrokenFile, or OSError."""
    if not path.exists():
        return []
    if not path.is_file():
        raise BrokenFile(f"{path} is no file; remove it")
    size = path.stat().st_size
    with storage.opened(path, os.O_RDWR) as file:
        if torn := size - cut_back(file.fileno()):
            print(f"{path}: its last line was not whole; {torn} bytes were cut off", flush=True)
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise broken(path, number, str(error)) from error
    return found


def broken(path: Path, number: int, reason: str) -> BrokenFile:
    """Makes the error of a line."""
    return BrokenFile(
        f"{path}, line {number} is none that DeepSkip writes ({' '.join(reason.split())[:200]}). Remove that line, or the "
        "file: checkpoints do not depend on it"
    )


def write_down(path: Path, kind: str, step: int, values: dict[str, float]) -> int:
    """Appends what was measured at a step, as far as the disk takes it; gives its time stamp, in ms."""
    stamp = int(time.time() * 1000)
    # the training itself meets the full disk; what was measured is in memory still
    with suppress(OSError):
        append(path, json.dumps([kind, step, values, stamp]))
    return stamp


def read_measured(path: Path) -> list[Measured]:
    """Reads what a run measured; raises BrokenFile for lines that are none, or OSError."""
    return checked(path, is_measured, tuple)


def checked(path: Path, check: Callable[[Any], bool], make: Callable[[Any], Any]) -> list[Any]:
    """Reads a file's lines, each made of a JSON value that passes a check; raises BrokenFile, or OSError."""
    found = []
    for number, value in whole_lines(path):
        if not check(value):
            raise broken(path, number, "it has other fields")
        found.append(make(value))
    return found


def is_measured(value: Any) -> bool:
    """Says whether a JSON value is [kind, step, values, time stamp]."""
    return (
        isinstance(value, list)
        and [type(each) for each in value] == [str, int, dict, int]
        and all(isinstance(each, int | float) for each in value[2].values())
    )


def is_report(value: Any) -> bool:
    """Says whether a JSON value tells of a sample that was left out."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("split", "shard", "key"))


class BadSamples:
    """The samples that a training left out, each once, in bad_samples.jsonl of its folder; several ranks may add to it.

    Raises BrokenFile, or OSError.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / BAD_SAMPLES
        self.seen = set(checked(self.path, is_report, self._identity))

    def __len__(self) -> int:
        return len(self.seen)

    def add(self, report: dict[str, Any]) -> bool:
        """Writes down a report {"split", "shard", "key", "epoch", "reason"}; False where its sample is listed already."""
        if self._identity(report) in self.seen:
            return False
        self.seen.add(self._identity(report))
        append(self.path, json.dumps(report))
        return True

    @staticmethod
    def _identity(report: dict[str, Any]) -> tuple[str, ...]:
        return report["split"], report["shard"], report["key"]
