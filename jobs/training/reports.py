"""Reports of validations to Ray Train, by which Ray's Result and the logs in its dashboard have the metrics.

Ray's report waits for the other ranks, and for the controller to have fetched the report before. So it is called on a
thread of its own, on every rank after every validation, and no step waits for it. Ray keeps the metrics of reports with a
checkpoint alone. DeepSkip's checkpoints are not Ray's, so a report has a pointer to them, a file of a few bytes.
"""

import json
import math
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from deepskip.jobs.journal import PREFIXES
from deepskip.jobs.training.events import Event, Measured

# Folder in the run's folder where Ray keeps the reports of the newest driver, and the number of reports that it keeps.
FOLDER = "ray"
KEPT = 100
POINTER = "deepskip.json"
# Longest wait at the end of a training for reports that Ray has not fetched, in seconds.
LAST_SECONDS = 10.0


class ValidationReports:
    """Reports validations to Ray Train, in their order, on a thread.

    Attributes:
        run: the run's folder, to which the reports point; None on ranks other than 0, whose metrics Ray does not keep.
        warn: takes the first error, after which the training continues.
        metrics: newest metrics that are finite, by MLflow's names.
        waiting: steps with their metrics that are not reported yet; None ends the thread.
        thread: the thread, which ends with the process.
    """

    def __init__(self, run: Path | None, warn: Callable[[str], None]) -> None:
        self.run, self.warn = run, warn
        self.metrics: dict[str, float] = {}
        self.waiting: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._report_all, daemon=True)
        self.thread.start()

    def take(self, event: Event) -> None:
        """Keep the metrics of an event of rank 0 for the next report."""
        if isinstance(event, Measured):
            prefix = PREFIXES.get(event.kind, event.kind)
            # What is known of a stream comes in two kinds of events.
            stale = () if prefix == "stream" else (f"{prefix}/",)
            others = {name: value for name, value in self.metrics.items() if not name.startswith(stale)}
            finite = {name: value for name, value in event.values.items() if math.isfinite(value)}
            self.metrics = others | {f"{prefix}/{name}": value for name, value in finite.items()}

    def validated(self, step: int) -> None:
        """Report the newest metrics, without waiting; every rank must call this after every validation.

        Args:
            step: step after which the validation ran.
        """
        self.waiting.put((step, {"step": step, **self.metrics}))

    def close(self) -> None:
        """Wait until Ray has the reports, but no longer than LAST_SECONDS."""
        self.waiting.put(None)
        self.thread.join(LAST_SECONDS)

    def _report_all(self) -> None:
        failed = False
        while (item := self.waiting.get()) is not None:
            step, metrics = item
            try:
                report(step, metrics, self.run)
            # Ray and its storage raise errors of many types. The metrics are in the journal.
            except Exception as error:
                if self.run is not None and not failed:
                    text = " ".join(str(error).split())[:200]
                    self.warn(f"Ray did not take the metrics of step {step}: {text}; the training continues")
                failed = True


def report(step: int, metrics: dict[str, float], run: Path | None) -> None:
    """Report metrics to Ray Train; it returns when all ranks have called it.

    Args:
        step: step of the metrics.
        metrics: metrics by name.
        run: the run's folder on rank 0, None on others.
    """
    import ray.train

    if run is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="deepskip-report-") as folder:
        pointer = {"step": step, "checkpoints": str(run / "checkpoints")}
        (Path(folder) / POINTER).write_text(json.dumps(pointer))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
