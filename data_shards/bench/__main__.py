"""Benchmark the data stream: compared readers, crops, S3, resuming, memory, size of the index. `make bench-data` runs it."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from deepskip.data_shards import storage
from deepskip.data_shards.bench import crops, readers, samples
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.entries import SCHEMA
from deepskip.data_shards.index import ShardEntry, load_index, save_index
from deepskip.data_shards.indexing import index_shards
from deepskip.data_shards.stream import train_batches

DELAY = 0.02
Row = dict[str, Any]


def main() -> None:
    """Run the requested parts, and write a table and the numbers."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.data_shards.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", default=[*PARTS], help=f"parts to run, of {', '.join(PARTS)} (all)")
    parser.add_argument("--samples", type=int, default=8192, help="samples that a reader reads in an epoch (8192)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="epochs that a reader is timed over, readers alternating (5)"
    )
    parser.add_argument("--cubes", type=Path, help="folder of .npz files with cube and mask, in place of made ones")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{os.cpu_count()}-cores.json"
    results: dict[str, Any] = {"environment": environment()}
    # Parts that are not run again keep their numbers, if machine and packages are the same.
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if {**kept.get("environment", {}), "date": ""} == {**results["environment"], "date": ""}:
        results = kept | results
    with tempfile.TemporaryDirectory(prefix="deepskip-bench-") as folder:
        for part in arguments.parts:
            print(f"{part} ...", file=sys.stderr, flush=True)
            results[part] = PARTS[part](Path(folder), arguments)
    text = table(results)
    print(text)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)


def environment() -> dict[str, Any]:
    """Return the machine and the packages that the numbers were measured with."""
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    packages = (
        "torch",
        "numpy",
        "webdataset",
        "litdata",
        "mosaicml-streaming",
        "pillow",
        "imagecodecs",
        "s3fs",
        "moto",
    )
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }


