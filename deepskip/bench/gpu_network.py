"""Benchmark training and inference on a GPU against other networks, launched by the host and as a CUDA graph.

It is a part of `kernels.bench.gpu`, which starts it: python -m deepskip.bench.gpu_network --out DIR.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from deepskip import BCEDiceLoss, DeepSkipUNet
from deepskip.kernels import backend
from deepskip.kernels.bench import measure
from deepskip.kernels.bench.gpu_part import Job, Phase, Row, Run, arguments_of, run_phases, timed

SIZE, TOY = (32, 3, 512, 512), (2, 3, 8, 8)
SMALL = {"base_channels": 4, "levels": 3}


def monai_unet(**options: Any) -> nn.Module:
    """Build MONAI's U-Net, which is not installed on every machine."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(2, 3, 1)


def compiled(compile_options: dict[str, Any], **options: Any) -> nn.Module:
    """Build the network with torch.compile."""
    torch._dynamo.reset()
    network = DeepSkipUNet(3, 1, **options)
    network.compile(dynamic=False, **compile_options)
    return network


def networks(compile_options: dict[str, Any]) -> dict[str, tuple[Callable[..., nn.Module], str]]:
    """Return the function that builds each contender, and its kernels; the slowest to compile is last."""
    return {
        "deepskip": (partial(DeepSkipUNet, 3, 1), "triton"),
        "deepskip, next": (partial(DeepSkipUNet, 3, 1), "next"),
        "plain": (partial(DeepSkipUNet, 3, 1), "reference"),
        "without deep skips": (partial(DeepSkipUNet, 3, 1, deep_skips=False), "triton"),
        "MONAI BasicUNet": (monai_unet, "triton"),
        "plain, torch.compile": (partial(compiled, compile_options), "reference"),
    }


def calls_of(network: nn.Module, image: Tensor, mask: Tensor, kind: str) -> dict[str, Callable[[], Any]]:
    """Return a training step and an inference of a network as functions.

    A training step is forward, loss and backward, without the optimizer.

    Args:
        network: network on the image's device.
        image: images (N, bands, H, W).
        mask: labels (N, H, W).
        kind: backend of the network's kernels; the loss is always Triton's.
    """
    loss = BCEDiceLoss()
    device = image.device.type

    def train() -> None:
        network.zero_grad(set_to_none=True)
        with backend.chosen(kind), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = network(image)
        # DeepSkip's loss is used for every network.
        with backend.chosen("triton"):
            loss(logits, mask).backward()

    def predict() -> Tensor:
        with backend.chosen(kind), torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return network(image)

    return {"training step": train, "inference": predict}


def network_times(run: Run, make: Callable[..., nn.Module], kind: str) -> list[Row]:
    """Time a network's training step and inference, launched by the host with all work queued, and as a CUDA graph.

    Args:
        run: the benchmark's run.
        make: builds the network.
        kind: backend of its kernels.

    Returns:
        A row for each measurement; of a graph that fails, with the error.
    """
    cuda = run.device.type == "cuda"
    size = SIZE if cuda else TOY
    network = make(**({} if cuda else SMALL)).to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.randn(size, device=run.device).contiguous(memory_format=torch.channels_last)
    mask = (torch.rand(size[0], *size[2:], device=run.device) < 0.1).to(torch.uint8)
    found = []
    for what, call in calls_of(network, image, mask, kind).items():
        network.train(what == "training step")
        row: Row = {
            "size": "x".join(map(str, size)), "operator": what, "parameters": sum(p.numel() for p in network.parameters()),
            "peak_bytes": measure.peak_bytes(call, run.device),
        }  # fmt: skip
        found.append(row | {"graphed": False} | timed(run, {"": call}))
        if cuda:
            try:
                found.append(row | {"graphed": True} | timed(run, {"": measure.graphed(call)}))
            except RuntimeError as error:
                found.append(row | {"graphed": True, "failed": str(error)[:300]})
    return found


def network_rows(run: Run) -> Iterator[Job]:
    """Yield a job for every contender: none if an operator is wrong, and no new launches if one of those is wrong."""
    cuda = run.device.type == "cuda"
    new = {name for name in run.wrong if name.endswith(", next")}
    if run.wrong - new:
        return
    for name, (make, kind) in networks(run.compile_options).items():
        # Interpreted, the new launches of a whole step take minutes; the gate rehearses them one by one.
        if kind == "next" and (new or not cuda):
            continue
        if name == "MONAI BasicUNet" and (find_spec("monai") is None or not cuda):
            # At toy size it has no pixels left at its deepest level.
            continue
        row = {"suite": "network", "implementation": name, "dtype": "bfloat16 autocast" if cuda else "float32"}
        yield row, partial(network_times, run, make, kind)


PHASES: dict[str, Phase] = {"network": network_rows}


def main() -> None:
    """Run the phase."""
    arguments = arguments_of("python -m deepskip.bench.gpu_network", list(PHASES), __doc__)
    run_phases(PHASES, arguments.phases, arguments.out, arguments.until)


if __name__ == "__main__":
    main()
