"""Execute one warp of a kernel without a GPU, as far as integers go, to count what it issues and moves.

Control flow and addresses of our kernels depend only on integers: program and thread numbers, sizes, strides, pointers. Those
are computed lane by lane as on the machine. Everything else (loaded values, floats) is unknown, and so is every result of it. A
branch on an unknown, or on lanes that diverge, is an error instead of a guess. Semantics: NVIDIA's list of SASS opcodes, and
Triton's output. The tests verify them by checking that every output byte is stored exactly once.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

from deepskip.kernels.bench.machine_code import Instruction
from deepskip.kernels.bench.warp_integers import HANDLERS
from deepskip.kernels.bench.warp_state import LANES, Lanes, Unresolved, WarpState, is_predicate, next_register

# A loop that does not end was misread.
LONGEST = 2_000_000


class Warp(WarpState):
    """A warp that executes a kernel.

    Args:
        code: the kernel's instructions.
        constants: constant bank 0, as in `WarpState`.
        block: (x, y, z) of its program.
        warp: its number in the program.

    Attributes:
        issued: how often each instruction was issued, by its place; an instruction with a false predicate counts.
        accesses: its loads and stores of global memory.
    """

    def __init__(self, code: list[Instruction], constants: np.ndarray, block: tuple[int, int, int], warp: int) -> None:
        super().__init__(constants, block, warp)
        self.code = code
        self.issued: Counter[int] = Counter()
        # Groups of lanes that diverged from the running one, and where each resumes.
        self.apart: list[tuple[int, np.ndarray]] = []
        # For each barrier, the lanes that meet there; then where they resume, and which have arrived.
        self.meeting: dict[str, np.ndarray] = {}
        self.come: dict[str, tuple[int, np.ndarray]] = {}

    def run(self) -> None:
        """Run from the first instruction until all lanes have exited.

        Raises:
            Unresolved: if control flow depends on more than integers.
        """
        at, steps = 0, 0
        while True:
            instruction = self.code[at]
            self.issued[at] += 1
            steps += 1
            if steps > LONGEST:
                raise Unresolved(f"no end after {steps} instructions, at {instruction}")
            self.looking = self.active
            guard = self.truth(instruction.predicate) if instruction.predicate else self.active
            mask = None if guard is None else guard & self.active
            self.looking = self.active if mask is None else mask
            if instruction.name in _FLOW:
                if mask is None:
                    raise Unresolved(f"{instruction}: its predicate is not an integer's")
                goes = _FLOW[instruction.name](self, at, instruction, mask)
                # If the lanes exited or wait for others, another group runs.
                group = self._next_group() if goes is None else (goes, self.active)
                if group is None:
                    return
                at, self.active = group
                continue
            handler = HANDLERS.get(instruction.name)
            if handler is None or not handler(self, instruction, mask):
                self._forget(instruction, mask)
            at += 1

    def _next_group(self) -> tuple[int, np.ndarray] | None:
        if self.apart:
            return self.apart.pop()
        for name, (place, come) in self.come.items():
            if come.any() and (come | ~self.meeting[name]).all():
                self.come[name] = place, np.zeros(LANES, bool)
                return place, come
        if any(come.any() for _, come in self.come.values()):
            raise Unresolved("lanes wait at a barrier that others never reach")
        return None

    def _forget(self, instruction: Instruction, mask: Lanes) -> None:
        """Mark an instruction's results as unknown."""
        if instruction.name in _WRITES_NOTHING or not instruction.operands:
            return
        first, *others = instruction.operands
        if is_predicate(first):
            self.put_truth(first, None, mask)
            if others and is_predicate(others[0]):
                self.put_truth(others[0], None, mask)
                others = others[1:]
            if instruction.name not in ("SHFL", "VOTE", "VOTEU", "MATCH") or not others:
                return
            first = others[0]
        name = first
        for _ in range(_written(instruction)):
            self.put(name, None, mask)
            name = next_register(name)


def _written(instruction: Instruction) -> int:
    """Return how many registers an opcode of unknown result writes."""
    opcode = instruction.opcode
    if instruction.name == "HGMMA":
        return int(opcode.split(".")[1].split("x")[1]) // (2 if ".F32" in opcode else 4)
    if instruction.name in ("HMMA", "IMMA", "QGMMA"):
        return 4 if instruction.name != "HMMA" or ".F32" in opcode else 2
    for suffix, count in ((".128", 4), (".M88.4", 4), (".MT88.4", 4), (".64", 2), (".M88.2", 2), (".MT88.2", 2)):
        if suffix in opcode:
            return count
    return 2 if instruction.name in ("DADD", "DMUL", "DFMA") or ".F64" in opcode or ".U64" in opcode else 1


_WRITES_NOTHING = {
    "STG", "STS", "STSM", "STL", "RED", "LDGSTS", "BAR", "DEPBAR", "LDGDEPBAR", "NOP", "WARPSYNC",
    "MEMBAR", "FENCE", "WARPGROUP", "ERRBAR", "CCTL", "ARRIVES", "YIELD", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "UBLKCP",
}  # fmt: skip


# Control flow: each returns the place of the next instruction, or None if the running lanes stop.


def _leave(warp: Warp, at: int, i: Instruction, mask: np.ndarray) -> int | None:
    warp.active = warp.active & ~mask
    for name in warp.meeting:
        warp.meeting[name] = warp.meeting[name] & ~mask
    return at + 1 if warp.active.any() else None


def _branch(warp: Warp, at: int, i: Instruction, mask: np.ndarray) -> int | None:
    for name in i.operands[:-1]:
        more = warp.truth(name)
        if more is None:
            raise Unresolved(f"{i}: its predicate is not an integer's")
        mask = mask & more
    if i.target is None:
        raise Unresolved(f"{i}: an unknown target")
    return _part(warp, mask, i.target, at + 1)


def _return(warp: Warp, at: int, i: Instruction, mask: np.ndarray) -> int | None:
    place = warp.value(i.operands[0].split(" ")[0])
    if place is None:
        raise Unresolved(f"{i}: an unknown return address")
    return _part(warp, mask, int(place[0]) // 16, at + 1)


def _part(warp: Warp, mask: np.ndarray, there: int, here: int) -> int:
    if not mask.any():
        return here
    if (mask == warp.active).all():
        return there
    warp.apart.append((there, mask))
    warp.active = warp.active & ~mask
    return here


def _meet_later(warp: Warp, at: int, i: Instruction, mask: np.ndarray) -> int | None:
    warp.meeting[i.operands[0]] = warp.active
    return at + 1


def _meet_without(warp: Warp, at: int, i: Instruction, mask: np.ndarray) -> int | None:
    warp.meeting[i.operands[-1]] = warp.meeting[i.operands[-1]] & ~mask
    return at + 1


def _meet(warp: Warp, at: int, i: Instruction, mask: np.ndarray) -> int | None:
    _, come = warp.come.get(i.operands[0], (at, np.zeros(LANES, bool)))
    warp.come[i.operands[0]] = at + 1, come | mask
    return None


_FLOW: dict[str, Callable[[Warp, int, Instruction, np.ndarray], int | None]] = {
    "EXIT": _leave, "BRA": _branch, "CALL": _branch, "RET": _return, "BSSY": _meet_later, "BSYNC": _meet,
    "BREAK": _meet_without,
}  # fmt: skip
