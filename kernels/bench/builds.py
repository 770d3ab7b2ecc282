"""Build every kernel for GPUs that need not be present, and print its resources: python -m deepskip.kernels.bench.builds.

Without arguments it prints a line for each variant and architecture: architecture, variant, registers a thread, bytes spilled a
thread, bytes of shared memory a program. With --json FILE it writes the rows of `counts`: instructions, bytes and floors of the
benchmark.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepskip import kernels
from deepskip.kernels.bench import counts, machine_code
from deepskip.kernels.bench.launches import Launches, meta

LOGITS = (torch.float32, torch.float16, torch.bfloat16)
# Maps of networks of 5 levels, and the extremes of b, 4 and 64.
STAGES = (((2, 4, 8, 2), 8), ((2, 4, 2), 16), ((2, 2), 32), ((2,), 64), ((2, 4, 8, 16, 2), 4), ((2, 4, 8, 2), 64))
# Channels of levels with b = 8, and a number that no block of channels divides.
NORM_CHANNELS = (8, 128, 3)


class Build(NamedTuple):
    """The resources of a built variant.

    Attributes:
        architecture: 80 or 90.
        name: name of the kernel and of the call.
        registers: registers a thread.
        spilled: bytes spilled a thread.
        shared: bytes of shared memory a program.
    """

    architecture: int
    name: str
    registers: int
    spilled: int
    shared: int


def loss_calls() -> dict[str, Callable[[], Tensor]]:
    """Return calls of BCE + Dice, by name, for the dtypes and shapes that need different kernels."""

    def call(
        dtype: torch.dtype, labels: torch.dtype, V: int, N: int = 2, ignore: int | None = 255, weighted: bool = False,
        alpha: float = 0.5,
    ) -> Callable[[], Tensor]:  # fmt: skip
        def run() -> Tensor:
            logits = meta(N, V, 512, 512, dtype=dtype, last=False).requires_grad_()
            samples, classes = (meta(n, dtype=torch.float32) if weighted else None for n in (N, V))
            target = meta(N, 512, 512, dtype=labels)
            sums = kernels.bce_dice_sums(logits, target, alpha=alpha, ignore_index=ignore, sample_weight=samples)
            return kernels.loss_of_sums(sums, classes)[0]

        return run

    found = {}
    for dtype in LOGITS:
        # Many classes are the same kernels with larger constants, so one dtype is enough.
        for V in (1, 4, 32) if dtype == torch.bfloat16 else (1, 4):
            name = f"{str(dtype).removeprefix('torch.')}, {V} classes"
            found[f"{name}, uint8"] = call(dtype, torch.uint8, V)
            found[f"{name}, int64, sample and class weights"] = call(dtype, torch.int64, V, weighted=True)
    found["bfloat16, 19 classes, uint8, all labels count"] = call(torch.bfloat16, torch.uint8, 19, ignore=None)
    for dtype in LOGITS:
        found[f"{str(dtype).removeprefix('torch.')}, 1 classes, uint8{counts.NEXT}"] = call(dtype, torch.uint8, 1)
    weighted = call(torch.bfloat16, torch.uint8, 1, weighted=True, alpha=0.8)
    found[f"bfloat16, 1 classes, uint8, sample weights, alpha 0.8{counts.NEXT}"] = weighted
    # The loss of a crop has one program a sample, which Triton makes a constant.
    found["bfloat16, 1 classes, bool, many samples"] = call(torch.bfloat16, torch.bool, 1, N=4096)
    return found


def stage_calls() -> dict[str, Callable[[], Tensor]]:
    """Return calls of the deep-skip stage, by name."""

    def call(factors: tuple[int, ...], K: int, dtype: torch.dtype, last: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            maps = [meta(2, K * s, 512 // s, 512 // s, dtype=dtype, last=last).requires_grad_() for s in (1, *factors)]
            weights = [meta(K, K * s, 3, 3, dtype=dtype, last=last).requires_grad_() for s in (1, *factors)]
            return kernels.deep_skip(maps, weights)

        return run

    return {
        f"{str(dtype).removeprefix('torch.')}, K = {K}, {len(factors)} maps, {'last' if last else 'first'}": call(
            factors, K, dtype, last
        )
        for dtype in LOGITS
        for factors, K in STAGES
        for last in (True, False)
        # The layout changes only addresses, and fp16 is built like bf16.
        if (last or (factors, K) == STAGES[0]) and (dtype != torch.float16 or (factors, K) == STAGES[0])
    }


def norm_calls() -> dict[str, Callable[[], Tensor]]:
    """Return calls of batch norm and ReLU, by name."""

    def call(C: int, dtype: torch.dtype, last: bool, training: bool, of_sums: bool = False) -> Callable[[], Tensor]:
        def run() -> Tensor:
            x = meta(2, C, 64, 64, dtype=dtype, last=last).requires_grad_()
            weight, bias, mean, var = (meta(C, dtype=torch.float32) for _ in range(4))
            rows = meta(64, 2, C, dtype=torch.float32) if of_sums else None
            settings = (weight.requires_grad_(), bias.requires_grad_(), mean, var, training, 0.1, 1e-5)
            return kernels.batch_norm_relu(x, *settings, rows)

        return run

    half = torch.bfloat16
    found = {f"bfloat16, C = {C}, last": call(C, half, True, True) for C in NORM_CHANNELS}
    # The dtypes differ only in the width of a load.
    found |= {f"{str(dtype).removeprefix('torch.')}, C = 8, last": call(8, dtype, True, True) for dtype in LOGITS}
    return found | {
        "bfloat16, C = 8, first": call(8, half, False, True),
        "bfloat16, C = 8, last, evaluation": call(8, half, True, False),
        "bfloat16, C = 8, last, of sums": call(8, half, True, True, True),
    }


SUITES = {"bce_dice": loss_calls, "deep_skip": stage_calls, "batch_norm": norm_calls}
# Backends of the suites that do not use "triton".
BACKENDS = {"batch_norm": "next"}


def builds_of(suite: str, name: str, architecture: int) -> list[Build]:
    """Build the launches of a call and its gradient for an architecture."""
    seen = Launches(architecture)
    new = name.endswith(counts.NEXT) or suite in BACKENDS
    with seen.watching("next" if new else "triton"):
        out = SUITES[suite]()[name]()
        out.backward(torch.empty_like(out))
    made: dict[str, Build] = {}
    for build in (one.launch.build for one in seen.started if one.launch is not None):
        about = f"{build.name}[{name}]"
        if about in made:
            about = f"{build.name}[{name}, backward]"
        found = machine_code.resources(build.asm["cubin"])
        made[about] = Build(architecture, about, found["registers"], found["spills"], build.metadata.shared)
    return list(made.values())


def count_rows(part: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the rows of one part of the benchmark for one architecture."""
    architecture, place = part
    return list(counts.rows(architecture, counts.PARTS[place]))


