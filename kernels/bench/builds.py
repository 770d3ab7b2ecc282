"""Builds every kernel variant for GPUs that need not be here, and says what each takes: python -m kernels.bench.builds."""

import argparse
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import bce_dice, bce_dice_loss

ARCHITECTURES = (80, 90)
LOGITS = ("fp32", "fp16", "bf16")
TARGETS = ("u8", "i64")
CLASSES = (4, 32)


class Variant(NamedTuple):
    """A kernel with the types of its pointers and its constants."""

    kernel: Any
    name: str
    types: dict[str, str]
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
    """Yields the variants that are launched, for the types that matter: the widest and the narrowest target."""
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
        for kernel, classes in itertools.product((bce_dice._softmax_sums, bce_dice._softmax_gradient), CLASSES):
            constants = {"HAS_WEIGHT": weighed} | bce_dice.softmax_sizes(classes)
            yield Variant(kernel, f"{kernel.__name__}[{about},{classes}classes]", types, constants)
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


def build(variant: Variant, architecture: int) -> Build:
    """Builds a variant and reads what it takes from its machine code."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    # what torch allocates is aligned, and a step of 1 is known where it is launched
    constants = variant.constants | {name: 1 for name in ("z_p", "t_p") if name in names}
    signature |= {name: "constexpr" for name in ("z_p", "t_p") if name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
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


def main() -> None:
    """Prints a line for each variant and architecture: architecture, variant, registers, spilled, shared."""
    argparse.ArgumentParser(prog="python -m kernels.bench.builds", description=__doc__).parse_args()
    for architecture, variant in itertools.product(ARCHITECTURES, variants()):
        made = build(variant, architecture)
        print(f"sm_{made.architecture} {made.name} {made.registers} {made.spilled} {made.shared}", flush=True)


if __name__ == "__main__":
    main()
