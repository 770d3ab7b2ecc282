"""Where a whole training step goes, part by part and operator by operator; `make bench` runs it and keeps a trace."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from deepskip import BCEDiceLoss, DeepSkipUNet
from deepskip.allocator import keep_freed_memory
from deepskip.config import AugmentConfig, OptimConfig
from deepskip.inference import normalize
from deepskip.optimizer import build_optimizer
from kernels.bench import measure

try:
    from deepskip import augment
except ImportError:
    # kornia is not on every machine with a gpu
    augment = None  # type: ignore[assignment]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (32, 3, 512, 512) if DEVICE.type == "cuda" else (8, 3, 128, 128)
ROUNDS = 30


class Step:
    """A training step of the trainer in parts, each a function to be timed; the batch lies in pinned memory for a GPU."""

    def __init__(self) -> None:
        N, bands, *_ = SIZE
        self.network = DeepSkipUNet(bands, 1).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(OptimConfig(), self.network)
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
        self.loss_of = BCEDiceLoss()
        image = torch.randint(0, 255, SIZE, dtype=torch.uint8)
        mask = (torch.rand(N, *SIZE[2:]) < 0.1).to(torch.uint8)
        self.host = [x.pin_memory() if DEVICE.type == "cuda" else x for x in (image, mask)]
        self.mean, self.std = (torch.full((N, bands), value, device=DEVICE) for value in (127.0, 70.0))

    def copy(self) -> None:
        """Brings the batch to the device."""
        self.image, self.mask = (x.to(DEVICE, non_blocking=True) for x in self.host)

    def prepare(self) -> None:
        """Normalises it, and augments it where kornia is installed."""
        image, self.labels = normalize(self.image, self.mean, self.std), self.mask.long()
        if augment is not None:
            draws = augment.draw(AugmentConfig(), 0, [0] * SIZE[0], list(range(SIZE[0])), SIZE[1])
            image, self.labels = augment.augment(AugmentConfig(), draws, image, self.labels, 255)
        self.x = image.contiguous(memory_format=torch.channels_last)

    def forward(self) -> None:
        """Runs the network."""
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            self.logits = self.network(self.x)

    def loss(self) -> None:
        """Makes the loss."""
        self.value = self.loss_of(self.logits, self.labels)

    def backward(self) -> None:
        """Gives every gradient."""
        self.value.backward()

    def clip(self) -> None:
        """Bounds the gradient's norm."""
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)

    def optimize(self) -> None:
        """Moves the weights."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def average(self) -> None:
        """Moves their average."""
        self.ema.update_parameters(self.network)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Gives the parts in order."""
        return {
            "copy to the device": self.copy, "normalise and augment": self.prepare, "forward": self.forward,
            "loss": self.loss, "backward": self.backward, "clip": self.clip, "optimizer (Muon)": self.optimize,
            "moving average": self.average,
        }  # fmt: skip


def test_step(benchmark: Any) -> None:
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

    # what the equations ask for, not what a form of them happens to do: the plain form's operations
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
