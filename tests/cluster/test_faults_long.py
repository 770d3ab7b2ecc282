"""Each fault by itself, over real Ray nodes: `make test-faults`; MEASURE=FILE writes the recovery times down as a table."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.faults import FAULTS, WORKER, Fault, recover
from tests.cluster.training import Training, check

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_what_comes_out_is_the_same_training(
    fault: Fault, start: Callable[..., Training], unbroken: Training, request: pytest.FixtureRequest
) -> None:
    training = start(f"fault-{FAULTS.index(fault)}", workers=fault.workers, pace=0.5)
    training.wait_for(12)
    seconds = [recover(training, fault)]
    if fault.promised == WORKER:
        training.wait_for(22, seconds=60)
        seconds.append(recover(training, fault))
    assert training.result(seconds=200) == 0, training.said()
    check(training, unbroken, relative=0.0 if fault.workers == 2 else 1e-4)
    if measured := os.environ.get("MEASURE"):
        with Path(measured).open("a") as file:
            file.write(f"| {fault.name} | {fault.workers} | {', '.join(f'{s:.1f}' for s in seconds)} |\n")
