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
ROUNDS = 20
# steps from one checkpoint to the next: what the thread takes from the steps after it is in their time
STEPS = 5


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
        seconds = measure.in_turns(calls, ROUNDS, DEVICE)
        alone = seconds["no checkpoint"]
        size = checkpoint.step_path(tmp_path, 1).stat().st_size
        rows = [
            {
                "size": "x".join(map(str, SIZE)), "implementation": name,
                "dtype": "float32" if DEVICE.type == "cpu" else "bfloat16 autocast",
                "bytes": size if name != "no checkpoint" else 0,
                "step": alone / STEPS, "wait": statistics.median(waits[name][3:]),
                "wait_90": statistics.quantiles(waits[name][3:], n=10)[-1],
                "of_a_step": statistics.median(waits[name][3:]) / (alone / STEPS),
                "added": seconds[name] - alone, "added_of_a_step": (seconds[name] - alone) / (alone / STEPS),
            }
            for name in calls
        ]  # fmt: skip
        benchmark.extra_info |= {"suite": "checkpoint", "rows": rows}
        benchmark.pedantic(save_in_background, rounds=3)
