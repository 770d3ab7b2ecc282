"""Benchmark what a checkpoint costs the steps around it, written in the background or in the step (`make bench`)."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepskip import checkpoint
from deepskip.allocator import keep_freed_memory
from deepskip.checkpoint_writer import CheckpointWriter
from deepskip.config import Config
from deepskip.kernels.bench import measure
from deepskip.training_step import Batch, DataInfo, TrainingStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (32, 3, 512, 512) if DEVICE.type == "cuda" else (8, 3, 128, 128)
ROUNDS = 18
# Steps from one checkpoint to the next. The steps' time includes what the thread takes from them.
STEPS = 3


def test_checkpoint(benchmark: Any, tmp_path: Path) -> None:
    """Time blocks of steps without a checkpoint, with one in the background, and with one in the step."""
    if DEVICE.type == "cpu":
        keep_freed_memory()
    config = Config()
    training = TrainingStep(config, DataInfo(3, 1, 255, [0.0] * 3, [1.0] * 3, {}), DEVICE)
    training.distribute()
    N = SIZE[0]
    batch: Batch = {
        "image": torch.randn(SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last),
        "mask": (torch.rand(N, *SIZE[2:], device=DEVICE) < 0.1).to(torch.uint8),
        "mean": torch.zeros(N, 3, device=DEVICE), "std": torch.ones(N, 3, device=DEVICE),
        "weight": torch.ones(N, device=DEVICE), "epoch": [0] * N, "sample": list(range(N)),
        "key": [str(number) for number in range(N)],
    }  # fmt: skip

    def step() -> None:
        training(batch)

    def save_in_step() -> None:
        checkpoint.save(training.state_dict(), checkpoint.step_path(tmp_path, 2))

    def save_in_background() -> None:
        writer.save(training.state_dict())

    waits: dict[str, list[float]] = {}

    def block(name: str, save: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            step()
            measure.wait(DEVICE)
            started = time.perf_counter()
            save()
            waits.setdefault(name, []).append(time.perf_counter() - started)
            for _ in range(STEPS - 1):
                step()
            # The next block must not include work of this one.
            measure.wait(DEVICE)

        return run

    calls = {
        "no checkpoint": block("no checkpoint", lambda: None),
        "deepskip": block("deepskip", save_in_background),
        "in the step": block("in the step", save_in_step),
    }
    with CheckpointWriter(tmp_path, config.run.keep_checkpoints) as writer:
        times: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        host = {name: measure.host_seconds(call, DEVICE) for name, call in calls.items()}
        for turn in range(ROUNDS + 3):
            # Each is first, second and last equally often, so that a slow phase of the machine affects all of them.
            for name in names[turn % 3 :] + names[: turn % 3]:
                times[name].append(measure.seconds(calls[name], DEVICE, host[name]))
        seconds = {name: values[3:] for name, values in times.items()}
        alone = statistics.median(seconds["no checkpoint"])
        added = {
            name: statistics.median(a - b for a, b in zip(values, seconds["no checkpoint"], strict=True))
            for name, values in seconds.items()
        }
        size = max(path.stat().st_size for path in (tmp_path / checkpoint.FOLDER).iterdir())
        rows = [
            {
                "size": "x".join(map(str, SIZE)), "implementation": name,
                "dtype": "float32" if DEVICE.type == "cpu" else "bfloat16 autocast",
                "bytes": size if name != "no checkpoint" else 0,
                "step": alone / STEPS, "wait": statistics.median(waits[name][4:]),
                "wait_90": statistics.quantiles(waits[name][4:], n=10)[-1],
                "of_a_step": statistics.median(waits[name][4:]) / (alone / STEPS),
                "added": added[name], "added_of_a_step": added[name] / (alone / STEPS),
            }
            for name in calls
        ]  # fmt: skip
        benchmark.extra_info |= {"suite": "checkpoint", "rows": rows}
        benchmark.pedantic(save_in_background, rounds=3)
