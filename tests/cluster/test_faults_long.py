"""Test each fault alone over real Ray nodes: `make test-faults`; MEASURE=FILE writes a table of recovery times."""

import os
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.faults import FAULTS, WORKER, Fault, recover
from tests.cluster.nodes import Nodes, until
from tests.cluster.training import Training, check

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


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
    assert training.result() == 0, training.said()
    check(training, unbroken, relative=0.0 if fault.workers == 2 else 1e-4)
    assert fault.repeats or not training.repeated()
    if measured := os.environ.get("MEASURE"):
        with Path(measured).open("a") as file:
            file.write(f"| {fault.name} | {fault.workers} | {', '.join(f'{s:.1f}' for s in seconds)} |\n")


def answers() -> bool:
    """Return whether the tracking server answers."""
    with suppress(OSError), urllib.request.urlopen("http://127.0.0.1:5055/health", timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def test_the_tracking_server_goes_down_and_comes_back(
    start: Callable[..., Training], unbroken: Training, nodes: Nodes, home: Path
) -> None:
    store = f"sqlite:///{home / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--artifacts-destination", str(home / "artifacts"), "--host", "127.0.0.1", "--port", "5055"]
    variables = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5055"}
    server = nodes.run(command, home / "server.log")
    until(lambda: nodes.in_network(answers), 60, "the tracking server")
    try:
        training = start("tracked", pace=0.5, variables=variables)
        training.wait_for(8)
        server.kill()
        server.wait()
        # Its remaining processes hold the port.
        for process in nodes.processes(nodes.nodes[0]):
            if "mlflow" in " ".join(process.cmdline()) and "deepskip.jobs.train" not in " ".join(process.cmdline()):
                process.kill()
        training.wait_for(30)
        server = nodes.run(command, home / "server.log")
        assert training.result() == 0, training.said()
        check(training, unbroken, uri=store)
    finally:
        server.kill()