def lines(suites: list[str], architectures: list[int]) -> Iterator[str]:
    """Yield a line for each variant and architecture."""
    wanted = [
        (suite, name, architecture) for architecture in architectures for suite in suites for name in SUITES[suite]()
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found in pool.map(builds_of, *zip(*wanted, strict=True)):
            for made in found:
                name = made.name.replace(" ", "")
                yield f"sm_{made.architecture} {name} {made.registers} {made.spilled} {made.shared}"


def main() -> None:
    """Print the variants' lines, or write the rows of the counts."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.kernels.bench.builds", description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(SUITES), help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument(
        "--architectures", nargs="+", type=int, choices=counts.ARCHITECTURES, default=list(counts.ARCHITECTURES)
    )
    parser.add_argument("--json", type=Path, help="write the counts of the benchmark's launches there instead")
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(SUITES):
        parser.error(f"unknown suite {', '.join(unknown)}; suites are {', '.join(SUITES)}")
    if arguments.json is None:
        for line in lines(arguments.suites, arguments.architectures):
            print(line, flush=True)
        return
    parts = [(architecture, place) for architecture in counts.ARCHITECTURES for place in range(len(counts.PARTS))]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = [row for rows in pool.map(count_rows, parts) for row in rows]
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(counts.table(found))


if __name__ == "__main__":
    main()
