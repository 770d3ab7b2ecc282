"""Benchmark a whole training step by part and by operator; `make bench` runs it and keeps a trace."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from deepskip import kernels
from deepskip.allocator import keep_freed_memory
from deepskip.config import Config
from deepskip.kernels.bench import measure
from deepskip.training_step import Batch, DataInfo, TrainingStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (32, 3, 512, 512) if DEVICE.type == "cuda" else (8, 3, 128, 128)
ROUNDS = 30


class Step:
    """The trainer's step in parts, each a function to be timed; for a GPU the batch is in pinned memory."""

    def __init__(self) -> None:
        N, bands, *_ = SIZE
        data = DataInfo(bands, 1, 255, [127.0] * bands, [70.0] * bands, {})
        self.training = TrainingStep(Config(), data, DEVICE)
        self.training.distribute()
        image = torch.randint(0, 255, SIZE, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        mask = (torch.rand(N, *SIZE[2:]) < 0.1).to(torch.uint8)
        mean, std = (torch.full((N, bands), value) for value in (127.0, 70.0))
        tensors = {"image": image, "mask": mask, "mean": mean, "std": std, "weight": torch.ones(N)}
        self.host = {name: x.pin_memory() if DEVICE.type == "cuda" else x for name, x in tensors.items()}
        self.numbers = {"epoch": [0] * N, "sample": list(range(N)), "key": [str(number) for number in range(N)]}

    def copy(self) -> None:
        """Copy the batch to the device."""
        tensors = {name: x.to(DEVICE, non_blocking=True) for name, x in self.host.items()}
        self.weight, self.batch = tensors["weight"], cast(Batch, tensors | self.numbers)

    def prepare(self) -> None:
        """Normalise and augment the batch."""
        self.image, self.mask = self.training.prepare(self.batch)

    def forward(self) -> None:
        """Run the network."""
        self.logits = self.training.forward(self.image)

    def loss(self) -> None:
        """Compute the loss."""
        self.losses = self.training.criterion.parts(self.logits, self.mask, self.weight)

    def backward(self) -> None:
        """Compute every gradient."""
        self.training.backward(self.losses)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Return the parts by name, in order."""
        return {
            "copy to the device": self.copy, "normalise and augment": self.prepare, "forward": self.forward,
            "loss": self.loss, "backward": self.backward, "clip": self.training.clip,
            "optimizer (Muon)": self.training.update, "moving average": self.training.average,
        }  # fmt: skip


def test_step(benchmark: Any) -> None:
    """Time the parts of a step and its operators, and compute its utilisation of the device."""
    if DEVICE.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    step = Step()
    parts = step.parts()
    whole = measure.in_turns(parts, ROUNDS, DEVICE)
    total = sum(whole.values())

    def network() -> None:
        step.forward()
        step.loss()
        step.backward()

    # Count the operations of the plain form, which are those of the equations.
    kernels.backend.choose("reference")
    with FlopCounterMode(display=False) as counter:
        network()
    kernels.backend.choose("auto")
    operations = counter.get_total_flops()
    peak = measure.peak_rate(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    size = "x".join(map(str, SIZE))
    dtype = "float32" if DEVICE.type == "cpu" else "bfloat16 autocast"
    rows: list[dict[str, Any]] = [
        {"size": f"{size}, by part", "implementation": name, "dtype": dtype, "seconds": took, "share": took / total}
        for name, took in whole.items()
    ]
    rows += [
        {
            "size": f"{size}, forward, loss and backward by operator", "implementation": name, "dtype": dtype,
            "seconds": took, "share": took / total, "calls": calls,
        }
        for name, took, calls in measure.operator_seconds(network, DEVICE)
    ]  # fmt: skip
    took = whole["forward"] + whole["backward"]
    rows.append(
        {
            "size": f"{size}, operations", "implementation": "forward and backward", "dtype": dtype, "seconds": took,
            "operations": operations, "rate": operations / took, "peak": peak, "utilisation": operations / took / peak,
        }
    )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".json.gz", delete=False) as file:
        trace = Path(file.name)
    measure.trace(network, DEVICE, trace)
    benchmark.extra_info |= {"suite": "step", "rows": rows, "trace": str(trace)}
    benchmark.pedantic(network, rounds=3)
