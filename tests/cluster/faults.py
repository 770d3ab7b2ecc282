"""Faults of a training: each function causes one and returns its moment, as time.time() counts."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.training import Training

CUT_SECONDS = 20.0


@dataclass(frozen=True)
class Fault:
    """A fault: its name, the function that causes it, and the number of workers of the training."""

    name: str
    do: Callable[[Training], float]
    workers: int | tuple[int, int] = 2
    # Seconds until a step is done again, if a bound is promised.
    promised: float | None = None
    # Whether steps may be done twice.
    repeats: bool = True


def kill_other_rank(training: Training) -> float:
    """Send SIGKILL to the last rank."""
    return training.kill_rank(training.world_sizes()[-1] - 1)


def kill_rank_0(training: Training) -> float:
    """Send SIGKILL to the rank that writes checkpoints."""
    return training.kill_rank(0)


def kill_at_rename(training: Training) -> float:
    """Send SIGKILL when a checkpoint is written but not yet renamed."""
    return training.kill_at_rename()


def hang(training: Training) -> float:
    """Suspend the last rank for good, without ending it."""
    _, process = training.worker(training.world_sizes()[-1] - 1)
    moment = time.time()
    process.suspend()
    return moment


def last_machine(training: Training) -> int:
    """Return the number of the machine of the last rank."""
    node, _ = training.worker(training.world_sizes()[-1] - 1)
    return node.number


def lose_machine(training: Training) -> float:
    """Kill the last rank's machine with all its processes."""
    number = last_machine(training)
    moment = time.time()
    training.nodes.kill(number)
    return moment


def take_machine_back(training: Training) -> float:
    """Announce to Ray and the training that the last rank's machine will be lost, then kill it."""
    number = last_machine(training)
    moment = time.time()
    command = [sys.executable, "-m", "deepskip.cluster.preempt", "--seconds", "30"]
    assert training.nodes.run(command, training.output, number=number).wait(timeout=60) == 0
    training.nodes.kill(number)
    return moment


def replace_machine(training: Training) -> float:
    """Kill a machine, and start an empty one in its place at once."""
    number = last_machine(training)
    moment = lose_machine(training)
    training.nodes.start(number)
    return moment


def cut_network(training: Training) -> float:
    """Cut a machine's network for CUT_SECONDS."""
    number = last_machine(training)
    moment = time.time()
    training.nodes.cut(number)
    time.sleep(CUT_SECONDS)
    training.nodes.mend(number)
    return moment


def add_machine(training: Training) -> float:
    """Start the third machine."""
    missing = next(number for number in (1, 2) if number not in training.nodes.nodes)
    moment = time.time()
    training.nodes.start(missing)
    return moment


def lose_head(training: Training) -> float:
    """Kill the head together with the job, start a new head and submit the job again."""
    assert training.process is not None
    moment = time.time()
    training.nodes.kill(0)
    training.process.wait(timeout=30)
    training.nodes.start(0)
    training.nodes.wait(len(training.nodes.nodes))
    training.submit()
    return moment


def kill_driver(training: Training) -> float:
    """Send SIGKILL to the job's driver, then submit the job again."""
    assert training.process is not None
    moment = time.time()
    for process in training.drivers():
        process.kill()
    training.process.wait(timeout=30)
    training.submit()
    return moment


WORKER, MACHINE = 15.0, 20.0
FAULTS = [
    Fault("worker killed", kill_other_rank, promised=WORKER),
    Fault("rank 0 killed", kill_rank_0, promised=WORKER),
    Fault("rank 0 killed before renaming a checkpoint", kill_at_rename, promised=WORKER),
    Fault("worker hangs, collective_timeout 20 s", hang),
    Fault("machine lost, others continue", lose_machine, (1, 2), MACHINE),
    Fault("machine taken back, others continue", take_machine_back, (1, 2), repeats=False),
    Fault("machine lost and replaced", replace_machine),
    Fault("network cut for 20 s, others continue", cut_network, (1, 2), MACHINE),
    Fault("network cut for 20 s, others wait", cut_network),
    Fault("driver killed, job resubmitted", kill_driver, (1, 2)),
    Fault("head lost and replaced, job resubmitted", lose_head),
]


def recover(training: Training, fault: Fault, seconds: float = 150) -> float:
    """Cause a fault, wait for the next step of another group of workers, and return the seconds between."""
    group = training.group()
    moment = fault.do(training)
    return training.wait_for(after=moment, other_than=group, seconds=seconds) - moment
