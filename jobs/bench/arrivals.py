"""Measure a training that follows: the rate of arrivals that it keeps up with, and its memory over many generations.

Run it as `python -m deepskip.jobs.bench.arrivals`. The training is `deepskip train --local` in a process of its own, with
one thread and a small network on images of 32 x 32 pixels. Generations are committed as by `append`, but all are links to one
shard, since packing is not what is measured. It writes OUT/arrivals.json and OUT/arrivals.md.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from deepskip.data_shards import appending
from deepskip.data_shards.index import Index, load_first, load_index, plain_fields, samples_file
from deepskip.data_shards.manifest import Generation
from deepskip.data_shards.writer import write_shards
from deepskip.jobs import admissions, runs
from deepskip.jobs.bench.drift import discs
from deepskip.jobs.settings import ended_by_sigterm

RESULTS = Path(__file__).parent / "results"
TRAINING = {
    "model.base_channels": 4, "model.levels": 3, "model.norm": "group", "data.crop": 32, "data.follow": "true",
    "data.poll_seconds": 0.1, "data.loader_workers": 0, "optim.steps": "null", "optim.schedule": "constant",
    "run.name": "live", "run.validate_every": 10**6, "run.checkpoint_every": 500, "run.panels": 0, "run.log_every": 1,
    "run.tracking_uri": "none", "cluster.cpus_per_worker": 1,
}  # fmt: skip
# Numbers of generations at which memory is measured.
COUNTS = (100, 500, 1000, 2000, 5000, 10000)
# Generations that are committed and not admitted at most, where memory over many generations is measured.
AHEAD = 100


@dataclass
class Writer:
    """Commits generations that are links to one packed split.

    Attributes:
        split: folder of the split.
        packed: folder of the packed samples.
        index: index of the packed samples.
        chain: the generations so far.
    """

    split: Path
    packed: Path
    index: Index
    chain: list[Generation]

    def commit(self) -> None:
        """Commit the next generation, atomically and synced to disk."""
        token = uuid.uuid4().hex
        index, placed = appending.renamed(self.index, token)
        for old, new in placed.items():
            os.link(self.packed / old, self.split / new)
        name, samples = f"samples-{token}.arrow", samples_file(index.samples)
        template = self.packed / "template.arrow"
        if not template.exists():
            template.write_bytes(samples)
        os.link(template, self.split / name)
        fields = plain_fields(index, name, samples) | {"watermark": time.time(), "offsets": {}}
        made = appending.commit_next(str(self.split), self.chain, fields, token)
        assert made is not None, "there is one writer"
        self.chain.append(made)


def prepared(home: Path, samples: int) -> Writer:
    """Pack generation 0 and the samples of all later ones.

    Args:
        home: folder of the data set, data/ in it.
        samples: number of samples of a generation.
    """
    first = list(discs(0, 0, False))
    split, packed = home / "data" / "train", home / "packed"
    write_shards(first, split, num_classes=1)
    write_shards(first[:4], home / "data" / "val", num_classes=1)
    write_shards(list(discs(0, 1, False))[:samples], packed, num_classes=1)
    return Writer(split, packed, load_index(str(packed)), [load_first(str(split))[0]])


@contextlib.contextmanager
def training(home: Path, **settings: object) -> Iterator[psutil.Process]:
    """Yield the process of a training that follows, and end it.

    Args:
        home: folder with data/, and for the run.
        **settings: further settings; dots in names are written as __.
    """
    given = TRAINING | {name.replace("__", "."): value for name, value in settings.items()}
    given |= {"data.path": home / "data", "run.storage": home / "runs"}
    words = [f"--{key}={value}" for key, value in given.items()]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deepskip", "train", "--local", *words], stdout=log, stderr=log
        )
    try:
        yield psutil.Process(process.pid)
        if process.poll() is not None:
            raise RuntimeError(f"the training ended: {(home / 'log').read_text()[-2000:]}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def lines(path: Path) -> list[Any]:
    """Return the JSON value of each whole line of a file that another process writes; [] if there is no file."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def admitted(home: Path) -> int:
    """Return the number of generations that the training has admitted."""
    path = home / "runs" / "live" / admissions.FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def behind(home: Path) -> list[tuple[float, float, float]]:
    """Return the time in seconds since 1970, the samples behind and the lag in seconds, as the training has logged them."""
    return [
        (stamp / 1000, values["samples_behind"], values.get("lag_seconds", 0.0))
        for kind, _, values, stamp in lines(home / "runs" / "live" / runs.JOURNAL)
        if kind == "stream" and "samples_behind" in values
    ]


def wait_until_idle(home: Path, process: psutil.Process, count: int) -> None:
    """Wait until the training has admitted some generations and nothing is left.

    Args:
        home: folder of the run.
        process: the training.
        count: number of generations with generation 0.
    """
    while admitted(home) < count or not (home / "log").read_text().strip().endswith("waiting for new data"):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError(f"the training ended: {(home / 'log').read_text()[-2000:]}")
        time.sleep(0.1)


def megabytes(process: psutil.Process) -> float:
    """Return the resident memory of a process in MB."""
    return float(process.memory_info().rss) / 1e6


