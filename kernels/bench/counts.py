"""Count instructions and bytes of every launch at the benchmark's shapes without a GPU, with the floors of known cards.

Each launch is built as for a GPU (`launches`) and disassembled (`machine_code`). Some of its programs are executed warp by warp
as far as integers go (`warp`), so loops run as often as on a GPU. An instruction costs one issue slot of one of an SM's four
schedulers, so the issue floor is the count over SMs x 4 x clock. The memory floor is the bytes that the call must move over the
bandwidth of a copy. No launch can be faster than the larger of the two.
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
    """A GPU.

    Attributes:
        sms: streaming multiprocessors.
        clock: their clock under load, in Hz.
        bandwidth: bytes/s of a copy, read and written.
    """

    sms: int
    clock: float
    bandwidth: float


# Bandwidths: H100, the fastest kernel of the stored step's trace; H200, a copy timed once; A100 (80 GB), its data sheet.
# Clocks: an H100's under load, assumed for the H200 too; the A100's boost. kernels.bench.gpu measures both.
CARDS = {
    "A100": Card(108, 1.41e9, 2.04e12),
    "H100": Card(132, 1.755e9, 3.0e12),
    "H200": Card(132, 1.755e9, 4.3e12),
}
SCHEDULERS = 4
ARCHITECTURES = {80: ("A100",), 90: ("H100", "H200")}
# Kernel argument with the number of programs after which a launch's kinds of programs repeat.
PERIODS = dict.fromkeys(("_branches", "_stage", "_gather_stage", "_weight_sums"), "per_stripe")
# If all programs of a launch are alike, at most SAMPLED are executed, far apart, until ENOUGH instructions are.
SAMPLED, ENOUGH = 32, 100_000
# Work of one warp instruction: a matrix product of 16 x 8 x 16, or an access of 16 bytes a lane.
PRODUCT = 16 * 8 * 16
WIDEST = 16 * 32

STAGE = (16, 512, 512)
BASE, LEVELS = 8, 5
# Suffix of the names of launches that no GPU has timed yet.
NEXT = ", next"


class Norm(NamedTuple):
    """Batch norm and ReLU of an encoder level.

    Attributes:
        level: level, 1 first.
        of_sums: whether the operator that made its input has summed it.
    """

    level: int
    of_sums: bool


class Next(NamedTuple):
    """A part with the launches that no GPU has timed yet.

    Attributes:
        level: decoder level, 1 first.
        channels: C and K of a 3x3 convolution of level 1, or None for the decoder level's stage.
    """

    level: int
    channels: tuple[int, int] | None = None


# Decoder levels with new launches, and the convolutions of level 1: the first, those of equal width, and the merge.
NEXT_LEVELS, CONVOLUTIONS = (1, 2), ((3, BASE), (BASE, BASE), (LEVELS * BASE, BASE))
# The benchmark: decoder levels, new launches, the loss (size of logits, labels, suffix of the name), and norms.
PARTS: tuple[int | Next | tuple[tuple[int, int, int, int], torch.dtype, str] | Norm, ...] = (
    *range(1, LEVELS),
    *(Next(u) for u in NEXT_LEVELS),
    *(Next(1, channels) for channels in CONVOLUTIONS),
    ((16, 1, 1024, 1024), torch.uint8, ""),
    ((16, 1, 1024, 1024), torch.int64, ", int64 labels"),
    ((8, 19, 512, 512), torch.uint8, ", 19 classes"),
    ((16, 1, 1024, 1024), torch.uint8, NEXT),
    Norm(1, False), Norm(1, True), Norm(3, False),
)  # fmt: skip
# Names of the launches of the norm.
NORMS = {
    "batch_norm_sums": "sums", "batch_norm_statistics": "statistics", "batch_norm_relu": "normalise",
    "batch_norm_gradient_sums": "gradient sums", "batch_norm_coefficients": "gradient coefficients",
    "batch_norm_input_gradient": "input gradient",
}  # fmt: skip


class Count(NamedTuple):
    """What a whole launch issues and moves.

    Attributes:
        instructions: warp instructions.
        by_kind: warp instructions by kind.
        load_widths: loads of global memory by bytes a lane.
        store_widths: stores to global memory by bytes a lane.
        loaded: bytes loaded.
        stored: bytes stored.
        touched: bytes of the sectors touched, or None if addresses are unknown.
    """

    instructions: float
    by_kind: dict[str, float]
    load_widths: dict[int, float]
    store_widths: dict[int, float]
    loaded: float
    stored: float
    touched: float | None


def sampled(launch: TritonLaunch) -> tuple[list[int], bool]:
    """Choose the programs of a launch to execute.

    Returns:
        Programs, and whether all of them must be executed: they are one period of the launch's kinds, or all its programs. Else
        they are far apart, and a few of them are enough.
    """
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    if period := launch.named.get(PERIODS.get(launch.build.name, ""), 0):
        # Choose programs away from the border of an image, which are most of them.
        start = int(0.382 * total) // period * period
        return list(range(start, min(start + period, total))), True
    few = min(total, SAMPLED)
    return [(2 * i + 1) * total // (2 * few) for i in range(few)], total <= few


def executed(launch: TritonLaunch, architecture: int, programs: list[int], most: int | None = None) -> list[Warp]:
    """Execute programs of a launch, all of their warps.

    Args:
        launch: launch as `Launches` collects it.
        architecture: 80 or 90.
        programs: numbers of the programs.
        most: number of instructions after which no further program starts, or None for no limit.

    Raises:
        Unresolved: if control flow or addresses depend on more than integers.
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
    """Count what a whole launch does, from some of its programs.

    Args:
        launch: launch as `Launches` collects it.
        architecture: 80 or 90.

    Raises:
        Unresolved: if control flow or addresses depend on more than integers.
    """
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
    """Estimate the warp instructions of a library's launch.

    It counts products by mma.sync, which cuDNN uses for this network on an H100, and accesses of 16 bytes a lane. Instructions
    for addresses are not included.
    """
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
    """Return the forward call of decoder level u, 1 first, on meta tensors at the benchmark's size, and its pixels."""
    N, H, W = STAGE[0], STAGE[1] >> (u - 1), STAGE[2] >> (u - 1)
    K = BASE << (u - 1)
    factors = [1 << j for j in range(LEVELS - u)] + [2]
    maps = [meta(N, K * s, H // s, W // s).requires_grad_() for s in factors]
    weights = [meta(K, K * s, 3, 3).requires_grad_() for s in factors]
    return lambda: kernels.deep_skip(maps, weights), N * H * W


def convolution(C: int, K: int) -> tuple[Callable[[], Tensor], int]:
    """Return the forward call of a 3x3 convolution of level 1 on meta tensors, and its pixels; an image needs no gradient."""
    N, H, W = STAGE
    x, weight = meta(N, C, H, W).requires_grad_(C >= BASE), meta(K, C, 3, 3).requires_grad_()
    return lambda: kernels.conv3(x, weight), N * H * W


def loss(size: tuple[int, int, int, int], labels: torch.dtype) -> Callable[[], Tensor]:
    """Return a call of the loss on meta tensors of a size."""
    N, _, H, W = size
    logits = meta(*size, last=False).requires_grad_()
    target = meta(N, H, W, dtype=labels)
    return lambda: kernels.loss_of_sums(kernels.bce_dice_sums(logits, target))[0]


def norm(part: Norm) -> tuple[Callable[[], Tensor], tuple[int, int, int, int]]:
    """Return the forward call of a level's batch norm and ReLU on meta tensors, and the size of its map."""
    N, H, W = STAGE[0], STAGE[1] >> (part.level - 1), STAGE[2] >> (part.level - 1)
    C = BASE << (part.level - 1)
    x = meta(N, C, H, W).requires_grad_()
    weight, bias, mean, var = (meta(C, dtype=torch.float32) for _ in range(4))
    # Assume an operator whose programs make two thousand pixels each.
    rows = meta(N * H * W // 2048, 2, C, dtype=torch.float32) if part.of_sums else None
    settings = (weight.requires_grad_(), bias.requires_grad_(), mean, var, True, 0.1, 1e-5)
    return lambda: kernels.batch_norm_relu(x, *settings, rows), (N, C, H, W)


def collected_norm(architecture: int, part: Norm) -> Iterator[tuple[str, str, int, list[Started]]]:
    """Yield the launches of batch norm and ReLU, as `collected` does."""
    call, size = norm(part)
    seen = Launches(architecture)
    with seen.watching("next"):
        out = call()
        out.backward(torch.empty_like(out))
    for one in seen.started:
        if one.launch is not None:
            name = f"level {part.level} norm + ReLU, {NORMS[one.launch.build.name]}"
            name += " of given rows" if part.of_sums and one.moved.operator == "batch_norm_statistics" else ""
            # The other launches are the same.
            if not part.of_sums or name.endswith("rows"):
                yield f"{name}, next", " x ".join(map(str, size)), size[0] * size[2] * size[3], [one]


def collected(architecture: int, part: Any) -> Iterator[tuple[str, str, int, list[Started]]]:
    """Yield the launches of a part of the benchmark.

    Yields:
        Name, shape, pixels of output, and the launches of that name in order.
    """
    if isinstance(part, Norm):
        yield from collected_norm(architecture, part)
        return
    seen = Launches(architecture)
    if isinstance(part, int | Next):
        level = part if isinstance(part, int) else part.level
        channels = None if isinstance(part, int) else part.channels
        call, pixels = stage(level) if channels is None else convolution(*channels)
        what = "stage" if channels is None else f"conv3 {channels[0]} -> {channels[1]}"
        with seen.watching("next" if isinstance(part, Next) else "triton"):
            out = call()
            forward = len(seen.started)
            out.backward(torch.empty_like(out))
        shape = f"{STAGE[0]} x {STAGE[1] >> (level - 1)} x {STAGE[2] >> (level - 1)}, b = {BASE}"
        suffix = ", next" if isinstance(part, Next) else ""
        yield f"level {level} {what} forward{suffix}", shape, pixels, seen.started[:forward]
        yield f"level {level} {what} backward{suffix}", shape, pixels, seen.started[forward:]
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
    """Return the row of one launch; `counted` says whether it is counted from machine code or a library's estimate."""
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
    """Return a Markdown table of the rows, with the launches of one name added up."""
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
