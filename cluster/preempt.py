"""python -m cluster.preempt: this machine goes away soon. Asks the training workers on it to stop, and gives them time to.

What a cloud or Kubernetes calls before it takes a machine back. A worker that is asked by SIGTERM writes a checkpoint first.
Every training of this user on the machine is asked: it is for machines and containers that one cluster has to itself.
"""

import argparse
import os

import psutil

# what ray names the process of a worker of ray train
WORKER = "ray::RayTrainWorker"


def training_workers() -> list[psutil.Process]:
    """Finds this user's training workers on this machine, or in this container."""
    found = []
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline())
            if title.startswith(WORKER) and process.uids().real == os.getuid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def preempt(seconds: float) -> tuple[int, int]:
    """Sends SIGTERM to the training workers and waits up to `seconds`; gives how many ended and how many did not."""
    workers = training_workers()
    for worker in workers:
        try:
            worker.terminate()
        except psutil.NoSuchProcess:
            continue
    ended, left = psutil.wait_procs(workers, timeout=seconds)
    return len(ended), len(left)


def main(argv: list[str] | None = None) -> None:
    """Says what came of it; the exit status is 0 whatever that was: the machine goes away anyhow."""
    parser = argparse.ArgumentParser(prog="python -m cluster.preempt", description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to wait for the workers to end")
    arguments = parser.parse_args(argv)
    ended, left = preempt(arguments.seconds)
    print(f"{ended} training workers ended, {left} did not within {arguments.seconds:g} s")


if __name__ == "__main__":
    main()