def measure_rates(samples: int, seconds: float, rates: list[float]) -> dict[str, Any]:
    """Measure how far the training is behind at several rates, each for some time and from no backlog.

    Args:
        samples: number of samples of a generation.
        seconds: time for which data arrives at a rate.
        rates: samples per second.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        writer = prepared(home, samples)
        with training(home) as process:
            wait_until_idle(home, process, 1)
            # The first steps take longer.
            for _ in range(8):
                writer.commit()
            wait_until_idle(home, process, len(writer.chain))
            for rate in rates:
                row = measure_rate(home, writer, process, rate, seconds)
                begun = time.time()
                # After the last one there is nothing to be ready for.
                if rate != rates[-1]:
                    wait_until_idle(home, process, len(writer.chain))
                    row["catch_up_seconds"] = time.time() - begun
                rows.append(row)
                print(rows[-1], flush=True)
    return {"samples": samples, "rows": rows}


def measure_rate(home: Path, writer: Writer, process: psutil.Process, rate: float, seconds: float) -> dict[str, float]:
    """Commit generations at a rate, and return how far the training was behind.

    Args:
        home: folder of the run.
        writer: commits the generations.
        process: the training.
        rate: samples per second.
        seconds: time for which they arrive.
    """
    begun, own = time.time(), float(writer.index.shard_sizes.sum())
    load = os.getloadavg()[0]
    count = round(rate * seconds / own)
    for number in range(count):
        time.sleep(max(0.0, begun + number * own / rate - time.time()))
        writer.commit()
    end = time.time()
    found = [(stamp - begun, left, lag) for stamp, left, lag in behind(home) if begun <= stamp <= end]
    middle = (end - begun) / 2
    early = [each for each in found if each[0] < middle] or [(0.0, 0.0, 0.0)]
    late = [each for each in found if each[0] >= middle] or [(0.0, 0.0, 0.0)]
    return {
        "rate": rate, "arrived": count * own, "seconds": end - begun, "load": load,
        "behind_first_half": max(left for _, left, _ in early), "behind_second_half": max(left for _, left, _ in late),
        "lag_first_half": max(lag for *_, lag in early), "lag_second_half": max(lag for *_, lag in late),
        "trained": (count * own - late[-1][1]) / (end - begun), "megabytes": megabytes(process),
    }  # fmt: skip


def measure_memory(generations: int) -> dict[str, Any]:
    """Return the resident memory of a training after some numbers of generations, of one sample each.

    Args:
        generations: number of generations in all.
    """
    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        writer = prepared(home, 1)
        begun = time.time()
        with training(home, optim__global_batch_size=32, run__log_every=10) as process:
            wait_until_idle(home, process, 1)
            for count in [each for each in COUNTS if each <= generations]:
                while len(writer.chain) <= count:
                    if len(writer.chain) - admitted(home) < AHEAD:
                        writer.commit()
                    else:
                        time.sleep(0.02)
                        if process.status() == psutil.STATUS_ZOMBIE:
                            raise RuntimeError(f"the training ended: {(home / 'log').read_text()[-2000:]}")
                wait_until_idle(home, process, len(writer.chain))
                segments = len({line["step"] for line in lines(home / "runs" / "live" / admissions.FILE)})
                rows.append(
                    {"generations": count, "segments": segments, "megabytes": megabytes(process),
                     "seconds": time.time() - begun}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return {"load": load, "rows": rows}


def page(found: dict[str, Any]) -> str:
    """Return the tables of the results.

    Args:
        found: contents of arrivals.json.
    """
    text = f"{found['cores']} cores, torch {found['torch']}. A load is that of all processes when a part began.\n"
    if rates := found.get("rates"):
        text += (
            f"\nGenerations have {rates['samples']} samples. "
            "Behind (samples) and lag are the largest.\n\n"
            "| samples/s | for | trained | load | behind, 1st half | 2nd half | lag, 1st half | 2nd half | to catch up | MB |\n"
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        )
        for row in rates["rows"]:
            caught = f"{row['catch_up_seconds']:.0f} s" if "catch_up_seconds" in row else "not measured"
            text += (
                f"| {row['arrived'] / row['seconds']:.0f} | {row['seconds']:.0f} s | {row['trained']:.0f} | {row['load']:.1f} "
                f"| {row['behind_first_half']:.0f} | {row['behind_second_half']:.0f} | {row['lag_first_half']:.1f} s "
                f"| {row['lag_second_half']:.1f} s | {caught} | {row['megabytes']:.0f} |\n"
            )
    if memory := found.get("memory"):
        text += f"\nLoad {memory['load']:.1f}.\n\n| generations | segments | resident memory, MB |\n|---:|---:|---:|\n"
        for row in memory["rows"]:
            text += f"| {row['generations']:,} | {row['segments']:,} | {row['megabytes']:.1f} |\n"
    return text


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, and write its results; a part that is not run keeps its earlier ones.

    Args:
        argv: command-line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m deepskip.jobs.bench.arrivals", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for arrivals.json and arrivals.md")
    parser.add_argument("--only", choices=["rates", "memory"], help="one part alone")
    parser.add_argument("--samples", type=int, default=16, help="samples of a generation, for the rates")
    parser.add_argument("--seconds", type=float, default=30, help="time for each rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[50, 100, 200, 300, 400], help="samples/s")
    parser.add_argument("--generations", type=int, default=10_000, help="generations, for the memory")
    arguments = parser.parse_args(argv)
    path = arguments.out / "arrivals.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found |= {"cores": os.cpu_count(), "torch": torch.__version__}
    # So that the training does not outlive this process.
    with ended_by_sigterm():
        if arguments.only != "rates":
            found["memory"] = measure_memory(arguments.generations)
        if arguments.only != "memory":
            found["rates"] = measure_rates(arguments.samples, arguments.seconds, arguments.rates)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    (arguments.out / "arrivals.md").write_text(page(found))


if __name__ == "__main__":
    main()
