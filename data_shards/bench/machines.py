"""Bytes and requests of machines that train together from one slow S3 endpoint, each with a cache of its own.

`python -m deepskip.data_shards.bench.machines` writes a table. Each machine reads its share of an epoch from an empty cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deepskip.data_shards import storage
from deepskip.data_shards.bench.slow_s3 import COUNTS
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.order import steps_per_epoch
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.stream import train_batches
from deepskip.data_shards.writer import write_shards

DELAY = 0.02
# These are divided neither by the lanes nor by the batch.
SHARDS, PER_SHARD, SIDE = 250, 8, 64
BATCH = 64
MACHINES = (1, 2, 4)
# Lanes, and shards in a window of each: about as many shards in use in all.
FORMS = ((1, 16), (16, 2), (64, 1))
URL = "s3://bench/train"
Row = dict[str, Any]


def main() -> None:
    """Measure all numbers of lanes and machines, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.data_shards.bench.machines", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "machines.md", help="the table")
    parser.add_argument("--shards", type=int, default=SHARDS, help=f"number of shards ({SHARDS})")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deepskip-machines-") as name, endpoints(max(MACHINES)) as ports:
        total = upload(Path(name) / "train", arguments.shards, ports[0])
        for lanes, window in FORMS:
            for machines in MACHINES:
                found = []
                for machine in range(machines):
                    cache = Path(name) / f"{lanes}-{machines}-{machine}"
                    found.append(
                        [read(ports[machine], cache, machine, machines, lanes, window, epoch) for epoch in (0, 1)]
                    )
                rows.append(row(lanes, window, machines, found, total))
                print(rows[-1], file=sys.stderr, flush=True)
    text = table(rows, arguments.shards, total)
    arguments.out.write_text(text)
    print(text)


@contextmanager
def endpoints(count: int) -> Iterator[list[int]]:
    """Start the endpoint in a process of its own, and yield its ports, one for each machine."""
    command = [sys.executable, "-m", "deepskip.data_shards.bench.slow_s3", str(DELAY), str(count)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert server.stdout is not None
        yield [int(server.stdout.readline()) for _ in range(count)]
    finally:
        server.kill()
        server.wait()


def settings_of(port: int) -> dict[str, str]:
    """Return the environment in which s3:// is the endpoint at a port."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def upload(folder: Path, shards: int, port: int) -> int:
    """Write shards of noise to the endpoint, and return their bytes."""
    import fsspec

    rng = np.random.default_rng(0)
    made = (
        Sample(f"{i:06d}", rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8), np.eye(SIDE, dtype=np.uint8))
        for i in range(shards * PER_SHARD)
    )
    index = write_shards(made, folder, num_classes=1, samples_per_shard=PER_SHARD)
    os.environ |= settings_of(port)
    fs = fsspec.filesystem("s3")
    fs.mkdir("bench")
    fs.put(str(folder), URL, recursive=True)
    return sum(shard.bytes for shard in index.shards)


def counts_of(port: int) -> dict[str, int]:
    """Return what a machine has been served so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{COUNTS}") as answer:
        counts: dict[str, int] = json.loads(answer.read())
    return counts


MACHINE = "import sys; from deepskip.data_shards.bench.machines import machine; machine(*sys.argv[1:])"


def read(port: int, cache: Path, rank: int, machines: int, lanes: int, window: int, epoch: int) -> dict[str, int]:
    """Read an epoch's share in a process of its own, and return what it was served."""
    before = counts_of(port)
    numbers = (rank, machines, lanes, window, epoch)
    environment = os.environ | settings_of(port)
    subprocess.run([sys.executable, "-c", MACHINE, str(cache), *map(str, numbers)], env=environment, check=True)
    return {key: value - before[key] for key, value in counts_of(port).items()}


def machine(cache: str, *numbers: str) -> None:
    """Read one machine's share of an epoch; its lanes keep their shards, so that the cache is of use in the next epoch.

    Args:
        cache: Folder of its cache.
        numbers: Rank, number of machines, lanes, window and epoch.
    """
    rank, machines, lanes, window, epoch = map(int, numbers)
    shards = Shards(URL, "none", Crops(SIDE, 0.0, 0), cache=storage.Cache(Path(cache), 10**10))
    per_epoch = steps_per_epoch(len(shards), BATCH)
    first, last = epoch * per_epoch, (epoch + 1) * per_epoch
    stream = train_batches(
        shards, 0, BATCH, first, rank, machines, window=window, lanes=lanes, fixed_lanes=lanes > 1, last_step=last
    )
    seen = sum(int(batch["weight"].sum()) for batch in stream)
    # Nearly the same for each, since lanes end within one place of each other.
    assert abs(seen - len(shards) / machines) <= BATCH


def row(lanes: int, window: int, machines: int, found: list[list[dict[str, int]]], total: int) -> Row:
    """Return a row of the table.

    Args:
        lanes: Number of lanes.
        window: Shards in a window.
        machines: Number of machines.
        found: What each machine was served, in its first epoch and in its second.
        total: Bytes of all shards.
    """
    first, second = ([machine[epoch] for machine in found] for epoch in (0, 1))
    most = max(one["bytes"] for one in first) / total
    bound = 1 / machines + 2 / lanes
    if lanes > 1 and most > bound:
        raise RuntimeError(f"a machine fetched {most:.3f} of the set; at most {bound:.3f} are allowed")
    return {
        "lanes": lanes, "window": window, "machines": machines, "set fetched by a machine": f"{most:.1%}",
        "allowed": f"{bound:.1%}" if lanes > 1 else "", "GET by a machine": max(one["GET"] for one in first),
        "HEAD": max(one["HEAD"] for one in first), "all machines": f"{sum(one['bytes'] for one in first) / total:.2f} sets",
        "next epoch": f"{max(one['bytes'] for one in second) / total:.1%}",
    }  # fmt: skip


def table(rows: list[Row], shards: int, total: int) -> str:
    """Return the results as a page."""
    lines = [
        "# Machines that train together from one S3 endpoint",
        "",
        f"`python -m deepskip.data_shards.bench.machines`: {shards} shards, {total / 1e6:.0f} MB, batches of {BATCH}, "
        f"{DELAY * 1000:.0f} ms a request, an empty cache for each machine, which read one after another; the "
        "largest of all machines. Allowed is "
        "1 / machines + 2 / lanes. With several lanes these are fixed, and the cache keeps what it has.",
        "",
        f"| {' | '.join(rows[0])} |",
        f"|{'---:|' * len(rows[0])}",
        *(f"| {' | '.join(map(str, row.values()))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
