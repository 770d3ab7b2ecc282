"""What a checkpoint costs the steps around it, written in the background or in the step; `make bench` runs it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deepskip import BCEDiceLoss, DeepSkipUNet, checkpoint
from deepskip.allocator import keep_freed_memory
from deepskip.checkpoint_writer import CheckpointWriter
from deepskip.config import Config
from deepskip.optimizer import build_optimizer
from kernels.bench import measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (32, 3, 512, 512) if DEVICE.type == "cuda" else (8, 3, 128, 128)
ROUNDS = 18
# steps from one checkpoint to the next: what the thread takes from the steps after it is in their time
STEPS = 3


def test_checkpoint(benchmark: Any, tmp_path: Path) -> None:
    if DEVICE.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    config = Config()
    network = DeepSkipUNet(3, 1).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(config.optim, network)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    image = torch.randn(SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    mask = (torch.rand(SIZE[0], *SIZE[2:], device=DEVICE) < 0.1).to(torch.uint8)
    loss_of = BCEDiceLoss()

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            logits = network(image)
        loss_of(logits, mask).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(network)

    def state() -> checkpoint.State:
        return {
            "config": asdict(config), "model": network.state_dict(), "ema": ema.module.state_dict(),
            "optimizer": optimizer.state_dict(), "step": 1,
        }  # fmt: skip

    def save_in_step() -> None:
        checkpoint.save(state(), checkpoint.step_path(tmp_path, 2))

    def save_in_background() -> None:
        writer.save(state())

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
            # the next block must not pay for this one
            measure.wait(DEVICE)

        return run

    calls = {
        "no checkpoint": block("no checkpoint", lambda: None),
        "deepskip": block("deepskip", save_in_background),
        "in the step": block("in the step", save_in_step),
    }
    with CheckpointWriter(tmp_path, config.run.keep_checkpoints) as writer:
        times: dict[str, list[float]] = {name: [] for name in calls}
        timers = {name: measure.timer(call, DEVICE) for name, call in calls.items()}
        names = list(calls)
        for turn in range(ROUNDS):
            # each goes first, second and last as often: what a slow spell of the machine takes, it takes from all
            for name in names[turn % 3 :] + names[: turn % 3]:
                times[name].append(timers[name]())
        seconds = times
        alone = statistics.median(seconds["no checkpoint"])
        added = {
            name: statistics.median(a - b for a, b in zip(values, seconds["no checkpoint"], strict=True))
            for name, values in seconds.items()
        }
        size = checkpoint.step_path(tmp_path, 1).stat().st_size
        rows = [
            {
                "size": "x".join(map(str, SIZE)), "implementation": name,
                "dtype": "float32" if DEVICE.type == "cpu" else "bfloat16 autocast",
                "bytes": size if name != "no checkpoint" else 0,
                "step": alone / STEPS, "wait": statistics.median(waits[name][3:]),
                "wait_90": statistics.quantiles(waits[name][3:], n=10)[-1],
                "of_a_step": statistics.median(waits[name][3:]) / (alone / STEPS),
                "added": added[name], "added_of_a_step": added[name] / (alone / STEPS),
            }
            for name in calls
        ]  # fmt: skip
        benchmark.extra_info |= {"suite": "checkpoint", "rows": rows}
        benchmark.pedantic(save_in_background, rounds=3)
