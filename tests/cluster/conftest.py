"""Fixtures: a cluster of test nodes, and an unbroken training, for a module: the nodes would slow the tests of others."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import Nodes
from tests.cluster.training import BATCH, Training, pack

STEPS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    pack(folder / "data")
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
    assert f"data.lanes is {BATCH}, for 2 machines" in training.said()
    return training


@pytest.fixture
def start(nodes: Nodes, home: Path) -> Iterator[Callable[..., Training]]:
    """Yield a function that starts trainings; afterwards, restore the cluster to three nodes."""
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
    nodes.restore()
