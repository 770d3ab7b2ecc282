"""What becomes of a training whose workers fail: how it is told, and when it is given up."""

import time
from typing import Any

import ray.exceptions
from ray.train import UserCallback

from deepskip.config import ClusterConfig
from deepskip.jobs.training.allocation import allocation, look_at_machines
from deepskip.jobs.training.events import WorkersFailed


class FailureReports(UserCallback):
    """Tell the driver, through the event queue, that workers failed and how; runs in Ray's controller."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Take the errors by rank."""
        reasons: dict[str, list[str]] = {}
        for rank, error in sorted(worker_exceptions.items()):
            reasons.setdefault(why(error), []).append(str(rank))
        text = "; ".join(f"rank {', '.join(ranks)} {reason}" for reason, ranks in reasons.items())
        self.queue.put.remote(WorkersFailed(text))
        # next the controller decides on how many workers to go on with
        look_at_machines()


def why(error: Exception) -> str:
    """Put a worker's failure into a few words."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayActorError):
        return "died, or its machine was lost"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class RestartPolicy:
    """Decide when a training is given up: it fails again and again at one place, or workers do not start.

    starts: how often a group of workers began to train.
    """

    def __init__(self, requested: ClusterConfig, checkpoint_every: int) -> None:
        self.requested, self.checkpoint_every = requested, checkpoint_every
        self.starts = self.failures = self.start_step = self.newest_step = 0
        self.last_failure = ""
        self.waiting_since: float | None = time.monotonic()

    def started(self, step: int) -> None:
        """Note that a group of workers goes on after `step`."""
        self.starts += 1
        if step > self.start_step:
            self.failures = 0
        self.start_step = self.newest_step = step
        self.waiting_since = None

    def came_to(self, step: int) -> None:
        """Note a step that was done."""
        self.newest_step = max(self.newest_step, step)

    def failed(self, text: str) -> None:
        """Note that the group failed; a failure past a new checkpoint is the first in its row."""
        further = self.newest_step // self.checkpoint_every > self.start_step // self.checkpoint_every
        self.failures = 1 if further else self.failures + 1
        self.last_failure = text
        self.waiting_since = time.monotonic()

    def reason_to_give_up(self) -> str | None:
        """Return why the training must end, or None."""
        if 0 <= self.requested.max_failures < self.failures:
            return f"the training failed {self.failures} times after step {self.start_step}: {self.last_failure}"
        if self.waiting_since is not None and time.monotonic() - self.waiting_since > self.requested.recovery_seconds:
            found = allocation(self.requested)
            return (
                f"no workers started for {self.requested.recovery_seconds:g} s (cluster.recovery_seconds): the training needs "
                f"{found.fewest or 'some'}, the cluster has {found.description}. The same command goes on."
            )
        return None
