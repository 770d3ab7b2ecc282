"""Count the bytes that a training step moves, launch by launch, without a GPU: python -m deepskip.bench.step_bytes.

The network's forward pass, its loss and its backward pass run on torch's meta device in bf16 autocast and channels
last, as on a GPU. Each launch counts what it reads and writes (`kernels.bench.traffic`). A level's bytes are those of
its encoder and decoder block. Pooling, and the loss with its sums of gradients, are listed separately. The optimizer,
the moving average and the augmentation are not included.
"""

import argparse
import json
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from deepskip import BCEDiceLoss, DeepSkipUNet, kernels
from deepskip.kernels import conv3_triton, subpixel
from deepskip.kernels.bench.counts import CARDS
from deepskip.kernels.bench.launches import meta
from deepskip.kernels.bench.traffic import Autocast, Moved, Traffic

SIZE = (32, 3, 512, 512)


def level_modules(network: DeepSkipUNet) -> dict[str, nn.Module]:
    """Return the modules of each level by name; the head belongs to level 1."""
    found: dict[str, nn.Module] = {"level 1, head": network.head}
    for kind, levels in (("encoder", network.encoder), ("decoder", network.decoder)):
        found |= {f"level {u}, {kind}": level for u, level in enumerate(levels, 1)}
    return found


def step(network: nn.Module, modules: dict[str, nn.Module], size: tuple[int, ...], backend: str) -> list[Moved]:
    """Count one step.

    Args:
        network: network on the meta device.
        modules: the modules to count separately, by name.
        size: size of the images, (N, bands, H, W).
        backend: "triton", "next" or "reference".

    Returns:
        A row for each launch; its place is empty if it belongs to none of the modules.
    """
    network.train()
    image = meta(*size, dtype=torch.float32)
    mask = torch.empty(size[0], *size[2:], dtype=torch.uint8, device="meta")
    traffic = Traffic()
    with ExitStack() as stack:
        # The meta device has no autocast: what asks for it is told what a GPU would say.
        for module in (conv3_triton, subpixel):
            stack.enter_context(mock.patch.object(module, "low_precision", return_value=torch.bfloat16))
        stack.enter_context(kernels.backend.chosen(backend))
        stack.enter_context(traffic)
        stack.enter_context(traffic.following(modules))
        with Autocast(torch.bfloat16):
            logits: Tensor = network(image)
        BCEDiceLoss()(logits, mask).backward()
    return traffic.moved


def level_of(row: Moved) -> str:
    """Return the level of a launch: its module's, or, outside them, "pooling" or "loss and others"."""
    if row.place:
        return row.place.split(",")[0]
    return "pooling" if "max_pool" in row.operator else "loss and others"


def rows(backend: str, size: tuple[int, ...] = SIZE, **options: Any) -> list[dict[str, Any]]:
    """Return the rows of a network, one for each launch, with its level and its bytes per pixel of the image.

    Args:
        backend: "triton" or "reference".
        size: size of the images, (N, bands, H, W).
        **options: arguments of DeepSkipUNet.
    """
    with torch.device("meta"):
        network = DeepSkipUNet(size[1], 1, **options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = size[0] * size[2] * size[3]
    return [
        {
            "form": backend, "operator": f"{one.operator} {one.part}".strip(), "place": one.place, "level": level_of(one),
            "read": one.read, "written": one.written, "bytes_per_pixel": (one.read + one.written) / pixels,
        }
        for one in step(network, level_modules(network), size, backend)
    ]  # fmt: skip


def table(forms: dict[str, list[dict[str, Any]]], size: tuple[int, ...]) -> str:
    """Return Markdown tables of bytes per pixel of the image, by level and by operator, with a column for each form.

    Args:
        forms: rows of each form.
        size: size of the images, (N, bands, H, W).
    """
    lines = []
    for key in ("level", "operator"):
        sums: dict[str, dict[str, float]] = defaultdict(dict)
        for form, found in forms.items():
            for row in found:
                sums[row[key]][form] = sums[row[key]].get(form, 0.0) + row["bytes_per_pixel"]
        order = sorted(sums) if key == "level" else sorted(sums, key=lambda name: -sum(sums[name].values()))
        lines += [f"| {key} | " + " | ".join(forms) + " |", "|---|" + "---:|" * len(forms)]
        lines += [
            f"| {name} | " + " | ".join(f"{sums[name].get(form, 0.0):,.0f}" for form in forms) + " |" for name in order
        ]
        lines.append("")
    whole = {form: sum(row["read"] + row["written"] for row in found) for form, found in forms.items()}
    lines += ["| whole step | " + " | ".join(forms) + " |", "|---|" + "---:|" * len(forms)]
    lines.append("| GB | " + " | ".join(f"{n / 1e9:.1f}" for n in whole.values()) + " |")
    for card in ("H100", "H200"):
        times = " | ".join(f"{1e3 * n / CARDS[card].bandwidth:.1f}" for n in whole.values())
        lines.append(f"| ms at {card}'s copy speed | {times} |")
    return f"bf16, {' x '.join(map(str, size))}, b = 8, bytes a pixel of the image\n\n" + "\n".join(lines)


def main() -> None:
    """Print the tables of the current, the new and the plain form, and write all rows."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.bench.step_bytes", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    forms = {"deepskip": rows("triton"), "deepskip, next": rows("next"), "plain": rows("reference")}
    if arguments.json:
        arguments.json.write_text(json.dumps(forms, indent=1) + "\n")
    print(table(forms, SIZE))


if __name__ == "__main__":
    main()
