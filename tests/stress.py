"""Run short trainings on a slow machine with jumping clocks: `python -m tests.stress`; print JSON of how many succeed.

A busy process keeps each core at normal priority. The tracking server takes 0 to 12 s for a request. time.time jumps by
an hour, forth and back, in all processes of the trainings except Ray's services.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepskip.cluster.local import end_with_parent
from deepskip.data_shards.commands import pack_coins
from deepskip.jobs.journal import MEASURED, read_measured
from tests.jobs.test_tracking import Server

STEPS, EVERY = 12, 3
SLOWEST = 12.0
LIMIT_SECONDS = 1200
# Ray's own services are exempt, since they compare their clocks.
CLOCK = """
import random, sys, time
real, rng = time.time, random.Random({seed})
length = rng.uniform(2, 9)
if not any("ray/" in word and "default_worker" not in word for word in sys.orig_argv):
    time.time = lambda: real() + 3600 * (int(real() / length) % 3 - 1)
"""


class SlowWay:
    """A proxy of a server, behind which each request waits 0 to SLOWEST seconds."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.rng = port, random.Random(seed)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Accept callers as long as the process lives."""
        while True:
            caller, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.port))
            answered = threading.Event()
            answered.set()
            threading.Thread(target=self.pump, args=(caller, server, answered, True), daemon=True).start()
            threading.Thread(target=self.pump, args=(server, caller, answered, False), daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket, answered: threading.Event, asking: bool) -> None:
        """Pass bytes on; a caller's first bytes after an answer begin a request, and wait."""
        with suppress(OSError), source, target:
            while data := source.recv(65536):
                if asking and answered.is_set():
                    answered.clear()
                    time.sleep(self.rng.uniform(0, SLOWEST))
                if not asking:
                    answered.set()
                target.sendall(data)


def train(number: int, home: Path, uri: str, seed: int) -> dict[str, Any]:
    """Train once, every third time on Ray; return how it ended."""
    name, clock = f"run-{number}", home / f"clock-{number}"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(CLOCK.format(seed=seed + number))
    settings = {
        "data.path": home / "coins", "model.base_channels": 4, "model.levels": 3, "data.crop": 64, "optim.steps": STEPS,
        "optim.global_batch_size": 2, "optim.warmup_steps": 2, "run.name": name, "run.storage": home / "runs", "run.panels": 1,
        "run.log_every": 1, "run.validate_every": EVERY, "run.checkpoint_every": EVERY, "run.tracking_uri": uri,
        "cluster.cpus_per_worker": 1,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in settings.items()]
    words += ["--cluster.workers=1"] if number % 3 == 0 else ["--local"]
    root = Path(__file__).parents[1]
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    variables |= {"HOME": str(home), "PYTHONPATH": f"{clock}{os.pathsep}{root}"}
    with (home / f"{name}.log").open("w+") as log:
        try:
            status = subprocess.run(
                [sys.executable, "-m", "deepskip", "train", *words],
                cwd=home, env=variables, stdout=log, stderr=log, check=False, timeout=LIMIT_SECONDS,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = -1
        log.seek(0)
        said = log.read()
    folder = home / "runs" / name
    steps = (
        sorted(step for kind, step, _, _ in read_measured(folder / MEASURED) if kind == "train")
        if folder.exists()
        else []
    )
    outcome = {
        "run": name, "status": status, "traceback": "Traceback" in said, "summary": (folder / "summary.json").is_file(),
        "lost_steps": len(set(range(1, STEPS + 1)) - set(steps)),
    }  # fmt: skip
    well = status == 0 and outcome["summary"] and not outcome["traceback"] and not outcome["lost_steps"]
    if not well:
        outcome["said"] = said[-3000:]
    sys.stderr.write(f"{name}: {'well' if well else 'NOT WELL'}\n")
    return outcome | {"well": well}


def main() -> None:
    """Run the trainings, print the JSON, and exit with 1 if one did not end well."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainings", type=int, default=30)
    parser.add_argument("--at_once", type=int, default=4)
    arguments = parser.parse_args()
    started = time.monotonic()
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=end_with_parent())
        for _ in range(len(os.sched_getaffinity(0)))
    ]
    with tempfile.TemporaryDirectory(prefix="deepskip-stress-") as folder:
        home = Path(folder)
        pack_coins(home / "coins", {"train": 8, "val": 2})
        server = Server(home)
        server.start()
        try:
            uri = SlowWay(server.port, arguments.seed).uri
            with ThreadPoolExecutor(arguments.at_once) as pool:
                found = list(pool.map(lambda n: train(n, home, uri, arguments.seed), range(arguments.trainings)))
        finally:
            server.send_signal(9)
            for process in busy:
                process.kill()
    result = {
        "seed": arguments.seed, "started": len(found), "ended_well": sum(each["well"] for each in found),
        "lost": sum(each["lost_steps"] for each in found), "tracebacks": sum(each["traceback"] for each in found),
        "minutes": round((time.monotonic() - started) / 60, 1), "not_well": [each for each in found if not each["well"]],
    }  # fmt: skip
    sys.stdout.write(f"{json.dumps(result, indent=2)}\n")
    sys.exit(result["ended_well"] != len(found))


if __name__ == "__main__":
    main()
