"""python -m deepskip.cluster.preempt: this machine goes away soon. Tells Ray, and gives its training workers time to stop.

What a cloud or Kubernetes calls before it takes a machine back. Ray drains the node: nothing new is started on it, and
trainings with workers on it write a checkpoint. Where Ray cannot be told, the workers are asked by SIGTERM.
Only the cluster whose token this process was given is meant, whatever else runs on the machine.
"""

import argparse
import os
import subprocess
import sys
import time

import psutil

# what ray names the process of a worker of ray train
WORKER = "ray::RayTrainWorker"
# every process of a cluster has its token in its environment, or the path to it
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
DRAIN = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
DRAIN_SECONDS = 15.0


def training_workers() -> list[psutil.Process]:
    """Finds the training workers of our cluster on this machine, or in this container."""
    ours = [os.environ.get(name) for name in TOKENS]
    found = []
    for process in psutil.process_iter():
        try:
            if " ".join(process.cmdline()).startswith(WORKER):
                variables = process.environ()
                found += [process] if [variables.get(name) for name in TOKENS] == ours else []
        except psutil.Error:
            continue
    return found


def drain(seconds: float) -> bool:
    """Tells Ray that this node goes away in so many seconds; says whether Ray heard it."""
    command = [
        *DRAIN,
        "--reason-message",
        "the machine is taken back",
        "--deadline-remaining-seconds",
        str(int(seconds)),
    ]
    try:
        return subprocess.run(command, capture_output=True, timeout=DRAIN_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def preempt(seconds: float) -> tuple[int, int]:
    """Has the training workers stop and waits up to `seconds` for it; gives how many ended and how many did not."""
    deadline = time.monotonic() + seconds
    workers = training_workers()
    if not drain(seconds):
        for worker in workers:
            try:
                worker.terminate()
            except psutil.NoSuchProcess:
                continue
    ended, left = psutil.wait_procs(workers, timeout=max(0.0, deadline - time.monotonic()))
    return len(ended), len(left)


def main(argv: list[str] | None = None) -> None:
    """Says what came of it; the exit status is 0 whatever that was: the machine goes away anyhow."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.cluster.preempt", description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to wait for the workers to end")
    arguments = parser.parse_args(argv)
    ended, left = preempt(arguments.seconds)
    print(f"{ended} training workers ended, {left} did not within {arguments.seconds:g} s")


if __name__ == "__main__":
    main()
