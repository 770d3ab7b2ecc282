"""The network's training step and inference on a GPU beside others, each launched by the host and as a CUDA graph.

A part of `kernels.bench.gpu`, which starts it: python -m deepskip.bench.gpu_network --out DIR.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels.bench import gpu_phases

# isort: split
# after gpu_phases, which asks for Triton's interpreter where there is no GPU
from deepskip import BCEDiceLoss, DeepSkipUNet
from kernels import backend
from kernels.bench import measure

SIZE, TOY = (32, 3, 512, 512), (2, 3, 8, 8)
SMALL = {"base_channels": 4, "levels": 3}


def networks(compile_options: dict[str, Any], **options: Any) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield each contender, on the CPU: its name, the network, and its kernels; those not installed are left out."""
    yield "deepskip", DeepSkipUNet(3, 1, **options), "auto"
    yield "plain", DeepSkipUNet(3, 1, **options), "reference"
    plain = DeepSkipUNet(3, 1, **options)
    torch._dynamo.reset()
    plain.compile(dynamic=False, **compile_options)
    yield "plain, torch.compile", plain, "reference"
    yield "without deep skips", DeepSkipUNet(3, 1, deep_skips=False, **options), "auto"
    if options:
        # at toy size it has no pixels left at its deepest level
        return
    try:
        from monai.networks.nets import BasicUNet
    except ImportError:
        return
    yield "MONAI BasicUNet", BasicUNet(2, 3, 1), "auto"


def calls_of(network: nn.Module, image: Tensor, mask: Tensor, kind: str, ours: str) -> dict[str, Callable[[], Any]]:
    """Return what trains and what predicts; a training step is forward, loss and backward, without the optimizer."""
    loss = BCEDiceLoss()
    device = image.device.type

    def train() -> None:
        network.zero_grad(set_to_none=True)
        with backend.chosen(kind), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = network(image)
        # the loss is ours for all of them
        with backend.chosen(ours):
            loss(logits, mask).backward()

    def predict() -> Tensor:
        with backend.chosen(kind), torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return network(image)

    return {"training step": train, "inference": predict}


def network_rows(run: gpu_phases.Run) -> Iterator[dict[str, Any]]:
    """Time every contender, one after the other: launched by the host with all work lying ready, and as a graph."""
    cuda = run.device.type == "cuda"
    size = SIZE if cuda else TOY
    ours = "auto" if cuda else "triton"
    image = torch.randn(size, device=run.device).contiguous(memory_format=torch.channels_last)
    mask = (torch.rand(size[0], *size[2:], device=run.device) < 0.1).to(torch.uint8)
    for name, network, kind in networks(run.compile_options, **({} if cuda else SMALL)):
        network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for what, call in calls_of(network, image, mask, ours if kind == "auto" else kind, ours).items():
            network.train(what == "training step")
            row = {
                "suite": "network", "size": "x".join(map(str, size)), "implementation": name, "operator": what,
                "dtype": "bfloat16 autocast" if cuda else "float32",
                "parameters": sum(p.numel() for p in network.parameters()),
                "peak_bytes": measure.peak_bytes(call, run.device),
            }  # fmt: skip
            yield gpu_phases.timed(run, row | {"graphed": False}, {"": call})
            if cuda:
                yield gpu_phases.timed(run, row | {"graphed": True}, {"": measure.graphed(call)})
        network.to("cpu")


PHASES = {"network": network_rows}


def main() -> None:
    """Run the phase."""
    arguments = gpu_phases.arguments_of("python -m deepskip.bench.gpu_network", list(PHASES), __doc__)
    gpu_phases.run_phases(PHASES, arguments.phases, arguments.out, arguments.until)


if __name__ == "__main__":
    main()
