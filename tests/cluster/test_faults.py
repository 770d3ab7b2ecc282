"""Trainings over real Ray nodes, while workers, machines and networks fail: what comes out is the same training."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_shards.__main__ import pack_coins
from tests.cluster.nodes import Nodes
from tests.cluster.training import SAMPLES, Training, check

STEPS = 60
# with other numbers of workers sums are made in another order
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    pack_coins(folder / "data", {"train": SAMPLES, "val": 2})
    return folder


@pytest.fixture(scope="module")
def nodes(home: Path) -> Iterator[Nodes]:
    cluster = Nodes(home / "nodes")
    try:
        for number in range(3):
            cluster.start(number)
        cluster.wait(3)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def unbroken(nodes: Nodes, home: Path) -> Training:
    training = Training(nodes, home, "unbroken", STEPS, pace=0.0)
    training.submit()
    assert training.result() == 0, training.said()
    assert training.world_sizes() == [2]
    return training


@pytest.fixture
def start(nodes: Nodes, home: Path) -> Iterator[Callable[..., Training]]:
    """Starts trainings; whatever a test did to the cluster, it has three nodes again afterwards."""
    started: list[Training] = []

    def begin(name: str, **options: object) -> Training:
        training = Training(nodes, home, name, STEPS, **options)
        started.append(training)
        training.submit()
        return training

    yield begin
    for training in started:
        if training.process is not None and training.process.poll() is None:
            training.process.kill()
            training.process.wait()
    for number in range(3):
        if number not in nodes.nodes:
            nodes.start(number)
    for number in [n for n in nodes.nodes if n > 2]:
        nodes.kill(number)
    nodes.wait(3)


def test_workers_are_killed(start: Callable[..., Training], unbroken: Training) -> None:
    training = start("workers")
    training.wait_for(8)
    # rank 0 is the one that writes checkpoints and talks to the driver
    for rank, step in ((1, 22), (0, 36)):
        killed = training.kill_rank(rank)
        training.wait_for(step, after=killed)
    killed = training.kill_at_rename()
    training.wait_for(STEPS, after=killed)
    assert training.result() == 0, training.said()
    assert training.world_sizes() == [2, 2, 2, 2]
    check(training, unbroken)


def test_a_machine_is_lost_and_another_comes(start: Callable[..., Training], unbroken: Training, nodes: Nodes) -> None:
    training = start("elastic", workers=(1, 2), pace=0.3)
    training.wait_for(8, world_size=2)
    lost = time.time()
    nodes.kill(2)
    training.wait_for(10, after=lost, world_size=1)
    nodes.start(2)
    training.wait_for(15, world_size=2, after=time.time())
    assert training.result() == 0, training.said()
    assert training.world_sizes() == [2, 1, 2]
    check(training, unbroken, RELATIVE)
