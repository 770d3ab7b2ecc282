"""Candidate shapes of the launches: their names, their builds, and calls that use them instead of the shapes in use."""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from deepskip import kernels
from deepskip.kernels import (
    backend,
    batch_norm_triton,
    bce_dice_triton,
    bce_dice_wide_triton,
    deep_skip_triton,
    subpixel,
    subpixel_triton,
)
from deepskip.kernels.bench import cases, gpu_norms, gpu_part, machine_code, measure
from deepskip.kernels.bench.counts import NEXT
from deepskip.kernels.bench.launches import Launches, meta


class Candidate(NamedTuple):
    """A shape of one launch.

    Attributes:
        operator: name of the operator.
        case: name of the size.
        level: level of the network, 0 for the loss.
        shape: (N, H, W) of the level, or (N, V, H, W) of the logits.
        settings: settings that replace the ones in use.
        taken: whether these are the settings in use.
    """

    operator: str
    case: str
    level: int
    shape: tuple[int, ...]
    settings: tuple[tuple[str, int], ...]
    taken: bool

    @property
    def name(self) -> str:
        """The settings as text."""
        return ", ".join(f"{key} {value}" for key, value in self.settings)


# In backward the matrix product sums over factor x window columns, and needs 16 or more in bf16.
WINDOWS, CHANNELS, WARPS = (8, 16), (8, 16, 32), (1, 2, 4, 8)
# Processes that build, each with its own torch in memory.
MOST_BUILDERS = 16
# Cells of a product in the sub-pixel stage.
CELLS = (32, 64, 128)
BLOCKS, PROGRAMS, TILES = (512, 1024, 2048, 4096), (1024, 2048, 4096), (1024, 2048, 4096)
# Of batch norm: loads in flight, warps, and 4, 6 and 8 programs for each of an H100's SMs. Two levels are enough.
LOADS, NORM_WARPS, NORM_PROGRAMS, NORM_LEVELS = (2, 4, 8), (2, 4, 8), (528, 792, 1056), 2
NORM_OPERATORS = ("batch_norm_statistics", "normalise_relu", "normalise_relu_gradient")

# Of the new launches: bytes that a lane loads, warps, and about how many programs there are.
WIDE_LOADS, WIDE_WARPS, WIDE_PROGRAMS = (8, 16, 32), (1, 2, 4), (2048, 4096, 8192)


def _stages(size: tuple[int, int, int], levels: tuple[int, ...]) -> Iterator[Candidate]:
    N, H, W = size
    for u in levels:
        K = cases.BASE << (u - 1)
        stripe = max(2, 1 << (cases.LEVELS - u - 1))
        shape = N, H >> (u - 1), W >> (u - 1)
        for operator, backward in (("spread_taps", False), ("gather_taps", True)):
            taken = deep_skip_triton.HALF[stripe][backward]
            for window in WINDOWS:
                for channels in (c for c in CHANNELS if c <= max(K, 8)):
                    for warps in WARPS:
                        settings = (("window", window), ("channels", channels), ("warps", warps))
                        mine = taken._replace(channels=min(taken.channels, max(K, 8))) == (window, channels, warps)
                        name = f"level {u}, {N}x{shape[1]}x{shape[2]}"
                        yield Candidate(operator, name, u, shape, settings, mine)


def _norms(size: tuple[int, int, int], levels: tuple[int, ...]) -> Iterator[Candidate]:
    N, H, W = size
    for u in levels[:NORM_LEVELS]:
        shape = N, H >> (u - 1), W >> (u - 1)
        name = f"{gpu_norms.norm_name(u)}, {'x'.join(map(str, shape))}"
        for operator, loads, warps in itertools.product(NORM_OPERATORS, LOADS, NORM_WARPS):
            # Normalizing alone has no rows.
            for programs in (batch_norm_triton.MAX_PROGRAMS,) if operator == "normalise_relu" else NORM_PROGRAMS:
                settings = (("LOADS", loads), ("WARPS", warps), ("MAX_PROGRAMS", programs))
                mine = all(getattr(batch_norm_triton, setting) == value for setting, value in settings)
                yield Candidate(operator, name, u, shape, settings, mine)


def _next_stages(size: tuple[int, int, int], levels: tuple[int, ...]) -> Iterator[Candidate]:
    N, H, W = size
    # More channels use today's launches.
    for u in (u for u in levels if cases.BASE << (u - 1) <= subpixel.MOST_OUTPUTS):
        shape = N, H >> (u - 1), W >> (u - 1)
        for operator in ("subpixel_stage", "subpixel_stage_gradients"):
            for block in CELLS:
                for warps in WARPS:
                    settings = (("BLOCK", block), ("WARPS", warps))
                    mine = all(getattr(subpixel_triton, setting) == value for setting, value in settings)
                    yield Candidate(operator, f"level {u}, {N}x{shape[1]}x{shape[2]}, next", u, shape, settings, mine)


