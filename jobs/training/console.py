"""Report a training's events on the terminal, to the MLflow tracker, and in the run's list of bad samples."""

from typing import TYPE_CHECKING

from deepskip.config import Config
from deepskip.jobs import journal, report, runs
from deepskip.jobs.training.events import Event, Measured, Panel, SampleSkipped, Waiting, Warned

if TYPE_CHECKING:
    # It imports MLflow, which need not be installed.
    from deepskip.jobs.tracking import Tracker


class Console:
    """Reports the events of a training, on Ray and in one process alike.

    Attributes:
        steps: number of optimizer steps of the whole training; None if it has no end.
        tracker: sends metrics and images to MLflow; None without MLflow.
        bad_samples: the run's list of skipped samples.
        training: the newest training metrics.
        stream: the newest metrics of the stream that is followed; names begin with "stream/".
        disagreed: whether `report.disagreement` of training and validation metrics was printed; it is printed once.
    """

    def __init__(self, config: Config, run: runs.Run, tracker: "Tracker | None") -> None:
        self.steps, self.tracker = config.optim.steps, tracker
        self.bad_samples = journal.BadSamples(run.folder)
        self.training: dict[str, float] = {}
        self.stream: dict[str, float] = {}
        self.disagreed = False

    def take(self, event: Event) -> None:
        """Print one event, or send it to the tracker, or both."""
        match event:
            case Measured(kind, step, values, stamp):
                if kind == "train":
                    self.training = values
                    print(report.progress_line(step, self.steps, values | self.stream), flush=True)
                elif kind in ("stream", "generation"):
                    self.stream |= {f"stream/{name}": value for name, value in values.items()}
                elif not self.disagreed and (text := report.disagreement(step, self.training, values)):
                    self.disagreed = True
                    print(f"warning: {text}", flush=True)
                if self.tracker:
                    self.tracker.take(kind, step, values, stamp)
            case Panel(step, images):
                if self.tracker:
                    self.tracker.take("panel", step, {"images": images}, 0)
            case Waiting(step):
                print(f"step {step}  waiting for new data", flush=True)
            case Warned(text):
                print(f"warning: {text}", flush=True)
            case SampleSkipped(about):
                note_skipped(self.bad_samples, about)

    def finish(self) -> int:
        """Return the number of skipped samples; if there are any, print a warning and send their list to the tracker."""
        # Under torchrun other ranks write to the file too, so it is read again.
        count = len(journal.BadSamples(self.bad_samples.path.parent))
        if count:
            if self.tracker:
                self.tracker.take_file(self.bad_samples.path)
            print(f"warning: {count} samples were skipped; {self.bad_samples.path} lists them", flush=True)
        return count


def note_skipped(bad_samples: journal.BadSamples, about: journal.SkippedSample) -> None:
    """Add a skipped sample to the run's list, and print a warning; each sample is listed and printed once.

    Args:
        bad_samples: the run's list.
        about: which sample, and why.
    """
    if bad_samples.add(about):
        print(f"warning: skipped sample {about['key']} in {about['shard']}: {about['reason']}", flush=True)
