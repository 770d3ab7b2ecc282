"""A training over real Ray nodes has the same result while workers, machines and networks fail."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.cluster.nodes import ROOT, Nodes, until
from tests.cluster.training import Training, check

STEPS = 60
# Another number of workers adds up sums in another order.
RELATIVE = 1e-4


def test_nodes_end_with_whoever_started_them(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from tests.cluster.nodes import Nodes; "
    script += (
        "held = Nodes(Path(sys.argv[1]))._hold(['--net', '--pid'], 'sleep 1000', {}); print(held.pid, flush=True); "
    )
    script += "time.sleep(1000)"
    starter = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert starter.stdout is not None
    holder = psutil.Process(int(starter.stdout.readline()))
    until(holder.children, 20, "the process in the node")
    family = [holder, *holder.children(recursive=True)]
    starter.kill()
    starter.wait()
    assert not psutil.wait_procs(family, timeout=20)[1]


def test_workers_are_killed(start: Callable[..., Training], unbroken: Training) -> None:
    training = start("workers")
    training.wait_for(8)
    killed = training.kill_rank(1)
    training.wait_for(22, after=killed)
    # Rank 0, which writes the checkpoints and talks to the driver.
    killed = training.kill_at_rename()
    training.wait_for(STEPS, after=killed)
    assert training.result() == 0, training.said()
    assert training.world_sizes() == [2, 2, 2]
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
