"""Operators that a training step starts, phase by phase, counted on a CPU: python -m deepskip.bench.step_launches.

Each operator that computes something is a launch or more on a GPU, and host time there. Views and new memory are omitted.
Foreach operators count as one, as on a GPU, where they are the default. A wait is an operator that reads a number off the
device. Copies to the device are no operators here, so they are not in it.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepskip import augment
from deepskip.config import AugmentConfig, Config
from deepskip.training_step import Batch, DataInfo, TrainingStep, overlap_counts

# of the batch; the counts do not hang on it
SIZE = (4, 3, 64, 64)
# reads a number off the device, and waits for it
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh",
           "_unsafe_view", "_record_function_enter_new", "_record_function_exit")  # fmt: skip


class Counted(NamedTuple):
    """The operators of a phase by name, and how many of them wait for the device."""

    operators: Counter[str]
    waits: int


class Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if not func.is_view and name not in NOTHING:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def make_batch(config: Config, step: int) -> Batch:
    """Make a batch as the loader does, of random pixels."""
    N, bands, H, W = SIZE
    samples = [step * N + i for i in range(N)]
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 255, SIZE, dtype=torch.uint8, generator=generator)
    return {
        "image": image.contiguous(memory_format=torch.channels_last),
        "mask": (torch.rand(N, H, W, generator=generator) < 0.1).to(torch.uint8),
        "mean": torch.full((N, bands), 127.0), "std": torch.full((N, bands), 70.0), "weight": torch.ones(N),
        "padded": False, "epoch": [0] * N, "sample": samples, "key": [str(sample) for sample in samples],
        **augment.loader_entries(config.augment, config.run.seed, bands, [0] * N, samples),
    }  # fmt: skip


def phases(training: TrainingStep, batch: Batch) -> dict[str, Callable[[], None]]:
    """Return the parts of a step in order, as `TrainingStep.__call__` runs them."""
    kept: dict[str, Any] = {}

    def prepare() -> None:
        kept["image"], kept["mask"] = training.prepare(batch)

    def forward() -> None:
        kept["logits"] = training.forward(kept["image"])

    def loss() -> None:
        kept["parts"] = training.criterion.parts(kept["logits"], kept["mask"], batch["weight"])

    def backward() -> None:
        training.backward(kept["parts"])

    def overlap() -> None:
        logits: Tensor = kept["logits"].detach()
        overlap_counts(logits, kept["mask"], batch["weight"], training.data.ignore_index)

    def average() -> None:
        training.average()
        training.step += 1

    return {
        "normalise and augment": prepare, "forward": forward, "loss": loss, "backward": backward, "overlap": overlap,
        "clip": training.clip, "optimizer": training.update, "moving average": average,
    }  # fmt: skip


def count(config: Config) -> dict[str, Counted]:
    """Count the third step of a training: the first two make the optimizer's state and begin the moving average."""
    bands = SIZE[1]
    training = TrainingStep(config, DataInfo(bands, 1, 255, [0.0] * bands, [1.0] * bands, {}), torch.device("cpu"))
    found: dict[str, Counted] = {}
    # torch takes its foreach operators by default where it holds that a device has them
    with mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", return_value=["cpu"]):
        for step in range(3):
            for name, work in phases(training, make_batch(config, step)).items():
                with Operators() as operators:
                    work()
                waits = sum(operators.seen[one] for one in WAITS)
                found[name] = Counted(operators.seen, waits)
    return found


def configs() -> dict[str, Config]:
    """Return what is counted: the settings as they come, with every augmentation, and with AdamW."""
    everything, adamw = Config(), Config()
    everything.augment = AugmentConfig(rotate=15, scale=0.2, brightness=0.1, contrast=0.1, band_shift=0.1)
    adamw.optim.optimizer = "adamw"
    return {"default": Config(), "every augmentation": everything, "AdamW": adamw}


def table(found: dict[str, dict[str, Counted]]) -> str:
    """Make a Markdown table: operators, and waits in brackets where there are some; a column a config."""
    lines = ["| operators a step | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    for phase in next(iter(found.values())):
        cells = [mine[phase] for mine in found.values()]
        texts = [f"{sum(c.operators.values())}" + (f" ({c.waits} waits)" if c.waits else "") for c in cells]
        lines.append(f"| {phase} | " + " | ".join(texts) + " |")
    totals = [str(sum(sum(c.operators.values()) for c in mine.values())) for mine in found.values()]
    return "\n".join([*lines, "| all | " + " | ".join(totals) + " |"])


def main() -> None:
    """Print the table, and write the operators by name."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.bench.step_launches", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the operators of each phase there")
    arguments = parser.parse_args()
    found = {name: count(config) for name, config in configs().items()}
    if arguments.json:
        rows = {name: {phase: c.operators for phase, c in mine.items()} for name, mine in found.items()}
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
