"""The events that workers send to the driver while they train, and the queue between them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from deepskip.jobs.journal import SkippedSample, write_down

# The queue's process needs no torch.
if TYPE_CHECKING:
    from deepskip.trainer import Summary


@dataclass(frozen=True)
class Started:
    """A group of workers has started to train.

    Attributes:
        step: the step at which it starts or resumes.
        workers: number of workers.
    """

    step: int
    workers: int


@dataclass(frozen=True)
class Measured:
    """Metrics of a window of training steps, of a validation, of a stream that is followed, or of one of its generations.

    Attributes:
        kind: "train", "validation", "stream" or "generation".
        step: the last step that the metrics cover.
        values: the metrics by name.
        stamp: time in ms since the epoch, as in the run's journal; 0 until the event is written there.
    """

    kind: Literal["train", "validation", "stream", "generation"]
    step: int
    values: dict[str, float]
    stamp: int = 0


class Thumbnail(TypedDict):
    """A validation image of a panel, reduced by `deepskip.evaluation.thumbnail`.

    Attributes:
        image: the image (h, w, bands), of three bands at most.
        mask: true labels (h, w).
        labels: predicted labels (h, w).
        key: key of the sample.
    """

    image: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    key: str


@dataclass(frozen=True)
class Panel:
    """Validation images with masks and predictions, reduced in size so that they are cheap to send.

    Attributes:
        step: the step after which they were predicted.
        images: the reduced images.
    """

    step: int
    images: list[Thumbnail]


@dataclass(frozen=True)
class Warned:
    """A warning for the user; the training continues."""

    text: str


@dataclass(frozen=True)
class Waiting:
    """All that is known of a stream is trained on, and nothing is new.

    Attributes:
        step: number of steps done.
    """

    step: int


@dataclass(frozen=True)
class SampleSkipped:
    """A bad sample was skipped.

    Attributes:
        report: which sample, and why.
    """

    report: SkippedSample


@dataclass(frozen=True)
class WorkersFailed:
    """Workers died or raised an error, and Ray starts the group again."""

    text: str


@dataclass(frozen=True)
class Stopped:
    """The workers were asked to stop; they wrote a checkpoint and ended."""

    text: str


@dataclass(frozen=True)
class Fatal:
    """A failure that a restart would not fix."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The training is done; `summary` is the trainer's."""

    summary: "Summary"


Event = Started | Measured | Panel | Warned | Waiting | SampleSkipped | WorkersFailed | Stopped | Fatal | Finished


class EventQueue:
    """A Ray actor that receives the workers' events and passes them to the driver; it outlives the workers.

    Metrics are written to the run's journal before `put` returns, so none is lost if the driver is killed.

    Attributes:
        journal: file in the run's folder to which metrics are appended.
        events: events that the driver has not fetched yet, oldest first.
        over: whether the training shall end; see `is_over`.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.events: list[Event] = []
        self.over = False

    def put(self, event: Event) -> None:
        """Add one event; metrics are written to the journal first."""
        self.over = self.over or isinstance(event, Fatal)
        if isinstance(event, Measured):
            event = replace(event, stamp=write_down(self.journal, event.kind, event.step, event.values))
        self.events.append(event)

    def drain(self) -> list[Event]:
        """Return all events since the last call, oldest first."""
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        """Record that the job is being stopped, for `is_over`."""
        self.over = True

    def is_over(self) -> bool:
        """Return whether the job is being stopped, or a worker had a failure that a restart would not fix."""
        return self.over
