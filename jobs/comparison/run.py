"""Runs the grid's cells on a pool of workers: measures each network first, skips what is done, keeps to the budget of time."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from jobs.comparison import grid as results
from jobs.comparison.rows import Grid, described
from jobs.comparison.work import Outcome, Task

# how long a step is measured to take, against what it takes with its validations and tests
OVERHEAD = 1.5
# seconds of a cell beside its steps
FIXED = 3.0


class Pool(Protocol):
    """Workers, wherever they are."""

    def free(self) -> int: ...

    def start(self, task: Task) -> None: ...

    def finished(self, timeout: float) -> list[Outcome]: ...

    def close(self) -> None: ...


def run(
    grid: Grid, pool: Pool, observe: Callable[[Task, dict[str, Any]], None] = lambda task, record: None
) -> dict[str, int]:
    """Runs what is not done, measurements of networks before cells; gives how many are done, failed and left.

    observe: called with each cell that ended and its record, which holds an error where it failed. A failure is a cell's,
    not the grid's end.
    """
    out = Path(grid.out)
    clock = Clock(grid)
    named = [name for name in grid.networks if grid.only is None or name in grid.only]
    # the config may have another label than when a network was measured; rows that are not run stay as they were run
    networks = {
        name: values | (described(grid.networks[name]) if name in named else {})
        for name, values in results.read_networks(out).items()
    }
    if networks:
        results.write_networks(out, networks)
    counts = {"done": 0, "failed": 0, "left": 0}
    unmeasured = [name for name in named if networks.get(name, {}).get("parameters") is None]
    every = [] if grid.profile_only else list(results.cells(grid))
    todo = [Task(cell.network, cell) for cell in every if not results.is_done(out, cell)]
    counts["done"] = len(every) - len(todo)
    try:
        for number, outcome in enumerate(ended(pool, clock, [Task(name) for name in unmeasured], "networks"), 1):
            name = outcome.task.network
            networks[name] = outcome.result or described(grid.networks[name]) | {
                "parameters": None,
                "error": outcome.error,
            }
            # in the config's order, whoever was first
            ordered = {name: networks[name] for name in (*grid.networks, *networks) if name in networks}
            results.write_networks(out, ordered)
            note(outcome, measured(networks[name]), number, len(unmeasured))
        for outcome in ended(pool, clock, todo, "cells"):
            cell = outcome.task.cell
            assert cell is not None
            if outcome.error is not None:
                results.write_error(out, cell, outcome.error)
            else:
                assert outcome.result is not None
                clock.took(outcome.task, outcome.result["seconds"])
            counts["done" if outcome.error is None else "failed"] += 1
            observe(outcome.task, outcome.result or {"error": outcome.error})
            note(outcome, scored(outcome.result), counts["done"] + counts["failed"], len(every))
    finally:
        pool.close()
    counts["left"] = len(every) - counts["done"] - counts["failed"]
    return counts


def ended(pool: Pool, clock: "Clock", tasks: list[Task], what: str) -> Any:
    """Keeps the workers busy with tasks, in their order, and yields each one's outcome; ends with the budget."""
    waiting, running = list(tasks), 0
    with tqdm(total=len(tasks), desc=what, unit="", disable=None) as line:
        while (waiting or running) and clock.left() > 0:
            while waiting and pool.free():
                task = next((task for task in waiting if clock.fits(task)), None)
                if task is None:
                    waiting = []
                    break
                waiting.remove(task)
                pool.start(task)
                running += 1
            if not running:
                break
            for outcome in pool.finished(min(1.0, max(0.0, clock.left()))):
                running -= 1
                line.update()
                yield outcome


class Clock:
    """The budget of time, and how long cells take: as those of the same network took, else as its steps were measured."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.started = grid, time.monotonic()
        self.longest: dict[str, float] = {}
        # how much longer cells take than their steps alone: on one GPU workers take turns
        self.slower = [OVERHEAD * (grid.workers if grid.device != "cpu" else 1) / 2]

    def left(self) -> float:
        """Gives the seconds that are left."""
        budget = self.grid.budget_seconds
        return float("inf") if budget is None else budget - (time.monotonic() - self.started)

    def took(self, task: Task, seconds: float) -> None:
        """Takes note of a cell's time."""
        self.longest[task.network] = max(seconds, self.longest.get(task.network, 0.0))
        if alone := self.alone(task):
            self.slower.append(seconds / alone)

    def fits(self, task: Task) -> bool:
        """Says whether a task would end within the budget."""
        if task.cell is None or self.grid.budget_seconds is None:
            return True
        guess = self.longest.get(task.network) or statistics.median_high(self.slower) * self.alone(task)
        return guess < self.left()

    def alone(self, task: Task) -> float:
        """Gives the seconds of a cell's steps on a machine of its own; 0 where they were not measured."""
        assert task.cell is not None
        step = results.read_networks(Path(self.grid.out)).get(task.network, {}).get("seconds_per_step")
        return FIXED + step * task.cell.steps if step else 0.0


def measured(entry: dict[str, Any]) -> str:
    """Puts a measurement of a network into a line."""
    if entry.get("error"):
        return ""
    step, image = 1e3 * entry["seconds_per_step"], 1e3 * entry["seconds_per_image"]
    memory = f", {entry['peak_memory_bytes'] / 2**30:.2f} GiB" if entry["peak_memory_bytes"] else ""
    graph = ", CUDA graph" if entry["cuda_graph"] else ""
    size = f"{entry['parameters'] / 1e6:.2f} M, {entry['gflops']:.1f} GFLOP"
    return f"{size}, {step:.2f} ms a step, {image:.2f} an image{memory}{graph}"


def scored(record: dict[str, Any] | None) -> str:
    """Puts a cell's record into a line."""
    return f"IoU {record['test']['iou'] or 0:.3f}, {record['seconds']:.1f} s" if record else ""


def note(outcome: Outcome, text: str, number: int, total: int) -> None:
    """Prints what became of a task, above the progress line where there is one."""
    tqdm.write(f"{number}/{total} {outcome.task}: {f'error: {outcome.error}' if outcome.error else text}")
    sys.stdout.flush()
