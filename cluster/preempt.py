"""Announce to Ray that this machine will be preempted soon, and wait for its training workers to stop.

A cloud or Kubernetes runs this before it reclaims a machine. Ray drains the node: nothing new is started on it, and trainings
with workers on it write a checkpoint. If Ray does not answer, the workers get SIGTERM. Only the cluster whose token this
process has is affected.
"""

import argparse
import os
import subprocess
import sys
import time

import psutil

# Ray Train's name for the processes of its workers.
WORKER = "ray::RayTrainWorker"
# Each process of a cluster has its token, or the path to it, in one of these variables.
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
DRAIN = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
DRAIN_SECONDS = 15.0


def training_workers() -> list[psutil.Process]:
    """Return the training workers on this machine, or in this container, that have this process's token."""
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
    """Drain this node, which will be gone in `seconds`, and return whether Ray accepted it."""
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
    """Stop the training workers on this machine.

    Args:
        seconds: Longest time to wait for them.

    Returns:
        The number of workers that ended, and of those that did not.
    """
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
    """Stop the training workers and print the result; the exit status is always 0, because the machine will be gone.

    Args:
        argv: Arguments; those of the command line by default.
    """
    parser = argparse.ArgumentParser(prog="python -m deepskip.cluster.preempt", description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to wait for the workers to end")
    arguments = parser.parse_args(argv)
    ended, left = preempt(arguments.seconds)
    print(f"{ended} training workers ended, {left} did not within {arguments.seconds:g} s")


if __name__ == "__main__":
    main()