def _losses(sizes: tuple[tuple[int, int, int, int], ...]) -> Iterator[Candidate]:
    for size in sizes:
        name, key = "loss, " + "x".join(map(str, size)), "SIGMOID_BLOCK" if size[1] == 1 else "SOFTMAX_TILE"
        for operator in ("bce_dice_sums", "bce_dice_gradient"):
            for block in BLOCKS if size[1] == 1 else TILES:
                for warps in WARPS:
                    # The number of programs matters only for the sums.
                    for programs in PROGRAMS if operator == "bce_dice_sums" else (bce_dice_triton.MAX_PROGRAMS,):
                        settings = ((key, block), ("WARPS", warps), ("MAX_PROGRAMS", programs))
                        mine = all(getattr(bce_dice_triton, setting) == value for setting, value in settings)
                        yield Candidate(operator, name, 0, size, settings, mine)

        if size[1] == 1:
            yield from _wide_losses(name + NEXT, size)


def _wide_losses(name: str, size: tuple[int, int, int, int]) -> Iterator[Candidate]:
    for operator in ("bce_dice_sums", "bce_dice_gradient"):
        for load, warps, programs in itertools.product(WIDE_LOADS, WIDE_WARPS, WIDE_PROGRAMS):
            settings = (("LOAD", load), ("WARPS", warps), ("PROGRAMS", programs))
            mine = all(getattr(bce_dice_wide_triton, setting) == value for setting, value in settings)
            yield Candidate(operator, name, 0, size, settings, mine)


def all_of(
    stage: tuple[int, int, int], levels: tuple[int, ...], losses: tuple[tuple[int, int, int, int], ...],
    next_levels: tuple[int, ...] = (),
) -> list[Candidate]:  # fmt: skip
    """Return every candidate, one of each launch at a time, with the shapes in use first.

    Args:
        stage: (N, H, W) of level 1.
        levels: decoder levels.
        losses: (N, V, H, W) of logits.
        next_levels: decoder levels with the launches that no GPU has timed yet.
    """
    found: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in (
        *_stages(stage, levels),
        *_norms(stage, levels),
        *_losses(losses),
        *_next_stages(stage, next_levels),
    ):
        found.setdefault((candidate.operator, candidate.case), []).append(candidate)
    ordered = [sorted(some, key=lambda one: not one.taken) for some in found.values()]
    return [one for turn in itertools.zip_longest(*ordered) for one in turn if one is not None]


def built(
    sizes: gpu_part.Sizes, device: torch.device, left: Callable[[], float]
) -> Iterator[tuple[Candidate, int | None]]:
    """Yield candidates as their builds end, with the bytes that each spills a thread.

    The builds run first, in their own processes on all cores, and are then in Triton's cache on the disk for the timings.
    Candidates that differ only in their operator share a build.

    Args:
        sizes: what is measured.
        device: device of the timings; only a CUDA device builds.
        left: function that returns the seconds that are left.

    Yields:
        Candidate, and bytes spilled a thread or None if unknown.
    """
    found = all_of(sizes.stages[0], sizes.levels, sizes.losses[:2], sizes.next_levels)
    if device.type != "cuda":
        launches = {(one.operator, one.case) for one in found}
        yield from ((one, None) for one in found[: 2 * len(launches)])
        return
    major, minor = torch.cuda.get_device_capability(device)
    together: dict[tuple[Any, ...], list[Candidate]] = {}
    for one in found:
        together.setdefault((one.case, one.settings), []).append(one)
    pool = ProcessPoolExecutor(
        min(MOST_BUILDERS, len(os.sched_getaffinity(0))), multiprocessing.get_context("spawn"),
        initializer=gpu_part.die_with_parent,
    )  # fmt: skip
    try:
        jobs = {pool.submit(spilled, some[0], 10 * major + minor): some for some in together.values()}
        for job in as_completed(jobs, timeout=max(1.0, left())):
            by_operator = job.result()
            yield from ((one, by_operator.get(one.operator)) for one in jobs[job])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def patched(candidate: Candidate) -> Iterator[None]:
    """Make the operators launch the candidate's shape while the block runs."""
    settings = dict(candidate.settings)
    with ExitStack() as stack:
        if candidate.operator in NORM_OPERATORS:
            for key, value in settings.items():
                stack.enter_context(mock.patch.object(batch_norm_triton, key, value))
        elif "window" in settings:
            shape = deep_skip_triton.Shape(settings["window"], settings["channels"], settings["warps"])
            for table in (deep_skip_triton.HALF, deep_skip_triton.SINGLE):
                stack.enter_context(mock.patch.dict(table, dict.fromkeys(table, (shape, shape))))
        else:
            is_next = candidate.case.endswith(NEXT)
            stack.enter_context(backend.chosen("next" if is_next else "triton"))
            module = bce_dice_wide_triton if is_next else bce_dice_triton
            for key, value in settings.items():
                stack.enter_context(mock.patch.object(subpixel_triton if candidate.level else module, key, value))
        yield


