"""Instructions and bytes of every launch at the benchmark's shapes, counted without a GPU, beside the floors of known cards.

Each launch is built as a GPU would get it (`launches`), disassembled (`machine_code`), and some of its programs are executed
warp by warp as far as integers go (`warp`): loops run as often as they do there. An instruction costs one issue slot of one
of an SM's four schedulers, so the issue floor is the count over SMs x 4 x clock. The memory floor is the bytes that the call
cannot do without over the bandwidth of a copy. No launch can be faster than the larger of the two.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepskip import kernels
from deepskip.kernels.bench import machine_code
from deepskip.kernels.bench.launches import Launches, Started, TritonLaunch, meta
from deepskip.kernels.bench.warp import Warp


class Card(NamedTuple):
    """A GPU's SMs, their clock in Hz under load, and bytes/s of a copy (read and written)."""

    sms: int
    clock: float
    bandwidth: float


# bandwidths: H100, what the fastest kernel of the stored step's trace reaches; H200, a copy timed once; A100 (80 GB), its data
# sheet. clocks: an H100's under load, taken for the H200 too; the A100's boost. kernels.bench.gpu measures them anew
CARDS = {
    "A100": Card(108, 1.41e9, 2.04e12),
    "H100": Card(132, 1.755e9, 3.0e12),
    "H200": Card(132, 1.755e9, 4.3e12),
}
SCHEDULERS = 4
ARCHITECTURES = {80: ("A100",), 90: ("H100", "H200")}
# argument that says after how many programs a launch's kinds of programs come again
PERIODS = {"_branches": "per_stripe"}
# programs that are executed of a launch whose programs are all alike, far apart, until so many instructions are
SAMPLED, ENOUGH = 32, 100_000
# what one instruction of a warp can do: a matrix product of 16 x 8 x 16, an access of 16 bytes a lane
PRODUCT = 16 * 8 * 16
WIDEST = 16 * 32

STAGE = (16, 512, 512)
BASE, LEVELS = 8, 5
# what names of launches that no GPU has timed yet end with
NEXT = ", next"
# the benchmark: decoder levels, and the loss by size of logits, labels, and what the launches' names end with
PARTS: tuple[int | tuple[tuple[int, int, int, int], torch.dtype, str], ...] = (
    *range(1, LEVELS),
    ((16, 1, 1024, 1024), torch.uint8, ""),
    ((16, 1, 1024, 1024), torch.int64, ", int64 labels"),
    ((8, 19, 512, 512), torch.uint8, ", 19 classes"),
    ((16, 1, 1024, 1024), torch.uint8, NEXT),
)


class Count(NamedTuple):
    """What a whole launch issues and moves; bytes and sectors of global memory, by opcode widths."""

    instructions: float
    by_kind: dict[str, float]
    load_widths: dict[int, float]
    store_widths: dict[int, float]
    loaded: float
    stored: float
    touched: float | None


