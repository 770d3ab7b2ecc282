"""Registers and predicates of a warp, lane by lane: their values, and in which lanes they are known."""

import re
from typing import NamedTuple

import numpy as np

LANES = 32
SECTOR = 32

Lanes = np.ndarray | None


class Access(NamedTuple):
    """A load or store of global memory by a warp.

    Attributes:
        opcode: opcode of the instruction.
        width: bytes a lane.
        addresses: addresses of the active lanes, (lanes,), or None if unknown.
        lanes: number of active lanes.
    """

    opcode: str
    width: int
    addresses: np.ndarray | None
    lanes: int

    @property
    def sectors(self) -> int | None:
        """The number of 32-byte sectors that it touches, or None if its addresses are unknown."""
        if self.addresses is None:
            return None
        ends = np.concatenate([self.addresses, self.addresses + np.uint64(self.width - 1)])
        return len(np.unique(ends // SECTOR))


class Unresolved(RuntimeError):
    """Control flow that depends on more than integers, or on an unknown opcode."""


class WarpState:
    """Registers and predicates of a warp, and its accesses to global memory.

    Args:
        constants: the kernel's constant bank 0, as 32-bit words.
        block: (x, y, z) of its program.
        warp: its number in the program.
    """

    def __init__(self, constants: np.ndarray, block: tuple[int, int, int], warp: int) -> None:
        self.constants = constants
        thread = np.arange(LANES, dtype=np.uint32) + np.uint32(LANES * warp)
        self.special = {
            "SR_TID.X": thread, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.X": block[0], "SR_CTAID.Y": block[1],
            "SR_CTAID.Z": block[2], "SR_LANEID": thread % LANES, "SR_CgaCtaId": 0, "SRZ": 0,
        }  # fmt: skip
        # The values of each, and in which lanes they are known.
        self.registers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.predicates: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.active = np.ones(LANES, bool)
        # The lanes that the current instruction reads.
        self.looking = self.active
        self.accesses: list[Access] = []

    def _known(self, store: dict[str, tuple[np.ndarray, np.ndarray]], name: str) -> Lanes:
        if name not in store and not name.startswith("local "):
            # Correct code does not depend on the initial value, but may set bits of such a register one by one.
            return np.zeros(LANES, bool if "P" in name else np.uint32)
        x, known = store.get(name, (None, None))
        return x if known is not None and known[self.looking].all() else None

    def _word(self, name: str) -> Lanes:
        if name in ("RZ", "URZ"):
            return np.zeros(LANES, np.uint32)
        if name[0] in "RU" and name.lstrip("UR").isdigit():
            return self._known(self.registers, name)
        if name.startswith("local "):
            return self._known(self.registers, name)
        if match := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", name):
            return np.full(LANES, self.constants[int(match[1], 16) // 4], np.uint32)
        if name in self.special:
            return np.broadcast_to(np.asarray(self.special[name], np.uint32), LANES)
        if match := re.fullmatch(r"(-?)0x([0-9a-f]+)|(-?\d+)", name):
            return np.full(LANES, int(name, 0) & 0xFFFFFFFF, np.uint32)
        return None

    def value(self, operand: str) -> Lanes:
        """Return a 32-bit operand, with its sign or complement applied, or None if it is unknown."""
        sign, name = (operand[0], operand[1:]) if operand[0] in "-~|" and operand[:3] != "-0x" else ("", operand)
        x = None if sign == "|" else self._word(name)
        if x is None or not sign:
            return x
        return ~x + np.uint32(sign == "-")

    def wide(self, operand: str) -> Lanes:
        """Return a 64-bit operand: a register and the next one, or a constant and the next."""
        low, high = self.value(operand), self.value(next_register(operand))
        if low is None or high is None:
            return None
        return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def truth(self, operand: str) -> Lanes:
        """Return a predicate operand, or None if it is unknown."""
        name = operand.lstrip("!")
        x = np.ones(LANES, bool) if name in ("PT", "UPT") else self._known(self.predicates, name)
        return x if x is None or operand[0] != "!" else ~x

    def _put(self, store: dict[str, tuple[np.ndarray, np.ndarray]], name: str, x: Lanes, mask: Lanes) -> None:
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        none = np.zeros(LANES, bool)
        old, known = store.get(name, (none, none))
        if mask is None:
            # It is unknown whether it was written.
            store[name] = old, none
        elif x is None:
            store[name] = old, known & ~mask
        else:
            store[name] = np.where(mask, x, old).astype(x.dtype), known | mask

    def put(self, name: str, x: Lanes, mask: Lanes, wide: bool = False) -> None:
        """Write a register, or a pair of them, in the lanes of a mask."""
        if wide:
            self._put(self.registers, name, None if x is None else (x & 0xFFFFFFFF).astype(np.uint32), mask)
            self._put(
                self.registers, next_register(name), None if x is None else (x >> np.uint64(32)).astype(np.uint32), mask
            )
        else:
            self._put(self.registers, name, None if x is None else x.astype(np.uint32), mask)

    def put_truth(self, name: str, x: Lanes, mask: Lanes) -> None:
        """Write a predicate in the lanes of a mask."""
        self._put(self.predicates, name, x, mask)


def next_register(name: str) -> str:
    """Return the name of the upper half of a 64-bit operand."""
    if match := re.fullmatch(r"(-?~?c\[0x0\]\[0x)([0-9a-f]+)\]", name):
        return f"{match[1]}{int(match[2], 16) + 4:x}]"
    if match := re.fullmatch(r"([-~]?U?R)(\d+)", name):
        return f"{match[1]}{int(match[2]) + 1}"
    return name


def is_predicate(name: str) -> bool:
    """Return whether an operand is a predicate."""
    return re.fullmatch(r"!?U?P(T|\d)", name) is not None
