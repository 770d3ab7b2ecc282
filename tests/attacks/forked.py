"""Run something hostile in a forked child, and measure how it ends, its time and the memory that it adds."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANG_SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    """The outcome of an action in a child.

    Attributes:
        error: kind of the exception, or "" if there was none.
        said: text of the exception, or the result.
        killed: signal that ended the child, or 0.
        megabytes: the most memory that the child had above what it began with.
    """

    error: str
    said: str
    seconds: float
    megabytes: float
    killed: int


def run(action: Callable[[], Any], memory: int = 2**31, seconds: int = HANG_SECONDS) -> Outcome:
    """Run an action in a child that may take `memory` bytes more than this process has, and `seconds` seconds."""
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        # Nothing may leave this block, since the child is a copy of the whole test session.
        try:
            os.close(reading)
            os.write(writing, json.dumps(attempt(action, memory, seconds)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    status = os.waitpid(child, 0)[1]
    error, said, megabytes = json.loads(found) if found else ("Killed", "", 0.0)
    return Outcome(error, said, time.monotonic() - started, megabytes, os.WTERMSIG(status))


def attempt(action: Callable[[], Any], memory: int, seconds: int) -> tuple[str, str, float]:
    """Run an action within limits; return the exception's kind, the text and the megabytes."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(seconds)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    before = peak()
    try:
        error, said = "", repr(action())
    except BaseException as raised:
        error, said = type(raised).__name__, str(raised)
    return error, said[:1000], (peak() - before) / 2**10


def peak() -> int:
    """Return the peak memory of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