def sampled(launch: TritonLaunch) -> tuple[list[int], bool]:
    """Choose programs of a launch: one period of its kinds, all to be executed, or some far apart, of which a few will do."""
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    if period := launch.named.get(PERIODS.get(launch.build.name, ""), 0):
        # not at the border of an image: those are few
        start = int(0.382 * total) // period * period
        return list(range(start, min(start + period, total))), True
    few = min(total, SAMPLED)
    return [(2 * i + 1) * total // (2 * few) for i in range(few)], total <= few


def executed(launch: TritonLaunch, architecture: int, programs: list[int], most: int | None = None) -> list[Warp]:
    """Execute programs of a launch, all of their warps.

    Args:
        launch: as `Launches` collects it.
        architecture: 80 or 90.
        programs: their numbers.
        most: instructions after which no other program is begun; None for no bound.

    Raises:
        Unresolved: control flow or addresses that depend on more than integers.
    """
    code = machine_code.disassemble(launch.build.asm["cubin"])
    bank = launch.constants(architecture)
    across, down, _ = launch.grid
    warps: list[Warp] = []
    done = 0
    for program in programs:
        if most is not None and done > most:
            break
        block = (program % across, program // across % down, program // (across * down))
        for number in range(launch.build.metadata.num_warps):
            warps.append(Warp(code, bank, block, number))
            warps[-1].run()
            done += sum(warps[-1].issued.values())
    return warps


def count(launch: TritonLaunch, architecture: int) -> Count:
    """Count what a whole launch does by some of its programs; raises Unresolved as `executed` does."""
    programs, whole = sampled(launch)
    warps = executed(launch, architecture, programs, None if whole else ENOUGH)
    across, down, deep = launch.grid
    share = across * down * deep * launch.build.metadata.num_warps / len(warps)
    kinds: Counter[str] = Counter()
    widths: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
    loaded = stored = 0
    touched: int | None = 0
    for warp in warps:
        for place, times in warp.issued.items():
            kinds[machine_code.kind_of(warp.code[place].opcode)] += times
        for access in warp.accesses:
            stores = access.opcode.startswith("ST")
            widths[stores][access.width] += 1
            loaded += 0 if stores else access.width * access.lanes
            stored += access.width * access.lanes if stores else 0
            touched = None if touched is None or access.sectors is None else touched + 32 * access.sectors
    return Count(
        share * sum(kinds.values()), {kind: share * n for kind, n in kinds.most_common()},
        {width: share * n for width, n in sorted(widths[False].items())},
        {width: share * n for width, n in sorted(widths[True].items())},
        share * loaded, share * stored, None if touched is None else share * touched,
    )  # fmt: skip


def library_instructions(started: Started) -> float:
    """Estimate the warp instructions of a library's launch: products by mma.sync, as cuDNN's of this network are on an H100,
    and accesses of 16 bytes a lane; what it spends on addresses is not in it."""
    products = 0
    arguments = [x for x in started.arguments if isinstance(x, Tensor)]
    if started.moved.operator == "mm":
        products = arguments[0].shape[0] * arguments[0].shape[1] * arguments[1].shape[1]
    elif started.moved.operator == "convolution":
        x, weight = arguments[:2]
        products = x.numel() // x.shape[1] * weight.numel()
    elif started.moved.operator == "convolution_backward":
        grad, _, weight = arguments[:3]
        products = grad.numel() // grad.shape[1] * weight.numel()
    return products / PRODUCT + (started.moved.read + started.moved.written) / WIDEST


def stage(u: int) -> tuple[Callable[[], Tensor], int]:
    """Make the forward call of decoder level u, 1 first, on meta tensors at the benchmark's size, and its pixels."""
    N, H, W = STAGE[0], STAGE[1] >> (u - 1), STAGE[2] >> (u - 1)
    K = BASE << (u - 1)
    factors = [1 << j for j in range(LEVELS - u)] + [2]
    maps = [meta(N, K * s, H // s, W // s).requires_grad_() for s in factors]
    weights = [meta(K, K * s, 3, 3).requires_grad_() for s in factors]
    return lambda: kernels.deep_skip(maps, weights), N * H * W


def loss(size: tuple[int, int, int, int], labels: torch.dtype) -> Callable[[], Tensor]:
    """Make a call of the loss on meta tensors of a size."""
    N, _, H, W = size
    logits = meta(*size, last=False).requires_grad_()
    target = meta(N, H, W, dtype=labels)
    return lambda: kernels.loss_of_sums(kernels.bce_dice_sums(logits, target))[0]


def collected(architecture: int, part: Any) -> Iterator[tuple[str, str, int, list[Started]]]:
    """Yield what a part of the benchmark launches: name, shape, pixels of output, and the launches between in- and output."""
    seen = Launches(architecture)
    if isinstance(part, int):
        call, pixels = stage(part)
        with seen.watching():
            out = call()
            forward = len(seen.started)
            out.backward(torch.empty_like(out))
        shape = f"{STAGE[0]} x {STAGE[1] >> (part - 1)} x {STAGE[2] >> (part - 1)}, b = {BASE}"
        yield f"level {part} stage forward", shape, pixels, seen.started[:forward]
        yield f"level {part} stage backward", shape, pixels, seen.started[forward:]
        return
    size, labels, suffix = part
    with seen.watching("next" if suffix.endswith(NEXT) else "triton"):
        loss(size, labels)().backward()
    for operator, name in (
        ("bce_dice_sums", "loss sums"), ("loss_of_sums", "loss value"), ("loss_of_sums_gradient", "loss value gradient"),
        ("bce_dice_gradient", "loss gradient"),
    ):  # fmt: skip
        mine = [one for one in seen.started if one.moved.operator == operator]
        yield name + suffix, " x ".join(map(str, size)), size[0] * size[2] * size[3], mine


def row(name: str, shape: str, pixels: int, started: Started, architecture: int) -> dict[str, Any]:
    """Make the row of one launch; `counted` says whether it is of machine code, or a library's estimate."""
    moved = started.moved
    found: dict[str, Any] = {
        "launch": name, "kernel": f"{moved.operator} {moved.part}".strip(), "arch": f"sm_{architecture}", "shape": shape,
        "dtype": "bfloat16", "pixels": pixels, "bytes_per_pixel": (moved.read + moved.written) / pixels,
    }  # fmt: skip
    if started.launch is None:
        instructions = library_instructions(started)
        found |= {"counted": "estimate", "registers": None, "spills": None, "shared": None}
    else:
        counted = count(started.launch, architecture)
        instructions = counted.instructions
        build = started.launch.build
        found |= {
            "kernel": build.name, "counted": "machine code", "warps": build.metadata.num_warps,
            "programs": started.launch.grid[0] * started.launch.grid[1] * started.launch.grid[2],
            **machine_code.resources(build.asm["cubin"]), "shared": build.metadata.shared,
            "by_kind": {kind: n / pixels for kind, n in counted.by_kind.items()},
            "load_widths": {width: n / pixels for width, n in counted.load_widths.items()},
            "store_widths": {width: n / pixels for width, n in counted.store_widths.items()},
            "loaded_bytes_per_pixel": counted.loaded / pixels, "stored_bytes_per_pixel": counted.stored / pixels,
            "sector_bytes_per_pixel": None if counted.touched is None else counted.touched / pixels,
        }  # fmt: skip
    found["warp_instructions_per_pixel"] = instructions / pixels
    for card in ARCHITECTURES[architecture]:
        suffix = "" if card == ARCHITECTURES[architecture][0] else f"_{card.lower()}"
        sms, clock, bandwidth = CARDS[card]
        found[f"issue_floor_ms{suffix}"] = 1e3 * instructions / (sms * SCHEDULERS * clock)
        found[f"memory_floor_ms{suffix}"] = 1e3 * (moved.read + moved.written) / bandwidth
    return found | {"card": ARCHITECTURES[architecture][0]}


def rows(architecture: int, part: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part of the benchmark for an architecture."""
    for name, shape, pixels, started in collected(architecture, part):
        for one in started:
            yield row(name, shape, pixels, one, architecture)


def table(found: list[dict[str, Any]]) -> str:
    """Make a Markdown table of the rows, the launches of one name added up."""
    lines = [
        "| launch | code | warp instructions a pixel | ours alone | bytes a pixel | card | issue, ms | memory, ms |",
        "|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for name, arch in dict.fromkeys((one["launch"], one["arch"]) for one in found):
        mine = [one for one in found if (one["launch"], one["arch"]) == (name, arch)]
        instructions = [one["warp_instructions_per_pixel"] for one in mine]
        code = sum(x for x, one in zip(instructions, mine, strict=True) if one["counted"] == "machine code")
        for card in ARCHITECTURES[int(arch.removeprefix("sm_"))]:
            suffix = "" if card == mine[0]["card"] else f"_{card.lower()}"
            floors = [sum(one[f"{kind}_floor_ms{suffix}"] for one in mine) for kind in ("issue", "memory")]
            lines.append(
                f"| {name} | {arch} | {sum(instructions):.2f} | {code:.2f} | {sum(one['bytes_per_pixel'] for one in mine):.1f} "
                f"| {card} | {floors[0]:.3f} | {floors[1]:.3f} |"
            )
    return "\n".join(lines)
