"""What workers tell the driver while they train, and the queue that it goes through."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deepskip.jobs.journal import write_down


@dataclass(frozen=True)
class Started:
    """A group of workers trains, resuming at a step."""

    step: int
    workers: int


@dataclass(frozen=True)
class Measured:
    """Metrics of a window of steps or of a validation; stamp: when, in ms, as the journal has it."""

    kind: Literal["train", "validation"]
    step: int
    values: dict[str, float]
    stamp: int = 0


@dataclass(frozen=True)
class Panel:
    """Validation images with their labels, small enough to send."""

    step: int
    images: list[dict[str, Any]]


@dataclass(frozen=True)
class Warned:
    """Something that a person should know, and the training goes on."""

    text: str


@dataclass(frozen=True)
class SampleSkipped:
    """A bad sample was skipped: split, shard, key and reason."""

    report: dict[str, Any]


@dataclass(frozen=True)
class WorkersFailed:
    """Workers died or raised, and Ray starts the group again."""

    text: str


@dataclass(frozen=True)
class Stopped:
    """The workers wrote a checkpoint because the job is being stopped, and ended."""

    text: str


@dataclass(frozen=True)
class Fatal:
    """A fault that no restart mends."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The training is done; the trainer's summary."""

    summary: dict[str, Any]


Event = Started | Measured | Panel | Warned | SampleSkipped | WorkersFailed | Stopped | Fatal | Finished


class EventQueue:
    """Takes events from workers and hands them to the driver; an actor that outlives the workers.

    What was measured is in the journal before the worker hears that it was taken, so a driver may be killed at any time.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.events: list[Event] = []
        self.over = False

    def put(self, event: Event) -> None:
        """Take one event."""
        self.over = self.over or isinstance(event, Fatal)
        if isinstance(event, Measured):
            event = replace(event, stamp=write_down(self.journal, event.kind, event.step, event.values))
        self.events.append(event)

    def drain(self) -> list[Event]:
        """Return all events since the last call."""
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        """Note that the job is being stopped."""
        self.over = True

    def is_over(self) -> bool:
        """Tell whether the job is being stopped, or a worker met a fault that no restart mends."""
        return self.over
