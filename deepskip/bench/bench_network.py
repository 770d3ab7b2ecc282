"""Benchmark the whole network, training and inference, against its plain form and other libraries (`make bench`)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepskip import BCEDiceLoss, DeepSkipUNet, kernels
from deepskip.allocator import keep_freed_memory
from deepskip.kernels.bench import measure

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (32, 3, 512, 512) if DEVICE.type == "cuda" else (8, 3, 128, 128)
ROUNDS = 30 if DEVICE.type == "cuda" else 12


def networks() -> dict[str, tuple[nn.Module, str, torch.memory_format]]:
    """Build every network, with its kernels and memory layout; libraries that are not installed are skipped."""
    last, first = torch.channels_last, torch.contiguous_format
    made: dict[str, tuple[nn.Module, str, torch.memory_format]] = {
        "deepskip": (DeepSkipUNet(3, 1), "auto", last),
        "plain, channels last": (DeepSkipUNet(3, 1), "reference", last),
        "plain, contiguous": (DeepSkipUNet(3, 1), "reference", first),
        "plain, torch.compile": (torch.compile(DeepSkipUNet(3, 1)), "reference", last),  # type: ignore[dict-item]
    }
    try:
        from monai.networks.nets import BasicUNet

        made["MONAI BasicUNet, widths 8 to 128"] = (BasicUNet(2, 3, 1, features=(8, 16, 32, 64, 128, 8)), "auto", last)
        made["MONAI BasicUNet"] = (BasicUNet(2, 3, 1), "auto", last)
        import segmentation_models_pytorch as smp

        made["smp U-Net, ResNet-18"] = (smp.Unet("resnet18", encoder_weights=None), "auto", last)
    except ImportError:
        pass
    if DEVICE.type == "cuda":
        # CUDA graphs exclude the host's launch overhead. A search of kernels (max-autotune) did not finish in 230 s.
        for name in ("deepskip", "plain, channels last", "MONAI BasicUNet"):
            if name in made:
                network, kind, form = made[name]
                compiled = torch.compile(copy.deepcopy(network), mode="reduce-overhead")
                made[f"{name}, CUDA graphs"] = (compiled, kind, form)  # type: ignore[assignment]
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
    for network, _, form in made.values():
        network.to(DEVICE, memory_format=form)  # type: ignore[call-overload]

    def run(name: str, training: bool) -> Tensor:
        network, kind, form = made[name]
        x = image.contiguous(memory_format=form)
        network.train(training)
        kernels.backend.choose(kind)
        with (
            torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"),
            torch.set_grad_enabled(training),
        ):
            logits = network(x)
        kernels.backend.choose("auto")
        if training:
            network.zero_grad()
            criterion(logits, mask).backward()
        return logits

    def call(name: str, training: bool) -> Callable[[], Tensor]:
        return lambda: run(name, training)

    with torch.no_grad():
        made["plain, channels last"][0].load_state_dict(made["deepskip"][0].state_dict())
    plain, ours = run("plain, channels last", False), run("deepskip", False)
    assert (plain - ours).norm() <= (1e-5 if DEVICE.type == "cpu" else 2e-2) * plain.norm()
    inference = measure.in_turns({name: call(name, False) for name in made}, ROUNDS, DEVICE)
    train = measure.in_turns({name: call(name, True) for name in made}, ROUNDS, DEVICE)
    rows = [
        {
            "size": "x".join(map(str, SIZE)), "implementation": name,
            "dtype": "float32" if DEVICE.type == "cpu" else "bfloat16 autocast",
            "parameters": sum(p.numel() for p in network.parameters()),
            "train": SIZE[0] / train[name], "train_ratio": train[name] / train["deepskip"],
            "inference": SIZE[0] / inference[name], "inference_ratio": inference[name] / inference["deepskip"],
            "peak_bytes": measure.peak_bytes(call(name, True), DEVICE),
        }
        for name, (network, *_) in made.items()
    ]  # fmt: skip
    benchmark.extra_info |= {"suite": "network", "rows": rows}
    benchmark.pedantic(call("deepskip", True), rounds=3)
