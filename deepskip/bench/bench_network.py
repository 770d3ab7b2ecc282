"""Benchmark the whole network, training and inference, against its plain form and other libraries (`make bench`)."""

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepskip import BCEDiceLoss, DeepSkipUNet, kernels
from deepskip.allocator import keep_freed_memory
from deepskip.kernels.bench import measure
from deepskip.precision import autocast, multiplies_bf16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (32, 3, 512, 512) if DEVICE.type == "cuda" else (8, 3, 128, 128)
ROUNDS = 30 if DEVICE.type == "cuda" else 12


class Contender(NamedTuple):
    """A network that is timed.

    Attributes:
        network: the network.
        kernels: its run.kernels.
        layout: memory layout of its images and weights.
        precision: torch.float32, or torch.bfloat16 for autocast.
    """

    network: nn.Module
    kernels: str = "auto"
    layout: torch.memory_format = torch.channels_last
    precision: torch.dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def networks() -> dict[str, Contender]:
    """Build every contender; libraries that are not installed are skipped."""
    made = {
        "deepskip": Contender(DeepSkipUNet(3, 1)),
        "plain, channels last": Contender(DeepSkipUNet(3, 1), "reference"),
        "plain, contiguous": Contender(DeepSkipUNet(3, 1), "reference", torch.contiguous_format),
        "without deep skips": Contender(DeepSkipUNet(3, 1, deep_skips=False)),
    }
    # The compiler does not know this limit: its code for wider vectors crashes with operators for narrower ones.
    if "ATEN_CPU_CAPABILITY" not in os.environ:
        made["plain, torch.compile"] = Contender(torch.compile(DeepSkipUNet(3, 1)), "reference")  # type: ignore[arg-type]
    try:
        from monai.networks.nets import BasicUNet

        made["MONAI BasicUNet, widths 8 to 128"] = Contender(BasicUNet(2, 3, 1, features=(8, 16, 32, 64, 128, 8)))
        made["MONAI BasicUNet"] = Contender(BasicUNet(2, 3, 1))
        import segmentation_models_pytorch as smp

        made["smp U-Net, ResNet-18"] = Contender(smp.Unet("resnet18", encoder_weights=None))
    except ImportError:
        pass
    if DEVICE.type == "cuda":
        # CUDA graphs exclude the host's launch overhead. A search of kernels (max-autotune) did not finish in 230 s.
        for name in ("deepskip", "plain, channels last", "MONAI BasicUNet"):
            if name in made:
                compiled = torch.compile(copy.deepcopy(made[name].network), mode="reduce-overhead")
                made[f"{name}, CUDA graphs"] = made[name]._replace(network=compiled)  # type: ignore[arg-type]
    elif multiplies_bf16(DEVICE):
        for name in ("deepskip", "plain, channels last", "without deep skips", "MONAI BasicUNet, widths 8 to 128"):
            if name in made:
                copied = copy.deepcopy(made[name].network)
                made[f"{name}, bf16"] = made[name]._replace(network=copied, precision=torch.bfloat16)
    return made


def test_network(benchmark: Any) -> None:
    """Time training and inference of every network alternately, after checking DeepSkip against its plain form."""
    if DEVICE.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    image = torch.randn(SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    mask = (torch.rand(SIZE[0], *SIZE[2:], device=DEVICE) < 0.1).to(torch.uint8)
    criterion = BCEDiceLoss()
    made = networks()
    for each in made.values():
        each.network.to(DEVICE, memory_format=each.layout)  # type: ignore[call-overload]

    def run(name: str, training: bool) -> Tensor:
        each = made[name]
        x = image.contiguous(memory_format=each.layout)
        each.network.train(training)
        kernels.backend.choose(each.kernels)
        with autocast(DEVICE, each.precision), torch.set_grad_enabled(training):
            logits = each.network(x)
        kernels.backend.choose("auto")
        if training:
            each.network.zero_grad()
            criterion(logits, mask).backward()
        return logits

    def call(name: str, training: bool) -> Callable[[], Tensor]:
        return lambda: run(name, training)

    with torch.no_grad():
        made["plain, channels last"].network.load_state_dict(made["deepskip"].network.state_dict())
    plain, ours = run("plain, channels last", False), run("deepskip", False)
    assert (plain - ours).norm() <= (1e-5 if DEVICE.type == "cpu" else 2e-2) * plain.norm()
    inference = measure.in_turns({name: call(name, False) for name in made}, ROUNDS, DEVICE)
    train = measure.in_turns({name: call(name, True) for name in made}, ROUNDS, DEVICE)
    rows = [
        {
            "size": "x".join(map(str, SIZE)), "implementation": name,
            "dtype": "bfloat16 autocast" if each.precision == torch.bfloat16 else "float32",
            "parameters": sum(p.numel() for p in each.network.parameters()),
            "train": SIZE[0] / train[name], "train_ratio": train[name] / train["deepskip"],
            "inference": SIZE[0] / inference[name], "inference_ratio": inference[name] / inference["deepskip"],
            "peak_bytes": measure.peak_bytes(call(name, True), DEVICE),
        }
        for name, each in made.items()
    ]  # fmt: skip
    benchmark.extra_info |= {"suite": "network", "rows": rows}
    benchmark.pedantic(call("deepskip", True), rounds=3)