def bench_readers(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Measure samples/s after the first batch, readers alternating, warm, in this process and with two loader processes."""
    contenders: list[tuple[str, readers.Reader, str]] = [
        ("limit: mapped, unchecked, in order", readers.mapped_without_shuffling, "tar"),
        ("deepskip", readers.deepskip, "tar"),
        ("deepskip, statistics of each image", readers.deepskip_image_statistics, "tar"),
        ("webdataset, in order", readers.plain_webdataset, "tar"),
        ("litdata", readers.litdata, "litdata"),
        ("mosaicml-streaming", readers.mosaic, "mosaic"),
    ]
    rows = []
    for kind in ("npy", "png"):
        samples.write_tars(folder / f"tar-{kind}", kind, arguments.samples)
        samples.write_litdata(folder / f"litdata-{kind}", kind, arguments.samples)
        samples.write_mosaic(folder / f"mosaic-{kind}", kind, arguments.samples)
        for workers in (0, 2):
            rates: dict[str, list[float]] = {}
            # The readers alternate, so that a slow phase of the machine affects all of them; the first round is for warming up.
            for turn in range(arguments.rounds + 1):
                for name, reader, form in contenders:
                    read, seconds = read_epoch(reader(folder / f"{form}-{kind}", kind, workers, turn))
                    if read and turn:
                        rates.setdefault(name, []).append((read - readers.BATCH) / seconds)
                    if read not in (0, arguments.samples):
                        raise RuntimeError(f"{name} read {read} of {arguments.samples} samples")
            ours = statistics.median(rates["deepskip"])
            for name, values in rates.items():
                middle = statistics.median(values)
                rows.append(
                    {"format": kind, "loader processes": workers, "reader": name, "samples/s": round(middle),
                     "lowest": round(min(values)), "highest": round(max(values)), "deepskip is": f"{ours / middle:.2f} x"}
                )  # fmt: skip
    return rows


def bench_crops(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Measure crops/s of processor time in one process with one thread, from whole images and from tiles, alternately."""
    return crops.bench(folder / "crops", 4, arguments.rounds, 1.0, [128, 256, 512], arguments.cubes)


def read_epoch(batches: Iterator[Any]) -> tuple[int, float]:
    """Read all batches, and return the number of samples and the seconds from the first batch to the last."""
    read, started = 0, 0.0
    for batch in batches:
        if not read:
            started = time.perf_counter()
        read += len(batch[0] if isinstance(batch, tuple | list) else batch["image"])
    return read, time.perf_counter() - started


@contextmanager
def slow_s3() -> Iterator[Any]:
    """Start the slow S3 endpoint in a process of its own.

    Yields:
        An fsspec file system on it, with an empty bucket "bench".
    """
    import fsspec

    server = subprocess.Popen(
        [sys.executable, "-m", "deepskip.data_shards.bench.slow_s3", str(DELAY)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        fs = fsspec.filesystem("s3")
        fs.mkdir("bench")
        yield fs
    finally:
        server.kill()
        server.wait()


def bench_s3(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Measure MB/s of an epoch from an empty cache, compared with plain downloads of the same shards one after another."""
    local = folder / "s3-source"
    index = samples.write_tars(local, "npy", arguments.samples)
    total = sum(shard.bytes for shard in index.shards)
    rates: dict[str, list[float]] = {"plain sequential download": [], "deepskip, empty cache": []}
    with slow_s3() as fs:
        fs.put(str(local), "bench/train", recursive=True)
        for turn in range(arguments.rounds):
            started = time.perf_counter()
            for shard in index.shards:
                fs.get_file(f"bench/train/{shard.name}", str(folder / "download"))
            rates["plain sequential download"].append(total / 1e6 / (time.perf_counter() - started))
            cache = storage.Cache(folder / f"cache-{turn}", 10**11)
            started = time.perf_counter()
            shards = Shards("s3://bench/train", "dataset", Crops(samples.SIDE, 0.5, 0), cache=cache)
            batches = train_batches(shards, turn, readers.BATCH, 0, 0, 1, window=4)
            for _ in range(len(shards) // readers.BATCH):
                next(batches)
            rates["deepskip, empty cache"].append(total / 1e6 / (time.perf_counter() - started))
            batches.close()  # type: ignore[attr-defined]
    base = statistics.median(rates["plain sequential download"])
    return [
        {"from S3, 20 ms a request": name, "MB/s": round(statistics.median(values), 1), "lowest": round(min(values), 1),
         "highest": round(max(values), 1), "share of plain": f"{statistics.median(values) / base:.2f}"}
        for name, values in rates.items()
    ]  # fmt: skip


RESUME = """
import sys, time
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.stream import train_batches
started = time.perf_counter()
shards = Shards(sys.argv[1], "dataset", Crops(8, 0.5, 0))
next(train_batches(shards, 0, 16, int(sys.argv[2]), 0, 1))
print(time.perf_counter() - started)
"""


def bench_resume(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Measure the time to the first batch of an epoch of a million samples, from its start and from 90 % of it."""
    source, target = folder / "resume-one", folder / "resume"
    source.mkdir()
    target.mkdir()
    import webdataset

    with webdataset.TarWriter(str(source / "a.tar"), mtime=0, encoder=False) as out:
        for i in range(1000):
            image, mask = np.full((8, 8, 3), i % 256, np.uint8), np.zeros((8, 8), np.uint8)
            out.write(
                {
                    "__key__": f"{i:04d}",
                    "image.npy": samples.encode(image, "npy"),
                    "mask.npy": samples.encode(mask, "npy"),
                }
            )
    one = index_shards(str(source), workers=1)
    names = [f"shard-{i:06d}.tar" for i in range(1000)]
    for name in names:
        os.link(source / "a.tar", target / name)
    shards = tuple(replace(one.shards[0], name=name) for name in names)
    save_index(replace(one, shards=shards, samples=pa.concat_tables([one.samples] * 1000)), target)
    seconds: dict[float, list[float]] = {0.0: [], 0.9: []}
    for _ in range(arguments.rounds):
        for share, values in seconds.items():
            command = [sys.executable, "-c", RESUME, str(target), str(int(share * 1_000_000 / 16))]
            values.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    base = statistics.median(seconds[0.0])
    return [
        {"epoch of 1,000,000 samples": f"from {share:.0%}", "ms to the first batch": round(1000 * statistics.median(values), 1),
         "lowest": round(1000 * min(values), 1), "highest": round(1000 * max(values), 1),
         "of starting at 0": f"{statistics.median(values) / base:.2f} x"}
        for share, values in seconds.items()
    ]  # fmt: skip


def bench_memory(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Measure the memory of the training process and of a loader process over ten epochs."""
    path = folder / "tar-npy"
    if not path.exists():
        samples.write_tars(path, "npy", arguments.samples)
    shards = Shards(path, "image", Crops(96, 0.5, 0))
    batches = train_batches(shards, 0, readers.BATCH, 0, 0, 1, loader_workers=1)
    rows = []
    for epoch in range(1, 11):
        for _ in range(len(shards) // readers.BATCH):
            next(batches)
        here = psutil.Process()
        children = sum(child.memory_info().rss for child in here.children(recursive=True))
        rows.append({"epochs": epoch, "MiB of the process": round(here.memory_info().rss / 2**20, 1),
                     "MiB of its loader process": round(children / 2**20, 1)})  # fmt: skip
    batches.close()  # type: ignore[attr-defined]
    return rows


INDEX = """
import sys, time
import psutil
from deepskip.data_shards.index import load_index
before = psutil.Process().memory_info().rss
started = time.perf_counter()
index = load_index(sys.argv[1])
loaded = time.perf_counter()
index.entries(list(range(0, index.num_samples, index.num_samples // 16)))
first = time.perf_counter()
print(loaded - started, first - loaded, psutil.Process().memory_info().rss - before)
"""


def bench_index(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Measure the size of an index of ten million samples, and how long it takes to write and to load."""
    count, per_shard = 10_000_000, 1000
    one = samples.write_tars(folder / "index-one", "npy", 16)
    numbers = np.arange(count)
    columns = {
        "key": pa.array(np.char.zfill(numbers.astype("U"), 12), pa.large_string()),
        "image_offset": (numbers % per_shard) * 70_000 + 512,
        "image_length": np.full(count, 49_280, np.uint32),
        "mask_offset": (numbers % per_shard) * 70_000 + 51_200,
        "mask_length": np.full(count, 16_512, np.uint32),
        "image_format": np.full(count, 5, np.uint8),
        "mask_format": np.full(count, 5, np.uint8),
        "digest": np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64),
    }
    shards = tuple(
        ShardEntry(f"shard-{i:06d}.tar", 70_000_000, f"{i:064x}", per_shard) for i in range(count // per_shard)
    )
    target = folder / "index"
    target.mkdir()
    started = time.perf_counter()
    save_index(replace(one, shards=shards, samples=pa.table(columns, schema=SCHEMA)), target)
    written = time.perf_counter() - started
    run = subprocess.run([sys.executable, "-c", INDEX, str(target)], capture_output=True, text=True, check=True)
    load, first, memory = (float(word) for word in run.stdout.split())
    size = {path.suffix: path.stat().st_size / 1e6 for path in target.iterdir()}
    assert load_index(target).num_samples == count
    return [
        {"samples": f"{count:,}", "shards": f"{len(shards):,}", "index.json, MB": round(size[".json"], 2),
         "samples, MB": round(size[".arrow"], 1), "bytes a sample": round(1e6 * size[".arrow"] / count, 1),
         "s to write": round(written, 2), "ms to load": round(1000 * load, 1),
         "ms to the first 16 entries": round(1000 * first, 2), "MiB it takes": round(memory / 2**20, 1)}
    ]  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Return the results page: the environment and a table for each part.

    Args:
        results: The environment, and the rows of each part, by name.
    """
    machine = results["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    lines = [
        "# The stream, measured", "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}, Python {machine['python']}, {packages}; "
        f"{machine['date']}. Made by `make bench-data`.",
    ]  # fmt: skip
    for part, rows in results.items():
        if part == "environment":
            continue
        lines += ["", f"## {part}", "", PARTS[part].__doc__ or "", ""]
        lines.append("| " + " | ".join(rows[0]) + " |")
        lines.append("|" + "---|" * len(rows[0]))
        lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Row]]] = {
    "readers": bench_readers,
    "crops": bench_crops,
    "s3": bench_s3,
    "resume": bench_resume,
    "memory": bench_memory,
    "index": bench_index,
}

if __name__ == "__main__":
    main()
