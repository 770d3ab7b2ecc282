"""What befalls a training: each fault does its harm and gives the moment it did; times are those of time.time()."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.training import Training

CUT_SECONDS = 20.0


@dataclass(frozen=True)
class Fault:
    """A fault: what it is, what it does, and on how many workers the training has to be."""

    name: str
    do: Callable[[Training], float]
    workers: int | tuple[int, int] = 2
    # seconds within which a step is done again, as far as one is promised
    promised: float | None = None
    # whether steps may be done again
    repeats: bool = True


def kill_other_rank(training: Training) -> float:
    """SIGKILL to the last rank."""
    return training.kill_rank(training.world_sizes()[-1] - 1)


def kill_rank_0(training: Training) -> float:
    """SIGKILL to the rank that writes checkpoints."""
    return training.kill_rank(0)


def kill_at_rename(training: Training) -> float:
    """SIGKILL when a checkpoint is written and not yet renamed."""
    return training.kill_at_rename()


def hang(training: Training) -> float:
    """The last rank stops for good, without dying."""
    _, process = training.worker(training.world_sizes()[-1] - 1)
    moment = time.time()
    process.suspend()
    return moment


def last_machine(training: Training) -> int:
    """Return the number of the machine of the last rank."""
    node, _ = training.worker(training.world_sizes()[-1] - 1)
    return node.number


def lose_machine(training: Training) -> float:
    """All processes of the machine of the last rank end, and it is gone."""
    number = last_machine(training)
    moment = time.time()
    training.nodes.kill(number)
    return moment


def take_machine_back(training: Training) -> float:
    """The machine of the last rank is about to go, Ray and the training hear of it, and it goes."""
    number = last_machine(training)
    moment = time.time()
    command = [sys.executable, "-m", "deepskip.cluster.preempt", "--seconds", "30"]
    assert training.nodes.run(command, training.output, number=number).wait(timeout=60) == 0
    training.nodes.kill(number)
    return moment


def replace_machine(training: Training) -> float:
    """A machine is lost, and an empty one comes in its place at once."""
    number = last_machine(training)
    moment = lose_machine(training)
    training.nodes.start(number)
    return moment


def cut_network(training: Training) -> float:
    """A machine's network is away for CUT_SECONDS."""
    number = last_machine(training)
    moment = time.time()
    training.nodes.cut(number)
    time.sleep(CUT_SECONDS)
    training.nodes.mend(number)
    return moment


def add_machine(training: Training) -> float:
    """The third machine comes."""
    missing = next(number for number in (1, 2) if number not in training.nodes.nodes)
    moment = time.time()
    training.nodes.start(missing)
    return moment


def lose_head(training: Training) -> float:
    """The head is lost, the job with it; a new head comes and the job is submitted again."""
    assert training.process is not None
    moment = time.time()
    training.nodes.kill(0)
    training.process.wait(timeout=30)
    training.nodes.start(0)
    training.nodes.wait(len(training.nodes.nodes))
    training.submit()
    return moment


def kill_driver(training: Training) -> float:
    """SIGKILL to the job's driver; the job is submitted again."""
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
    """Does the harm and waits for the next step of other workers than before; gives the time between, in seconds."""
    group = training.group()
    moment = fault.do(training)
    return training.wait_for(after=moment, other_than=group, seconds=seconds) - moment
