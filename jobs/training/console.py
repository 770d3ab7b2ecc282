"""What a training tells, passed on: to the terminal, to the tracker, and to the run's list of bad samples."""

from typing import Any

from deepskip.config import Config
from deepskip.jobs import journal, report, runs
from deepskip.jobs.training.events import Event, Measured, Panel, SampleSkipped, Warned


class Console:
    """Passes on the events of a training, in whatever process they come; tracker: None where there is no MLflow."""

    def __init__(self, config: Config, run: runs.Run, tracker: Any) -> None:
        self.steps, self.tracker = config.optim.steps, tracker
        self.bad_samples = journal.BadSamples(run.folder)
        self.training: dict[str, Any] = {}
        self.disagreed = False

    def take(self, event: Event) -> None:
        """Pass on one event."""
        match event:
            case Measured(kind, step, values, stamp):
                if kind == "train":
                    self.training = values
                    print(report.progress_line(step, self.steps, values), flush=True)
                elif not self.disagreed and (text := report.disagreement(step, self.training, values)):
                    self.disagreed = True
                    print(f"warning: {text}", flush=True)
                if self.tracker:
                    self.tracker.take(kind, step, values, stamp)
            case Panel(step, images):
                if self.tracker:
                    self.tracker.take("panel", step, {"images": images}, 0)
            case Warned(text):
                print(f"warning: {text}", flush=True)
            case SampleSkipped(about):
                note_skipped(self.bad_samples, about)

    def finish(self) -> int:
        """Say how many samples were skipped, if any, and return it."""
        # other ranks of torchrun's have written to it too
        count = len(journal.BadSamples(self.bad_samples.path.parent))
        if count:
            if self.tracker:
                self.tracker.take_file(self.bad_samples.path)
            print(f"warning: {count} samples were skipped; {self.bad_samples.path} lists them", flush=True)
        return count


def note_skipped(bad_samples: journal.BadSamples, about: dict[str, Any]) -> None:
    """Write down, and say, that a sample is left out, the first time that it is."""
    if bad_samples.add(about):
        print(f"warning: skipped sample {about['key']} in {about['shard']}: {about['reason']}", flush=True)
