"""Disassemble a Triton kernel into a list of instructions, with the tools that come with Triton."""

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+|\$?[\w$]+):$")
_TARGET = re.compile(r"`\(([^)]+)\)")

KINDS = {
    "matrix": ("HMMA", "IMMA", "HGMMA", "QGMMA", "WARPGROUP", "BMMA"),
    "global memory": ("LDG", "STG", "LDGSTS", "LDGDEPBAR", "RED", "ATOM", "UTMA", "UBLKCP", "LD", "ST"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM", "ATOMS", "MOVM"),
    "special function": ("MUFU",),
    "conversion": ("F2F", "F2FP", "F2I", "F2IP", "I2F", "I2FP", "I2I", "FRND"),
    "move": ("MOV", "UMOV", "PRMT", "UPRMT", "SEL", "USEL", "FSEL", "CS2R", "S2R", "S2UR", "R2UR", "P2R", "UP2UR", "R2P", "LDC",
             "ULDC", "SHFL", "VOTE", "VOTEU", "MOVS"),
    "control": ("BRA", "EXIT", "BAR", "DEPBAR", "NOP", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "WARPSYNC", "SYNCS", "MEMBAR",
                "FENCE", "ELECT", "DEPBAR", "ERRBAR", "CCTL", "UCGABAR_ARV", "UCGABAR_WAIT", "NANOSLEEP", "YIELD"),
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        predicate: predicate such as "!P0", or "" if it always runs.
        opcode: opcode with its modifiers.
        operands: operands as the disassembler prints them.
        target: place in the list of the instruction that a branch or call jumps to, or None.
    """

    predicate: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    def __str__(self) -> str:
        predicate = f"@{self.predicate} " if self.predicate else ""
        return f"{predicate}{self.opcode} {', '.join(self.operands)}"


@cache
def kind_of(opcode: str) -> str:
    """Return the kind of an opcode's work: one of KINDS, "float" or "integer"."""
    name = opcode.split(".")[0]
    # The compiler uses multiplications by one or zero as moves, on whichever unit is free.
    if opcode.startswith(("IMAD.MOV", "HFMA2.MMA")):
        return "move"
    if name in _KIND_OF:
        return _KIND_OF[name]
    return "float" if name[0] in "FDH" and name != "FLO" else "integer"


def disassemble(cubin: bytes) -> list[Instruction]:
    """Disassemble a cubin of one kernel.

    Args:
        cubin: machine code, which Triton keeps as `asm["cubin"]`.

    Returns:
        Every instruction in order, subroutines after the kernel. An instruction's address is 16 times its place.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    """Parse the output of nvdisasm.

    Args:
        text: output of nvdisasm.

    Raises:
        ValueError: if an address does not follow the last one.
    """
    labels: dict[str, int] = {}
    found: list[tuple[str, str, tuple[str, ...], str]] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            address, predicate, opcode, rest = match.groups()
            if int(address, 16) != 16 * len(found):
                raise ValueError(
                    f"instruction {len(found)} is at 0x{address}: more than one kernel, or a line was not parsed"
                )
            target = _TARGET.search(rest)
            operands = tuple(part.replace(".reuse", "") for part in re.split(r",\s*(?![^\[]*\])", rest) if part)
            found.append((predicate or "", opcode, operands, target[1] if target else ""))
        elif match := _LABEL.match(line.strip()):
            labels[match[1]] = len(found)
    return [
        Instruction(predicate, opcode, operands, labels.get(target) if target else None)
        for predicate, opcode, operands, target in found
    ]


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers a thread, bytes spilled a thread, and bytes of static shared memory, as cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {"registers": numbers["REG"], "spills": numbers["STACK"] + numbers["LOCAL"], "shared": numbers["SHARED"]}
