"""Workers as Ray tasks, wherever the cluster has room; results go to a folder that every machine sees."""

import math
from typing import Any

import ray

from jobs.comparison.rows import Grid
from jobs.comparison.work import Outcome, Task, attempt
from jobs.training.allocation import own_ray


class RayTasks:
    """As many tasks at a time as the grid has workers; where there are GPUs they share them evenly."""

    def __init__(self, grid: Grid, command: str) -> None:
        self.grid, self.command = grid, command
        if not ray.is_initialized():
            ray.init(**own_ray(), log_to_driver=False)
        gpus = 0.0 if grid.device == "cpu" else ray.cluster_resources().get("GPU", 0.0)
        # a share of one GPU, or several whole ones are not given
        share = min(1.0, gpus / grid.workers)
        if 0 < share < 1:
            share = 1 / math.ceil(1 / share)
        self.attempt = ray.remote(num_cpus=1, num_gpus=share, max_retries=0)(attempt)
        self.running: dict[Any, Task] = {}

    def free(self) -> int:
        """Gives how many more tasks can be started."""
        return self.grid.workers - len(self.running)

    def start(self, task: Task) -> None:
        """Hands a task to the cluster."""
        self.running[self.attempt.remote(self.grid, task, self.command)] = task

    def finished(self, timeout: float) -> list[Outcome]:
        """Waits for tasks to end, at most so many seconds."""
        ended, _ = ray.wait(list(self.running), timeout=timeout)
        outcomes = []
        for reference in ended:
            task = self.running.pop(reference)
            try:
                outcomes.append(Outcome(task, *ray.get(reference)))
            # a machine or a process that went away
            except ray.exceptions.RayError as error:
                outcomes.append(Outcome(task, None, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
        return outcomes

    def close(self) -> None:
        """Ends all tasks, whatever they are at."""
        for reference in self.running:
            ray.cancel(reference, force=True)
        self.running.clear()
