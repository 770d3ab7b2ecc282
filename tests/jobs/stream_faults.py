"""Break a training that follows a stream, its writer and its S3 endpoint at random: `python -m tests.jobs.stream_faults`.

A writer appends generations at random times, while a training of two Ray workers follows. What was killed is started again by
the same command. In the end `deepskip audit` must find each sample trained exactly once, and the losses must be those of runs
that get the admission log and all data at once: equal on as many workers, to 1e-4 relative on one.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import psutil
from moto.server import ThreadedMotoServer

from deepskip.data_shards.admission import Admission, segments
from deepskip.jobs import admissions, runs
from tests.jobs.growing import ROOT, SMALL, admitted, begin, done, packed
from tests.jobs.proxy import Proxy

RELATIVE = 1e-4
MARK = "DEEPSKIP_STREAM_FAULTS"
DATA = "s3://bucket/data"
KINDS = ("worker killed", "driver killed", "writer killed", "S3 cut", "S3 held")


class Harness:
    """The processes of one run of faults.

    Args:
        home: folder of all files.
        generations: number of generations that are appended.
        seed: seed of the times and faults.
        pause: longest time between two appends in seconds.
    """

    def __init__(self, home: Path, generations: int, seed: int, pause: float) -> None:
        self.home, self.generations, self.seed, self.pause = home, generations, seed, pause
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.server.start()
        self.proxy = Proxy(self.server.get_host_and_port()[1])
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_"))}
        self.environment |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", MARK: str(home),
            "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.folder = home / "runs" / "live"
        self.training: subprocess.Popen[bytes] | None = None
        self.writer: subprocess.Popen[bytes] | None = None
        self.written, self.ends = 0, False
        self.starts: Counter[str] = Counter()
        self.failure: BaseException | None = None

    def upload(self) -> None:
        """Write generation 0 into the bucket."""
        os.environ |= {key: value for key, value in self.environment.items() if key.startswith("AWS_")}
        s3 = fsspec.filesystem("s3", skip_instance_cache=True)
        s3.mkdir("bucket")
        s3.put(f"{begin(self.home)}/", "bucket/data/", recursive=True)

    def command(self, name: str, **settings: object) -> list[str]:
        """Return the command of a training."""
        values = SMALL | {
            "run.storage": self.home / "runs", "run.name": name, "data.path": DATA, "data.cache_dir": self.home / "cache",
            "cluster.workers": 2, "cluster.max_failures": -1, "cluster.collective_timeout": 20, "run.checkpoint_every": 3,
            "data.poll_seconds": 0.5,
            # At 1e-3, rounding grows tenfold every 8 steps: to 7e-4 of a loss after 80, on another number of workers.
            "optim.learning_rate": 1e-4,
        }  # fmt: skip
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        return [sys.executable, "-m", "deepskip", "train"] + [
            f"--{key}={'null' if value is None else value}" for key, value in values.items()
        ]

    def start(self, words: list[str], name: str) -> subprocess.Popen[bytes]:
        """Start a process whose output is appended to a file."""
        self.starts[name] += 1
        with (self.home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(words, env=self.environment, stdout=log, stderr=subprocess.STDOUT, cwd=self.home)

    def write(self) -> None:
        """Append all generations, each by the same command until it succeeds."""
        try:
            rng = random.Random(self.seed + 1)
            for number in range(1, self.generations + 1):
                time.sleep(rng.uniform(0, self.pause))
                staged = packed(self.home / f"staged-{number}", 100 * number, rng.randint(4, 12))
                words = [sys.executable, "-m", "deepskip", "append", DATA, "--shards", str(staged)]
                while True:
                    self.writer = self.start(words, "writer")
                    if self.writer.wait() == 0:
                        break
                    time.sleep(0.5)
                self.written = number
        except BaseException as error:
            self.failure = error

    def processes(self, words: str) -> list[psutil.Process]:
        """Return the processes of this run whose command line has these words."""
        found = []
        for process in psutil.process_iter():
            try:
                if words in " ".join(process.cmdline()) and process.environ().get(MARK) == str(self.home):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def attended(self) -> None:
        """Start the training if it has ended; once all is written, it ends by itself."""
        if self.training is None or self.training.poll() is not None:
            self.ends = self.written == self.generations
            when_idle = "end" if self.ends else "wait"
            self.training = self.start(self.command("live", data__when_idle=when_idle), "training")

    def steps(self) -> int:
        """Return the number of steps that were logged, with the repeated ones."""
        path = self.folder / runs.JOURNAL
        return path.read_bytes().count(b'["train"') if path.exists() else 0

    def idle(self) -> bool:
        """Return whether all that was written is admitted and trained."""
        log = [Admission(*entry) for entry in admitted(self.folder)]
        if len(log) <= self.written:
            return False
        sizes = [sum(entry.shards) for entry in admissions.read(self.folder)]
        batch, share, count = (
            SMALL[name] for name in ("optim.global_batch_size", "data.replay", "data.replay_generations")
        )
        return segments(log, sizes, batch, share, count)[-1].steps.stop <= done(self.folder)  # type: ignore[arg-type]

    def progress(self, seconds: float = 240) -> None:
        """Wait until the training has made another step, or has nothing to do."""
        before, until = self.steps(), time.monotonic() + seconds
        while self.steps() == before and not self.idle():
            if time.monotonic() > until:
                raise TimeoutError(f"no step in {seconds:g} s; see {self.home}/training.log")
            self.attended()
            time.sleep(0.2)

    def fault(self, kind: str) -> bool:
        """Make a fault of KINDS happen, and return whether there was anything to break."""
        if kind == "writer killed":
            if hit := self.writer is not None and self.writer.poll() is None:
                self.writer.kill()
            return hit
        if kind in ("S3 cut", "S3 held"):
            if cut := kind == "S3 cut":
                self.proxy.cut()
            else:
                self.proxy.hold(True)
            time.sleep(4)
            if cut:
                self.proxy.mend()
            else:
                self.proxy.hold(False)
            return True
        if kind == "worker killed":
            found = self.processes("ray::RayTrainWorker")[:1]
        else:
            # The job that `deepskip train` gives to its own Ray, and the shell that Ray starts it with.
            found = self.processes("-m deepskip.jobs.train")
        for process in found:
            process.kill()
        return bool(found)

    def run(self) -> Counter[str]:
        """Write, train and break until all is written and trained; return the number of faults of each kind."""
        self.upload()
        self.attended()
        self.progress()
        writer = threading.Thread(target=self.write, daemon=True)
        writer.start()
        rng, made, coming = random.Random(self.seed), Counter[str](), list[str]()
        while writer.is_alive() or not made.keys() >= {*KINDS} - {"writer killed"}:
            coming = coming or rng.sample(KINDS, len(KINDS))
            kind = coming.pop()
            print(f"{self.written} generations, {done(self.folder)} steps: {kind}", flush=True)
            if self.fault(kind):
                made[kind] += 1
            time.sleep(rng.uniform(0, 3))
            self.progress()
        if self.failure is not None:
            raise self.failure
        assert self.training is not None
        if not self.ends:
            self.training.send_signal(signal.SIGTERM)
            self.training.wait(timeout=120)
        for _ in range(3):
            if not self.ends or self.training.poll() != 0:
                self.attended()
            if self.training.wait(timeout=300) == 0:
                return made
        raise RuntimeError(f"the training does not end; see {self.home}/training.log")

    def again(self, name: str, *flags: str) -> dict[int, list[float]]:
        """Train with the admission log when all data is there; return the losses of each step."""
        folder = self.home / "runs" / name
        folder.mkdir()
        shutil.copy(self.folder / admissions.FILE, folder)
        if self.start([*self.command(name, data__when_idle="end"), *flags], name).wait():
            raise RuntimeError(f"{name} failed; see {self.home}/{name}.log")
        return losses(folder)

    def close(self) -> None:
        """End everything."""
        for process in self.processes(""):
            process.kill()
        self.server.stop()


def losses(folder: Path) -> dict[int, list[float]]:
    """Return the losses of each step of a run: more than one for a step that was repeated."""
    found: dict[int, list[float]] = {}
    for line in (folder / runs.JOURNAL).read_text().splitlines():
        entry = json.loads(line)
        if entry[0] == "train":
            found.setdefault(entry[1], []).append(entry[2]["loss"])
    return found


def compared(live: dict[int, list[float]], same: dict[int, list[float]], other: dict[int, list[float]]) -> list[str]:
    """Return what differs between the losses of a run and those of runs on as many and on other workers."""
    wrong = []
    if live.keys() != same.keys() or live.keys() != other.keys():
        wrong.append(f"{len(live)} steps where the others have {len(same)} and {len(other)}")
    for step, values in sorted(live.items()):
        if any(value != same[step][-1] for value in values if step in same):
            wrong.append(f"step {step}: {values} where a run on as many workers has {same[step][-1]}")
        if step in other and abs(values[-1] - other[step][-1]) > RELATIVE * abs(values[-1]):
            wrong.append(f"step {step}: {values[-1]} where a run on another number of workers has {other[step][-1]}")
    return wrong


def main(argv: list[str] | None = None) -> None:
    """Run the faults, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.jobs.stream_faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generations", type=int, default=40)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "stream-faults", help="folder, emptied first; logs stay"
    )
    parser.add_argument("--pause", type=float, default=8.0, help="longest time between two appends in seconds")
    parser.add_argument("--once", action="store_true", help="do not train twice more, to compare the losses")
    arguments = parser.parse_args(argv)
    started = time.time()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    harness = Harness(arguments.out.absolute(), arguments.generations, arguments.seed, arguments.pause)
    try:
        faults = harness.run()
        audit = [sys.executable, "-m", "deepskip", "audit", str(harness.folder)]
        checked = subprocess.run(audit, env=harness.environment, capture_output=True, text=True)
        live = losses(harness.folder)
        wrong = [] if arguments.once else compared(live, harness.again("same"), harness.again("one", "--local"))
    finally:
        harness.close()
    print(checked.stdout + checked.stderr, end="")
    repeated = sum(len(values) - 1 for values in live.values())
    print(f"faults: {', '.join(f'{count} {kind}' for kind, count in sorted(faults.items()))}")
    print(f"starts: {harness.starts['training']} of the training, {harness.starts['writer']} of the writer")
    print(
        f"{len(live)} steps, {repeated} repeated, {time.time() - started:.0f} s"
        + f"; {len(wrong)} losses differ" * (not arguments.once)
    )
    print("\n".join(wrong[:20]))
    if checked.returncode or wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
