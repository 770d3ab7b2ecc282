"""The effect of each opcode on integers, addresses and predicates; the results of all others are unknown."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from deepskip.kernels.bench.machine_code import Instruction
from deepskip.kernels.bench.warp_state import LANES, Access, Lanes, Unresolved, WarpState, is_predicate, next_register


def _signed(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32).view(np.int32).astype(np.int64)


def _compare(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    operators: dict[str, Callable[[Any, Any], Any]] = {
        "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
    }  # fmt: skip
    return operators[how](a, b)


def _lookup(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    result = np.zeros(LANES, np.uint32)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


# How a boolean combines with a comparison.
_JOIN = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


# Operations: each returns whether it knows its result.


def _move(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    warp.put(i.operands[0], warp.value(i.operands[1]), mask)
    return True


def _constant(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    wide = ".64" in i.opcode
    if not wide and i.opcode not in ("LDC", "ULDC"):
        return False
    warp.put(i.operands[0], (warp.wide if wide else warp.value)(i.operands[1]), mask, wide)
    return True


def _zero_pair(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    if i.operands[1] != "SRZ":
        return False
    warp.put(i.operands[0], np.zeros(LANES, np.uint64), mask, ".32" not in i.opcode)
    return True


def _half_constant(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, a, b, high, low = i.operands
    if (a.lstrip("-"), b) != ("RZ", "RZ"):
        return False
    words = np.array([float(low), float(high)], np.float16).view(np.uint16).astype(np.uint32)
    warp.put(name, np.full(LANES, words[0] | words[1] << np.uint32(16)), mask)
    return True


def _first_lane(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    # R2UR may write a predicate before the register.
    name, source = [x for x in i.operands if not is_predicate(x)][:2]
    x = warp.value(source)
    warp.put(name, None if x is None else np.full(LANES, x[0]), mask)
    return True


def _add(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, *rest = i.operands
    carries = [x for x in rest[:2] if re.fullmatch(r"U?P(T|\d)", x)] if i.name.endswith("ADD3") else []
    terms = rest[len(carries) :]
    extended = ".X" in i.opcode
    ins = terms[3:] if i.name.endswith("ADD3") else []
    terms = terms[:3]
    total: Lanes = np.zeros(LANES, np.uint64)
    for term in terms:
        x = warp.value(term.lstrip("-")) if term[0] == "-" and term[:3] != "-0x" else warp.value(term)
        if x is None or total is None:
            total = None
            break
        x = x.astype(np.uint64)
        # -x is ~x + 1, which carries if x is 0.
        total = total + (np.uint64(2**32) - x if term[0] == "-" and term[:3] != "-0x" else x)
    for term in ins if extended else ():
        bit = warp.truth(term)
        total = None if bit is None or total is None else total + bit.astype(np.uint64)
    warp.put(name, None if total is None else total & np.uint64(0xFFFFFFFF), mask)
    for k, carry in enumerate(carries):
        warp.put_truth(carry, None if total is None else (total >> np.uint64(32)) > k, mask)
    return True


def _multiply(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, *rest = i.operands
    carry = rest.pop(0) if is_predicate(rest[0]) else ""
    modifiers = i.opcode.split(".")[1:]
    signed = "U32" not in modifiers
    wide, high = "WIDE" in modifiers, "HI" in modifiers
    a, b = warp.value(rest[0]), warp.value(rest[1])
    c = (warp.wide if wide or high else warp.value)(rest[2])
    # A product with zero is known; the compiler uses it to move registers.
    zero = "RZ" in (rest[0], rest[1]) or "URZ" in (rest[0], rest[1])
    if c is None or ((a is None or b is None) and not zero):
        total = None
    else:
        product = np.zeros(LANES, np.uint64)
        if not zero:
            assert a is not None
            assert b is not None
            product = (_signed(a) * _signed(b)).view(np.uint64) if signed else a.astype(np.uint64) * b.astype(np.uint64)
        if not (wide or high):
            product &= np.uint64(0xFFFFFFFF)
        total = product + c.astype(np.uint64)
        if "X" in modifiers:
            bit = warp.truth(rest[3])
            total = None if bit is None else total + bit.astype(np.uint64)
    if total is not None and high:
        total = total >> np.uint64(32)
    elif total is not None and not wide:
        total = total & np.uint64(0xFFFFFFFF)
    warp.put(name, total, mask, wide)
    if carry:
        # The sum overflowed 64 bits if it is less than a term.
        warp.put_truth(carry, None if total is None or c is None else total < c, mask)
    return True


def _shifted_add(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, *rest = i.operands
    carry = rest.pop(0) if is_predicate(rest[0]) else ""
    modifiers = i.opcode.split(".")[1:]
    high, sign_extended, extended = ("HI" in modifiers, "SX32" in modifiers, "X" in modifiers)
    bit: Lanes = warp.truth(rest.pop()) if extended else np.zeros(LANES, bool)
    shift = int(rest.pop(), 0)
    a, b = warp.value(rest[0]), warp.value(rest[1])
    top = warp.value(rest[2]) if high and not sign_extended else np.zeros(LANES, np.uint32)
    if a is None or b is None or top is None or bit is None:
        total = None
    else:
        both = a.astype(np.uint64) | top.astype(np.uint64) << np.uint64(32)
        source = _signed(a).view(np.uint64) if sign_extended else both
        source = source << np.uint64(shift)
        part = source >> np.uint64(32) if high else source & np.uint64(0xFFFFFFFF)
        total = part + b.astype(np.uint64) + bit.astype(np.uint64)
    warp.put(name, None if total is None else total & np.uint64(0xFFFFFFFF), mask)
    if carry:
        warp.put_truth(carry, None if total is None else total >> np.uint64(32) > 0, mask)
    return True


def _shift(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, low_name, amount_name, high_name = i.operands[:4]
    modifiers = i.opcode.split(".")[1:]
    low, amount, high = (warp.value(x) for x in (low_name, amount_name, high_name))
    if low is None or amount is None or high is None:
        return False
    pair = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    by = np.minimum(amount, 63).astype(np.uint64)
    if "L" in modifiers:
        result = pair << by
    elif any(kind in modifiers for kind in ("S32", "S64")):
        result = (pair.view(np.int64) >> by.astype(np.int64)).view(np.uint64)
    else:
        result = pair >> by
    warp.put(name, (result >> np.uint64(32) if "HI" in modifiers else result) & np.uint64(0xFFFFFFFF), mask)
    return True


def _logic(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, *rest = i.operands
    flag = ""
    if is_predicate(name):
        flag, name = name, rest.pop(0)
    a, b, c, table = *(warp.value(x) for x in rest[:3]), int(rest[3], 0)
    # Inputs that the table ignores need not be known.
    unknown = [x is None for x in (a, b, c)]
    result = None
    if not any(unknown):
        result = _lookup(table, *(x for x in (a, b, c) if x is not None))
    elif table in (0xF0, 0xCC, 0xAA):
        result = (a, b, c)[(0xF0, 0xCC, 0xAA).index(table)]
    warp.put(name, result, mask)
    if flag:
        warp.put_truth(flag, None if result is None else result != 0, mask)
    return True


def _logic_of_predicates(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    first, second, *rest = i.operands
    terms = [warp.truth(x) for x in rest[:3]]
    # An unknown that makes no difference is ignored: false and anything is false.
    choices = [(0, 0xFFFFFFFF) if x is None else (None,) for x in terms]
    for name, table in ((first, rest[3]), (second, rest[4])):
        found = []
        for choice in itertools.product(*choices):
            words = [
                np.full(LANES, filled, np.uint32) if x is None else np.where(x, 0xFFFFFFFF, 0).astype(np.uint32)
                for x, filled in zip(terms, choice, strict=True)
            ]
            found.append(_lookup(int(table, 0), *words) != 0)
        same = all((one == found[0]).all() for one in found)
        warp.put_truth(name, found[0] if same else None, mask)
    return True


def _set_predicate(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    first, second, a_name, b_name, joined, *extended = i.operands
    modifiers = i.opcode.split(".")[1:]
    how, join = modifiers[0], next(x for x in modifiers if x in _JOIN)
    a, b, other = warp.value(a_name), warp.value(b_name), warp.truth(joined)
    signed = "U32" not in modifiers
    result: Lanes = None
    if a is not None and b is not None:
        x, y = (_signed(a), _signed(b)) if signed else (a, b)
        result = _compare(how, x, y)
        if "EX" in modifiers:
            # Compare the high words; if they are equal, use the result of the low ones.
            low = warp.truth(extended[0])
            result = None if low is None else np.where(a == b, low, _compare(how, x, y))
    for name, found in ((first, result), (second, None if result is None else ~result)):
        # False and anything is false.
        never = join == "AND" and other is not None and not other.any()
        known = other if never else None if found is None or other is None else _JOIN[join](found, other)
        warp.put_truth(name, known, mask)
    return True


def _select(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, a_name, b_name, which = i.operands
    a, b, p = warp.value(a_name), warp.value(b_name), warp.truth(which)
    if p is None:
        return False
    if p.all() or not p.any():
        warp.put(name, a if p.all() else b, mask)
        return True
    warp.put(name, None if a is None or b is None else np.where(p, a, b), mask)
    return True


def _least(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, *rest = i.operands
    a, b = warp.value(rest[0]), warp.value(rest[1])
    least = warp.truth(rest[-1])
    if a is None or b is None or least is None:
        return False
    if i.name == "VIADDMNMX":
        c = warp.value(rest[2])
        if c is None:
            return False
        a, b = a + b, c
    signed = "U32" not in i.opcode
    x, y = (_signed(a), _signed(b)) if signed else (a.astype(np.int64), b.astype(np.int64))
    warp.put(name, np.where(least, np.minimum(x, y), np.maximum(x, y)) & 0xFFFFFFFF, mask)
    return True


def _permute(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, a_name, how, b_name = i.operands
    a, b = warp.value(a_name), warp.value(b_name)
    if a is None or b is None or not how.startswith("0x") or i.opcode not in ("PRMT", "UPRMT"):
        return False
    pool = np.stack([x >> np.uint32(8 * k) & np.uint32(0xFF) for x in (a, b) for k in range(4)])
    result = np.zeros(LANES, np.uint32)
    for k in range(4):
        choice = int(how, 16) >> 4 * k & 0xF
        byte = pool[choice & 7]
        result |= (np.where(byte & 0x80, 0xFF, 0).astype(np.uint32) if choice & 8 else byte) << np.uint32(8 * k)
    warp.put(name, result, mask)
    return True


def _extend_sign(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, a_name, bits_name = i.operands
    a, bits = warp.value(a_name), int(bits_name, 0)
    if a is None:
        return False
    low = a & np.uint32((1 << bits) - 1)
    if ".U32" not in i.opcode:
        low = np.where(low >> np.uint32(bits - 1) & 1, low | np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF), low)
    warp.put(name, low, mask)
    return True


def _absolute(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    a = warp.value(i.operands[1])
    warp.put(i.operands[0], None if a is None else np.abs(_signed(a)) & 0xFFFFFFFF, mask)
    return True


def _float_of(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    # Integer divisions use this form; the other forms convert data.
    if not i.opcode.endswith(".RP"):
        return False
    name, source = i.operands
    x = (warp.wide if ".U64" in i.opcode else warp.value)(source)
    if x is None:
        return False
    exact = x.astype(np.float64)
    near = exact.astype(np.float32)
    up = np.where(near.astype(np.float64) < exact, np.nextafter(near, np.float32(np.inf)), near)
    warp.put(name, up.astype(np.float32).view(np.uint32), mask)
    return True


def _reciprocal(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    x = warp.value(i.operands[1]) if i.opcode == "MUFU.RCP" else None
    if x is None:
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        warp.put(i.operands[0], (np.float32(1) / x.view(np.float32)).astype(np.float32).view(np.uint32), mask)
    return True


def _whole_of(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, source = i.operands
    x = warp.value(source)
    wide = ".U64" in i.opcode
    if x is None or ".TRUNC" not in i.opcode or not (wide or ".U32" in i.opcode):
        return False
    real = np.nan_to_num(x.view(np.float32).astype(np.float64), nan=0.0)
    most = 2.0**64 - 2048 if wide else 2.0**32 - 1
    warp.put(name, np.clip(real, 0, most).astype(np.uint64), mask, wide)
    return True


def _pack_predicates(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    name, _, source, bits_name = i.operands
    x, bits = warp.value(source), warp.value(bits_name)
    if x is None or bits is None or i.opcode not in ("P2R", "UP2UR"):
        return False
    kind = "UP" if i.name == "UP2UR" else "P"
    result = x & ~bits
    for k in range(7):
        if int(bits[0]) >> k & 1:
            p = warp.truth(f"{kind}{k}")
            if p is None:
                return False
            result = result | p.astype(np.uint32) << np.uint32(k)
    warp.put(name, result, mask)
    return True


def _unpack_predicates(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    _, source, bits_name = i.operands
    x, bits = warp.value(source), int(bits_name, 0)
    for k in range(7):
        if bits >> k & 1:
            warp.put_truth(f"P{k}", None if x is None else (x >> np.uint32(k) & 1).astype(bool), mask)
    return True


def _global_memory(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    lanes = mask
    places = [x for x in i.operands if "[" in x]
    if i.name == "LDGSTS":
        places = places[1:]
        if is_predicate(i.operands[-1]):
            filled = warp.truth(i.operands[-1])
            lanes = None if filled is None or mask is None else mask & filled
    width = next((w // 8 for w in (128, 64) if f".{w}" in i.opcode), 0)
    width = width or (1 if re.search(r"\.[US]8", i.opcode) else 2 if re.search(r"\.[US]16", i.opcode) else 4)
    if lanes is None:
        raise Unresolved(f"{i}: which lanes take part is not an integer's")
    addresses: Lanes = np.zeros(LANES, np.uint64)
    for term in places[0][places[0].rindex("[") + 1 : -1].split("+"):
        name = term.removesuffix(".64").removesuffix(".U32")
        register = name.lstrip("-")[0] in "RU" and name not in ("RZ", "URZ")
        whole = register and (term.endswith(".64") or name.startswith("UR"))
        x = warp.wide(name) if whole else warp.value(name)
        if x is not None and not register:
            x = _signed(x).view(np.uint64)
        addresses = None if x is None or addresses is None else addresses + x.astype(np.uint64)
    if lanes.any():
        warp.accesses.append(Access(i.opcode, width, None if addresses is None else addresses[lanes], int(lanes.sum())))
    return False


def _local_memory(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    # Spilled registers, each at its own address.
    stores = i.name == "STL"
    place, name = i.operands if stores else i.operands[::-1]
    base, _, offset = place.strip("[]").partition("+")
    at = warp.value(base)
    if at is None:
        raise Unresolved(f"{i}: an unknown place")
    first = int(at[0]) + int(offset or "0", 0)
    for k in range(next((w // 32 for w in (128, 64) if f".{w}" in i.opcode), 1)):
        slot = f"local {first + 4 * k}"
        source, to = (name, slot) if stores else (slot, name)
        warp.put(to, warp.value(source), mask)
        name = next_register(name)
    return True


def _always(warp: WarpState, i: Instruction, mask: Lanes) -> bool:
    # A barrier that is waited for is eventually reached.
    if is_predicate(i.operands[0]):
        warp.put_truth(i.operands[0], np.ones(LANES, bool), mask)
    return True


HANDLERS: dict[str, Callable[[WarpState, Instruction, Lanes], bool]] = {
    "MOV": _move, "UMOV": _move, "S2R": _move, "S2UR": _move, "LDC": _constant, "ULDC": _constant, "CS2R": _zero_pair,
    "HFMA2": _half_constant, "R2UR": _first_lane, "IADD3": _add, "UIADD3": _add, "VIADD": _add, "IADD": _add,
    "IMAD": _multiply, "UIMAD": _multiply, "LEA": _shifted_add, "ULEA": _shifted_add, "SHF": _shift, "USHF": _shift,
    "LOP3": _logic, "ULOP3": _logic, "PLOP3": _logic_of_predicates, "UPLOP3": _logic_of_predicates,
    "ISETP": _set_predicate, "UISETP": _set_predicate, "SEL": _select, "USEL": _select, "IMNMX": _least,
    "UIMNMX": _least, "VIMNMX": _least, "VIADDMNMX": _least, "PRMT": _permute, "UPRMT": _permute, "SGXT": _extend_sign,
    "USGXT": _extend_sign, "IABS": _absolute, "I2F": _float_of, "MUFU": _reciprocal, "F2I": _whole_of,
    "P2R": _pack_predicates, "UP2UR": _pack_predicates, "R2P": _unpack_predicates, "LDG": _global_memory, "STG": _global_memory,
    "LDGSTS": _global_memory, "RED": _global_memory, "LDL": _local_memory, "STL": _local_memory, "SYNCS": _always,
}  # fmt: skip
