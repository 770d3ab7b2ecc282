"""Builds every kernel variant for GPUs that need not be here, and says what each takes: python -m kernels.bench.builds."""

import argparse
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import bce_dice, bce_dice_loss, deep_skip_gpu

ARCHITECTURES = (80, 90)
LOGITS = ("fp32", "fp16", "bf16")
TARGETS = ("u8", "i64")
CLASSES = (4, 32)


class Variant(NamedTuple):
    """A kernel with the types of its pointers and its constants."""

    kernel: Any
    name: str
    types: dict[str, Any]
    constants: dict[str, Any]
    warps: int = bce_dice.WARPS


class Build(NamedTuple):
    """What a built variant takes: registers a thread, bytes spilled a thread, bytes of shared memory a program."""

    architecture: int
    name: str
    registers: int
    spilled: int
    shared: int


def variants() -> Iterator[Variant]:
    """Yields those of BCE + Dice, for the types that matter: the widest and the narrowest target."""
    scalars = dict.fromkeys(("pixels", "z_n", "z_v", "t_n", "t_v"), "i64")
    scalars |= {
        "V": "i32",
        "programs": "i32",
        "alpha": "fp32",
        "ignore": "i32",
        "out_row": "i32",
        "z_p": "i32",
        "t_p": "i32",
    }
    for logits, target, weighed in itertools.product(LOGITS, TARGETS, (False, True)):
        types = scalars | {
            "z_ptr": f"*{logits}", "dz_ptr": f"*{logits}", "t_ptr": f"*{target}",
            "w_ptr": "*fp32" if weighed else f"*{logits}", "out_ptr": "*fp32", "g_ptr": "*fp32",
        }  # fmt: skip
        about = f"{logits},{target}{',weight' if weighed else ''}"
        for kernel in (bce_dice._sigmoid_sums, bce_dice._sigmoid_gradient):
            constants = {"HAS_WEIGHT": weighed, "BLOCK": bce_dice.SIGMOID_BLOCK}
            yield Variant(kernel, f"{kernel.__name__}[{about}]", types, constants)
            if (logits, target, weighed) == ("bf16", "u8", False):
                # one class, and one program a sample: Triton makes a constant of an argument that is 1
                constants |= {"programs": 1, "V": 1}
                yield Variant(kernel, f"{kernel.__name__}[{about},alone]", types, constants)
        for kernel, classes in itertools.product((bce_dice._softmax_sums, bce_dice._softmax_gradient), CLASSES):
            constants = {"HAS_WEIGHT": weighed} | bce_dice.softmax_sizes(classes)
            yield Variant(kernel, f"{kernel.__name__}[{about},{classes}classes]", types, constants)
            if (logits, target, weighed, classes) == ("bf16", "u8", False, CLASSES[0]):
                yield Variant(kernel, f"{kernel.__name__}[{about},alone]", types, constants | {"programs": 1})
    for kernel, classes in itertools.product(
        (bce_dice_loss._loss_of_sums, bce_dice_loss._loss_of_sums_gradient), CLASSES
    ):
        types = dict.fromkeys(kernel.arg_names, "*fp32") | {"V": "i32", "beta": "fp32", "eps": "fp32"}
        flags = dict.fromkeys(("HAS_LOSS", "HAS_BCE", "HAS_DICE", "HAS_Q"), True) | {"CLASSES": classes}
        constants = {name: flags[name] for name in kernel.arg_names if name in flags}
        yield Variant(kernel, f"{kernel.__name__}[{classes}classes]", types, constants, warps=1)
    for width in (1, 19):
        types = {"rows_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32", "row_step": "i32"}
        constants = {"WIDTH": width, "ROWS": bce_dice.ROWS}
        yield Variant(bce_dice._add_rows, f"_add_rows[{width}]", types, constants)


def deep_skip_variants() -> Iterator[Variant]:
    """Yields those of the deep-skip stage: levels of a network of 5, b of 4 and 64 at the ends; fp16 is built as bf16 is."""
    levels = (((2, 4, 8, 2), 8), ((2, 4, 2), 16), ((2, 2), 32), ((2,), 64), ((2, 4, 8, 16, 2), 4), ((2, 4, 8, 2), 64))
    for (factors, K), name, backward, last in itertools.product(levels, ("fp32", "bf16"), (False, True), (True, False)):
        if not last and (factors, K) != levels[0]:
            continue
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        cut = deep_skip_gpu.plan(512, factors, K, dtype, backward)
        types = {
            "wide_ptr": f"*{name}", "own_ptr": f"*{name}", "maps": (f"*{name}",) * len(factors),
            "blocks": ("i32",) * len(cut.blocks), "per_stripe": "i32", "H": "i32", "W": "i32",
        }  # fmt: skip
        constants = {
            "K": K, "FACTORS": factors, "WINDOW": cut.window, "STRIPE": cut.stripe, "CHANNELS": cut.channels,
            "COLUMNS": deep_skip_gpu.OWN_COLUMNS, "LAST": last, "BILINEAR": True, "BACKWARD": backward,
            "OPERAND": getattr(tl, str(dtype).removeprefix("torch.")), "PRECISION": "tf32x3",
        }  # fmt: skip
        what = f"{'backward' if backward else 'forward'},{name},K={K},{len(factors)}maps,{'last' if last else 'first'}"
        kernel = deep_skip_gpu._branches
        yield Variant(kernel, f"{kernel.__name__}[{what}]", types, constants, cut.warps)


def build(variant: Variant, architecture: int) -> Build:
    """Builds a variant and reads what it takes from its machine code."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    # what torch allocates is aligned, and a step of 1 is known where it is launched
    constants = variant.constants | {name: 1 for name in ("z_p", "t_p") if name in names}
    signature |= {name: "constexpr" for name in ("z_p", "t_p") if name in names}
    aligned = {
        (i, *inner): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        for inner, kind in _leaves(signature[name])
        if kind.startswith("*")
    }
    source = ASTSource(variant.kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": variant.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Build(architecture, variant.name, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], built.metadata.shared)


def _leaves(kind: str | tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    return [((), kind)] if isinstance(kind, str) else [((i,), one) for i, one in enumerate(kind)]


SUITES = {"bce_dice": variants, "deep_skip": deep_skip_variants}


def _build_one(suite: str, at: int, architecture: int) -> Build:
    # by its place: what Triton compiles does not travel between processes
    return build(next(itertools.islice(SUITES[suite](), at, None)), architecture)


def main() -> None:
    """Prints a line for each variant and architecture: architecture, variant, registers, spilled, shared."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.builds", description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(SUITES), help=f"of {', '.join(SUITES)}; all by default")
    suites = parser.parse_args().suites
    if unknown := set(suites) - set(SUITES):
        parser.error(f"there is no suite {', '.join(unknown)}; suites are {', '.join(SUITES)}")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wanted = [
            (suite, at, architecture)
            for architecture in ARCHITECTURES
            for suite in suites
            for at in range(sum(1 for _ in SUITES[suite]()))
        ]
        for made in pool.map(_build_one, *zip(*wanted, strict=True)):
            print(f"sm_{made.architecture} {made.name} {made.registers} {made.spilled} {made.shared}", flush=True)


if __name__ == "__main__":
    main()
