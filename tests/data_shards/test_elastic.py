"""Real processes over gloo with loader processes are killed within an epoch and restarted in another number."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.order import steps_per_epoch
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.stream import train_batches
from deepskip.data_shards.writer import write_shards

pytestmark = pytest.mark.slow
SAMPLES, G = 103, 12


def rank_main(folder: str, lanes: int, part: int, rank: int, world_size: int, port: int, first: int, last: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    shards = Shards(Path(folder) / "train", "none", Crops(16, 0.5, 0))
    log = (Path(folder) / f"log-{part}-{rank}.jsonl").open("w")
    stream = train_batches(shards, 7, G, first, rank, world_size, rank % 2 + 1, 2, lanes=lanes)
    for step, batch in zip(range(first, last), stream, strict=False):
        weight = batch["weight"].sum()
        dist.all_reduce(weight)
        keys = [key for key, w in zip(batch["key"], batch["weight"], strict=True) if w]
        log.write(json.dumps({"step": step, "keys": keys, "global": weight.item()}) + "\n")
        log.flush()
        # As with a training's checkpoint, each rank has done the step.
        dist.barrier()
        if rank == 0:
            (Path(folder) / "half").write_text(str(step + 1))
            (Path(folder) / "half").replace(Path(folder) / "done")
        time.sleep(0.02)
    os._exit(0)


def run(folder: Path, lanes: int, part: int, world_size: int, first: int, last: int, kill_at: int | None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=rank_main, args=(str(folder), lanes, part, rank, world_size, port, first, last))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 120
    while kill_at is not None and int((folder / "done").read_text()) < kill_at:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in ranks:
        if kill_at is not None:
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join(120)
        assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)


def test_killed_and_restarted_in_another_number_no_sample_is_lost_or_taken_twice(tmp_path: Path) -> None:
    lanes, rng = 5, np.random.default_rng(0)
    made = [
        Sample(f"k{i:03d}", rng.integers(0, 255, (16, 16, 3), np.uint8), np.eye(16, dtype=np.uint8))
        for i in range(SAMPLES)
    ]
    write_shards(made, tmp_path / "train", num_classes=1, samples_per_shard=15)
    per_epoch = steps_per_epoch(SAMPLES, G)
    (tmp_path / "done").write_text("0")
    parts = [(3, 4), (2, per_epoch + 3), (5, None)]
    for part, (world_size, kill_at) in enumerate(parts):
        run(tmp_path, lanes, part, world_size, int((tmp_path / "done").read_text()), 2 * per_epoch, kill_at)

    taken: dict[int, list[str]] = {}
    for part, (world_size, _) in enumerate(parts):
        steps: dict[int, list[str]] = {}
        ranks: Counter[int] = Counter()
        for rank in range(world_size):
            for line in (tmp_path / f"log-{part}-{rank}.jsonl").read_text().splitlines():
                entry = json.loads(line)
                steps.setdefault(entry["step"], []).extend(entry["keys"])
                ranks[entry["step"]] += 1
                assert entry["global"] == min(G, SAMPLES - entry["step"] % per_epoch * G)
        for step, keys in steps.items():
            # A step that the kill interrupted is whole only after the restart. A repeated step has the same samples.
            if ranks[step] == world_size:
                assert taken.setdefault(step, keys) == keys
    assert sorted(taken) == list(range(2 * per_epoch))
    alone = Shards(tmp_path / "train", "none", Crops(16, 0.5, 0))
    for epoch in range(2):
        keys = [key for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for key in taken[step]]
        assert Counter(keys) == Counter(alone.index.keys(list(range(SAMPLES))))
    # The samples are those of one process without loader processes.
    stream = train_batches(alone, 7, G, 0, 0, 1, window=2, lanes=lanes)
    for step, batch in zip(range(2 * per_epoch), stream, strict=False):
        assert taken[step] == [key for key, w in zip(batch["key"], batch["weight"], strict=True) if w]
    assert not torch.distributed.is_initialized()