def _operator_call(
    candidate: Candidate, make: Callable[[], tuple[Any, ...]], device: torch.device
) -> Callable[[], Any]:
    operator = getattr(torch.ops.deepskip, candidate.operator).default
    return measure.rotated(operator, *make(), device=device)


def _subpixel_arguments(
    candidate: Candidate, factors: list[int], dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    N, H, W = candidate.shape
    tensors = cases.level_inputs(candidate.level, N, H, W, dtype, torch.channels_last, device)
    inputs, weights = ([x.detach() for x in some] for some in tensors)
    K = weights[0].shape[0]
    near = [i for i, s in enumerate((1, *factors)) if s in subpixel.NEAR]
    far = [i for i, s in enumerate((1, *factors)) if s not in subpixel.NEAR]
    maps, kernel_weights, deeper = [inputs[i] for i in near], [weights[i] for i in near], [factors[i - 1] for i in far]
    if candidate.operator == "subpixel_stage":
        taps = [torch.randn(N, H // s, W // s, 9 * K, device=device).to(dtype) for s in deeper]
        return maps, kernel_weights, taps, [*near, *far], "bilinear"
    grad = torch.randn(N, K * len(inputs), H, W, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return grad, maps, kernel_weights, deeper, [*near, *far], "bilinear", [True] * (2 * len(near))


def call(candidate: Candidate, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    """Return a call of the candidate's operator alone, with inputs of its size."""
    if candidate.operator in NORM_OPERATORS:
        inputs = gpu_norms.operator_inputs(candidate.level, candidate.shape, dtype, device)
        return _operator_call(candidate, lambda: inputs[candidate.operator], device)
    if candidate.level:
        N, H, W = candidate.shape
        K = cases.BASE << (candidate.level - 1)
        factors = [*(2**j for j in range(1, cases.LEVELS - candidate.level)), 2]

        def stage() -> tuple[Any, ...]:
            if candidate.operator.startswith("subpixel"):
                return _subpixel_arguments(candidate, factors, dtype, device)
            if candidate.operator == "spread_taps":
                own = torch.randn(N, K, H, W, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
                taps = [torch.randn(N, H // s, W // s, 9 * K, device=device).to(dtype) for s in factors]
                return own, taps, "bilinear"
            wide = torch.randn(N, K * (len(factors) + 1), H, W, device=device).to(dtype)
            return wide.contiguous(memory_format=torch.channels_last), factors, "bilinear"

        return _operator_call(candidate, stage, device)
    logits, target = (x.detach() for x in cases.loss_inputs(candidate.shape, dtype, device))

    def loss() -> tuple[Any, ...]:
        if candidate.operator == "bce_dice_sums":
            return logits, target, None, 0.5, 255
        return torch.randn(2 + 3 * logits.shape[1], device=device), logits, target, None, 0.5, 255

    return _operator_call(candidate, loss, device)


def spilled(candidate: Candidate, architecture: int) -> dict[str, int]:
    """Build the launches of a candidate's call, in bf16 and without a GPU.

    Args:
        candidate: candidate to build.
        architecture: 80 or 90.

    Returns:
        Bytes spilled a thread, by operator; empty if the build fails.
    """
    seen = Launches(architecture)
    norm = candidate.operator in NORM_OPERATORS
    try:
        with patched(candidate), seen.watching("next" if norm or candidate.case.endswith(NEXT) else "triton"):
            if norm:
                N, H, W = candidate.shape
                C = cases.BASE << (candidate.level - 1)
                weight, bias, mean, var = (meta(C, dtype=torch.float32) for _ in range(4))
                x = meta(N, C, H, W).requires_grad_()
                out = kernels.batch_norm_relu(x, weight, bias, mean, var, True, 0.1, 1e-5)
            elif candidate.level:
                N, H, W = candidate.shape
                K = cases.BASE << (candidate.level - 1)
                factors = [1, *(2**j for j in range(1, cases.LEVELS - candidate.level)), 2]
                maps = [meta(N, K * s, H // s, W // s).requires_grad_() for s in factors]
                out = kernels.deep_skip(maps, [meta(K, K * s, 3, 3).requires_grad_() for s in factors])
            else:
                N, V, H, W = candidate.shape
                target = meta(N, H, W, dtype=torch.uint8)
                out = kernels.bce_dice_sums(meta(N, V, H, W, last=False).requires_grad_(), target)
            out.backward(torch.empty_like(out))
    # Whatever the error is, timing the shape on the card reports it again.
    except Exception as error:
        print(f"{candidate.case}, {candidate.name} failed to build: {' '.join(str(error).split())[:300]}", flush=True)
        return {}
    found: dict[str, int] = {}
    for one in seen.started:
        if one.launch is not None:
            spills = machine_code.resources(one.launch.build.asm["cubin"])["spills"]
            found[one.moved.operator] = found.get(one.moved.operator, 0) + spills
    return found
