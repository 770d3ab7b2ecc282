"""Workers as plain processes of this machine, which share its GPU; one that dies, or fails on a GPU, is replaced."""

import multiprocessing
import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from jobs.comparison.rows import Grid
from jobs.comparison.work import Outcome, Task, attempt, device_of


@dataclass
class Worker:
    """A process and this side of its pipe; the task that it is at."""

    process: BaseProcess
    pipe: Connection
    task: Task | None = None


class Processes:
    """As many workers as asked for, started with their first task."""

    def __init__(self, grid: Grid, command: str) -> None:
        self.grid, self.command = grid, command
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[Worker] = []

    def free(self) -> int:
        """Gives how many more tasks can be started."""
        return self.grid.workers - sum(worker.task is not None for worker in self.workers)

    def start(self, task: Task) -> None:
        """Gives a task to an idle worker."""
        worker = next((worker for worker in self.workers if worker.task is None), None)
        if worker is None:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=work, args=(theirs, self.grid, self.command), daemon=True)
            process.start()
            theirs.close()
            self.workers.append(worker := Worker(process, ours))
        worker.task = task
        worker.pipe.send(task)

    def finished(self, timeout: float) -> list[Outcome]:
        """Waits for tasks to end, at most so many seconds."""
        busy = {worker.pipe: worker for worker in self.workers if worker.task is not None}
        outcomes = []
        for pipe in wait(list(busy), timeout):
            worker = busy[pipe]  # type: ignore[index]
            assert worker.task is not None
            try:
                result, error, stays = worker.pipe.recv()
            except (EOFError, ConnectionError):
                worker.process.join()
                result, error, stays = None, f"its process died, exit status {worker.process.exitcode}", False
            outcomes.append(Outcome(worker.task, result, error))
            worker.task = None
            if not stays:
                worker.pipe.close()
                self.workers.remove(worker)
        return outcomes

    def close(self) -> None:
        """Ends all workers, whatever they are at."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
            worker.pipe.close()
        self.workers.clear()


def work(pipe: Connection, grid: Grid, command: str) -> None:
    """Does tasks as they come, until the pipe is closed."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // grid.workers))
    stays = True
    while stays:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionError, KeyboardInterrupt):
            return
        try:
            result, error = attempt(grid, task, command)
        except KeyboardInterrupt:
            return
        # a CUDA error is a process's last word
        stays = error is None or device_of(grid.device).type != "cuda"
        try:
            pipe.send((result, error, stays))
        except (BrokenPipeError, ConnectionError):
            return


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, however that ended, and not with its cell's end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    # files are written whole or not at all
    os._exit(1)
