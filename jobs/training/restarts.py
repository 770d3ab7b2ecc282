"""How failures of a training's workers are handled: how they are reported, and when the training is given up."""

import time
from typing import Any

import ray.exceptions
from ray.train import UserCallback

from deepskip.config import ClusterConfig
from deepskip.jobs.training.allocation import allocation, look_at_machines
from deepskip.jobs.training.events import WorkersFailed

# A group that has waited for data this long before it failed has not failed at once, seconds.
IDLE_SECONDS = 3600.0


class FailureReports(UserCallback):
    """Reports to the driver, through the event queue, which workers failed and why; runs in Ray's controller."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Write one event for the errors of all ranks to the queue.

        Args:
            run_context: Ray's description of the run; unused.
            worker_exceptions: the errors by rank.
        """
        reasons: dict[str, list[str]] = {}
        for rank, error in sorted(worker_exceptions.items()):
            reasons.setdefault(why(error), []).append(str(rank))
        text = "; ".join(f"rank {', '.join(ranks)} {reason}" for reason, ranks in reasons.items())
        self.queue.put.remote(WorkersFailed(text))
        # Next the controller decides with how many workers to continue.
        look_at_machines()


def why(error: Exception) -> str:
    """Return a short description of a worker's failure."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayActorError):
        return "died, or its machine was lost"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class RestartPolicy:
    """Decides when a training is given up: when it keeps failing at one place, or when no workers start.

    Attributes:
        requested: the settings of the cluster, with the allowed failures and the time to recover.
        starts: number of times that a group of workers began to train.
        start_step: step at which the newest group began.
        newest_step: newest step that was done.
        failures: number of failures in a row, without a new checkpoint in between.
        last_failure: description of the last failure.
        started_at: time (s, monotonic) at which the newest group began.
        waiting_since: time (s, monotonic) since which no group trains; None while one trains.
    """

    def __init__(self, requested: ClusterConfig) -> None:
        self.requested = requested
        self.starts = self.failures = self.start_step = self.newest_step = 0
        self.last_failure = ""
        self.started_at = time.monotonic()
        self.waiting_since: float | None = time.monotonic()

    def started(self, step: int) -> None:
        """Record that a group of workers starts, or resumes, after `step`; an advance resets the count of failures."""
        self.starts += 1
        if step > self.start_step:
            self.failures = 0
        self.start_step = self.newest_step = step
        self.started_at, self.waiting_since = time.monotonic(), None

    def came_to(self, step: int) -> None:
        """Record a step that was done."""
        self.newest_step = max(self.newest_step, step)

    def failed(self, text: str, saved: int | None) -> None:
        """Record that the group failed; after a new checkpoint the count of failures begins again at 1.

        Args:
            text: description of the failure.
            saved: step of the newest checkpoint; None if there is none, or it is not known. That a step was done does not
                tell: what fails in the validation before each checkpoint would be tried again for ever.
        """
        further = saved is not None and saved > self.start_step
        # A training that follows a stream may wait for days. Machines that it loses on one day do not count on the next.
        waited = self.newest_step == self.start_step and time.monotonic() - self.started_at > IDLE_SECONDS
        self.failures = 1 if further or waited else self.failures + 1
        self.last_failure = text
        self.waiting_since = time.monotonic()

    def reason_to_give_up(self) -> str | None:
        """Return why the training must be given up, or None while it need not."""
        if 0 <= self.requested.max_failures < self.failures:
            return f"the training failed {self.failures} times after step {self.start_step}: {self.last_failure}"
        if self.waiting_since is not None and time.monotonic() - self.waiting_since > self.requested.recovery_seconds:
            found = allocation(self.requested)
            return (
                f"no workers started for {self.requested.recovery_seconds:g} s (cluster.recovery_seconds): the training needs "
                f"{found.fewest or 'some'}, the cluster has {found.description}. Run the same command again to resume."
            )
        return None
