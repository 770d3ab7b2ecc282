"""The phases of a GPU run that need the kernels alone; `gpu` starts python -m kernels.bench.gpu_phases PHASE ... --out DIR."""

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    # before Triton is first imported: its kernels are made for the interpreter as they are read
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import reference
from kernels.bench import candidates, cases, journal, measure, opponents

Row = dict[str, Any]


class Sizes(NamedTuple):
    """What is measured: (N, H, W) of level 1, levels, (N, V, H, W) of the loss, bytes moved; calls before timing, and timed."""

    stages: tuple[tuple[int, int, int], ...]
    levels: tuple[int, ...]
    losses: tuple[tuple[int, int, int, int], ...]
    bandwidths: tuple[int, ...]
    warm: int
    rounds: int
    dtype: torch.dtype
    checked: tuple[torch.dtype, ...]


# the norm of what is wrong by rounding: taps and sums are rounded once or twice each
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
REAL = Sizes(
    ((16, 512, 512), (8, 1024, 1024)), (1, 2, 3, 4),
    ((16, 1, 1024, 1024), (8, 19, 512, 512), (4, 1, 128, 128), (32, 1, 512, 512)),
    (2**30, 2**31, 2**32), 3, 30, torch.bfloat16, tuple(TOLERANCES),
)  # fmt: skip
TOY = Sizes(((1, 16, 16),), (3,), ((2, 1, 8, 8), (1, 3, 8, 8)), (2**20,), 0, 1, torch.float32, (torch.float16,))


class Run(NamedTuple):
    """Where a phase runs: the device, what it measures, when it must have ended, and what goes to torch.compile."""

    device: torch.device
    sizes: Sizes
    until: float
    compile_options: dict[str, Any]

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.time()


def error_of(ours: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over that of the exact values."""
    return float((ours.double() - exact).norm() / exact.norm())


def timed(run: Run, row: Row, calls: Mapping[str, Callable[[], Any]]) -> Row:
    """Time a call, in turns with others where there are any; the row gets all seconds, the first call's under "seconds"."""
    times = measure.turns(calls, run.sizes.rounds, run.device, run.sizes.warm)
    first, *others = calls
    return row | {"seconds": times[first]} | {f"{name}_seconds": times[name] for name in others}


def machine(run: Run) -> Iterator[Row]:
    """Tell what the numbers are taken on."""
    yield {"suite": "environment", **measure.environment(run.device)}


def bandwidth(run: Run) -> Iterator[Row]:
    """Measure copying, reading and writing."""
    for size in run.sizes.bandwidths:
        for kind in ("copy", "read", "write"):
            yield {
                "suite": "bandwidth", "implementation": kind, "bytes": size,
                "seconds": measure.bandwidth_seconds(kind, size, run.device, run.sizes.rounds),
            }  # fmt: skip


def gate(run: Run) -> Iterator[Row]:
    """Compare every operator, values and gradients, with float64; what is wrong here is timed nowhere."""
    N, H, W = run.sizes.stages[0]
    for dtype in run.sizes.checked:
        for u in run.sizes.levels:
            small = max(1, N // 4), H >> (u - 1), W >> (u - 1)
            for layout in (torch.channels_last, torch.contiguous_format):
                inputs, weights = cases.level_inputs(u, *small, dtype, layout, run.device)
                leaves = [*inputs, *weights]
                out = kernels.deep_skip(inputs, weights)
                grad = torch.randn_like(out)
                ours = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
                exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
                exact_out = reference.deep_skip(exact_leaves[: len(inputs)], exact_leaves[len(inputs) :])
                exact = [exact_out.detach(), *torch.autograd.grad(exact_out, exact_leaves, grad.double())]
                errors = [error_of(one, other) for one, other in zip(ours, exact, strict=True)]
                yield {
                    "suite": "gate", "operator": f"level {u} stage", "dtype": str(dtype), "layout": str(layout),
                    "error": max(errors), "tolerance": TOLERANCES[dtype], "right": max(errors) <= TOLERANCES[dtype],
                }  # fmt: skip
        for N_, V, H_, W_ in {(2, size[1], min(size[2], 256), min(size[3], 256)) for size in run.sizes.losses}:
            for labels in (torch.uint8, torch.int64):
                logits, target = cases.loss_inputs((N_, V, H_, W_), dtype, run.device)
                target = target.to(labels)
                target[:, :2] = 255
                weight = torch.tensor([1.0, 0.5], device=run.device)
                found = []
                for form, z in ((kernels, logits), (reference, logits.detach().double().requires_grad_())):
                    sums = form.bce_dice_sums(z, target, alpha=0.3, sample_weight=weight.to(z.dtype))
                    value = form.loss_of_sums(sums)[0]
                    found.append([value.detach(), *torch.autograd.grad(value, z)])
                errors = [error_of(one, other) for one, other in zip(*found, strict=True)]
                yield {
                    "suite": "gate", "operator": "loss", "dtype": str(dtype), "labels": str(labels), "classes": V,
                    "error": max(errors), "tolerance": TOLERANCES[dtype], "right": max(errors) <= TOLERANCES[dtype],
                }  # fmt: skip


class _OurCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deepskip":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def stage_step(stage: cases.Stage, tensors: tuple[list[Tensor], list[Tensor]], grad: Tensor) -> list[Tensor]:
    """Run a stage forward and backward."""
    return cases.gradients(stage(*tensors), grad, [*tensors[0], *tensors[1]])


def stage_forward(stage: cases.Stage, tensors: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """Run a stage forward alone."""
    with torch.no_grad():
        return stage(*tensors)


def loss_step(loss: opponents.Loss, logits: Tensor, target: Tensor) -> Tensor:
    """Run a loss forward and backward."""
    return torch.autograd.grad(loss(logits, target), logits)[0]


def levels(run: Run) -> Iterator[tuple[str, int, tuple[int, int, int]]]:
    """Yield every size's levels: name, level, (N, H, W)."""
    for N, H, W in run.sizes.stages:
        for u in run.sizes.levels:
            yield f"level {u}, {N}x{H >> (u - 1)}x{W >> (u - 1)}", u, (N, H >> (u - 1), W >> (u - 1))


def launches(run: Run) -> Iterator[Row]:
    """Time each of our operators by itself, as the stage and the loss call it, and the stage and the loss whole."""
    for size, u, shape in levels(run):
        tensors = cases.level_inputs(u, *shape, run.sizes.dtype, torch.channels_last, run.device)
        with _OurCalls() as seen:
            out = kernels.deep_skip(*tensors)
            grad = torch.randn_like(out)
            torch.autograd.grad(out, [*tensors[0], *tensors[1]], grad)
        row = {"suite": "launches", "size": size, "dtype": str(run.sizes.dtype)}
        for operator, arguments in seen.calls:
            call = measure.rotated(operator, *arguments, device=run.device)
            yield timed(run, row | {"operator": operator._opname}, {"": call})
        forward, step = (
            partial(stage_forward, kernels.deep_skip, tensors),
            partial(stage_step, kernels.deep_skip, tensors, grad),
        )
        yield timed(run, row | {"operator": "stage forward"}, {"": forward})
        yield timed(run, row | {"operator": "stage forward + backward"}, {"": step})
    for logits_shape in run.sizes.losses:
        logits, target = cases.loss_inputs(logits_shape, run.sizes.dtype, run.device)
        with _OurCalls() as seen:
            loss_step(opponents.fused, logits, target)
        row = {"suite": "launches", "size": "loss, " + "x".join(map(str, logits_shape)), "dtype": str(run.sizes.dtype)}
        for operator, arguments in seen.calls:
            call = measure.rotated(operator, *arguments, device=run.device)
            yield timed(run, row | {"operator": operator._opname}, {"": call})
        yield timed(
            run, row | {"operator": "loss + gradient"}, {"": partial(loss_step, opponents.fused, logits, target)}
        )


def candidate_shapes(run: Run) -> Iterator[Row]:
    """Time every shape of a launch that compiles without spilling, beside the one that the product takes."""
    toy = run.device.type != "cuda"
    found = candidates.all_of(run.sizes.stages[0], run.sizes.levels, run.sizes.losses[:2], toy)
    spills: dict[candidates.Candidate, Any] = dict.fromkeys(found)
    if not toy:
        # built beforehand, on all cores: the cache on the disk has them when they are timed
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            capability = torch.cuda.get_device_capability()
            built = pool.map(partial(candidates.spilled, architecture=10 * capability[0] + capability[1]), found)
            spills = dict(zip(found, built, strict=True))
    for candidate in found:
        row = {
            "suite": "candidates", "size": candidate.case, "operator": candidate.operator,
            "implementation": candidate.name, "taken": candidate.taken,
        }  # fmt: skip
        if spills[candidate]:
            yield row | {"unbuilt" if isinstance(spills[candidate], str) else "spills": spills[candidate]}
            continue
        call = candidates.call(candidate, run.sizes.dtype, run.device)
        with candidates.patched(candidate):
            yield timed(run, row, {"": call})


def contenders(run: Run) -> Iterator[Row]:
    """Time eager PyTorch, torch.compile and other people's losses, each in turns with ours."""
    for size, u, shape in levels(run):
        for name in ("plain, channels last", "plain, contiguous", "torch.compile, channels last"):
            stage, layout = cases.stages(**run.compile_options)[name]
            ours = cases.level_inputs(u, *shape, run.sizes.dtype, torch.channels_last, run.device)
            theirs = cases.level_inputs(u, *shape, run.sizes.dtype, layout, run.device)
            grad = torch.randn_like(stage_forward(stage, theirs))
            row: Row = {
                "suite": "stage contenders",
                "size": size,
                "implementation": name,
                "dtype": str(run.sizes.dtype),
            }
            for what, function, more in (("forward", stage_forward, ()), ("forward + backward", stage_step, (grad,))):
                pair: dict[str, Callable[[], Any]] = {
                    "": measure.rotated(partial(function, stage), theirs, *more, device=run.device),
                    "deepskip": measure.rotated(partial(function, kernels.deep_skip), ours, *more, device=run.device),
                }
                extra: Row = {"operator": what}
                for side, form, tensors in (("", stage, theirs), ("deepskip_", kernels.deep_skip, ours)):
                    every = (*tensors[0], *tensors[1])
                    extra[f"{side}saved_bytes"] = measure.saved_bytes(partial(form, *tensors), every)
                    extra[f"{side}peak_bytes"] = measure.peak_bytes(pair[side.rstrip("_")], run.device)
                yield timed(run, row | extra, pair)
    for logits_shape in run.sizes.losses:
        for name, loss in opponents.all_of(logits_shape[1], **run.compile_options).items():
            if name == "deepskip":
                continue
            inputs = cases.loss_inputs(logits_shape, run.sizes.dtype, run.device)
            row = {
                "suite": "loss contenders", "size": "x".join(map(str, logits_shape)), "implementation": name,
                "dtype": str(run.sizes.dtype), "bytes": cases.loss_bytes(logits_shape, run.sizes.dtype),
                "peak_bytes": measure.peak_bytes(partial(loss_step, loss, *inputs), run.device),
            }  # fmt: skip
            pair = {
                side: measure.rotated(partial(loss_step, form), *inputs, device=run.device)
                for side, form in (("", loss), ("deepskip", opponents.fused))
            }
            yield timed(run, row, pair)


def autotune(run: Run) -> Iterator[Row]:
    """Time level 1 of torch.compile's widest search, which may not end in time."""
    options = run.compile_options or {"mode": "max-autotune-no-cudagraphs"}
    size, u, shape = next(levels(run))
    tensors = cases.level_inputs(u, *shape, run.sizes.dtype, torch.channels_last, run.device)
    stage = cases.compiled(reference.deep_skip, **options)
    row = {"suite": "stage contenders", "size": size, "implementation": "torch.compile, max-autotune"}
    row["dtype"] = str(run.sizes.dtype)
    forms = {"": stage, "deepskip": kernels.deep_skip}
    forward = {name: partial(stage_forward, form, tensors) for name, form in forms.items()}
    yield timed(run, row | {"operator": "forward"}, forward)
    grad = torch.randn_like(stage_forward(stage, tensors))
    both = {name: partial(stage_step, form, tensors, grad) for name, form in forms.items()}
    yield timed(run, row | {"operator": "forward + backward"}, both)


Phase = Callable[[Run], Iterator[Row]]
PHASES: dict[str, Phase] = {
    "machine": machine, "bandwidth": bandwidth, "gate": gate, "launches": launches, "candidates": candidate_shapes,
    "contenders": contenders, "autotune": autotune,
}  # fmt: skip


def wrong(out: Path) -> list[str]:
    """Name the operators that a gate found wrong."""
    rows, _ = journal.read(out / "rows.jsonl")
    return sorted({f"{row['operator']}, {row['dtype']}" for row in rows if row.get("right") is False})


def run_phases(phases: Mapping[str, Callable[[Run], Iterator[Row]]], names: list[str], out: Path, until: float) -> None:
    """Run phases one after the other and append their rows; one that fails leaves a row that says so, and the next runs."""
    cuda = torch.cuda.is_available()
    # the interpreter is asked for where there is no GPU, and a compiler that takes minutes is not
    kernels.backend.choose("auto" if cuda else "triton")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    run = Run(device, REAL if cuda else TOY, until, {} if cuda else {"backend": "eager"})
    rows = out / "rows.jsonl"
    parent = os.getppid()
    for name in names:
        row: Row = {"phase": name, "toy": not cuda}
        if name not in ("machine", "bandwidth", "gate") and (operators := wrong(out)):
            journal.append(rows, row | {"suite": "run", "skipped": f"wrong beside float64: {'; '.join(operators)}"})
            continue
        try:
            for found in phases[name](run):
                journal.append(rows, row | found)
                if run.left() <= 0 or os.getppid() != parent:
                    journal.append(rows, row | {"suite": "run", "skipped": "the rest: no time was left"})
                    return
            if cuda:
                journal.append(rows, row | {"suite": "clocks", **measure.card_state()})
        except Exception as error:
            traceback.print_exc()
            journal.append(rows, row | {"suite": "run", "failed": f"{type(error).__name__}: {error}"})
            # an illegal access leaves the card's context unusable for the rest of this process
            if "CUDA error" in str(error):
                raise


def arguments_of(program: str, phases: list[str], about: str | None) -> argparse.Namespace:
    """Parse the command line of a part."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("phases", nargs="*", default=phases, help=f"of {', '.join(phases)}; all by default")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl")
    parser.add_argument("--until", type=float, default=time.time() + 540, help="Unix time at which it must have ended")
    arguments = parser.parse_args()
    if unknown := set(arguments.phases) - set(phases):
        parser.error(f"there is no phase {', '.join(sorted(unknown))}; phases are {', '.join(phases)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def main() -> None:
    """Run the phases that are named."""
    arguments = arguments_of("python -m kernels.bench.gpu_phases", list(PHASES), __doc__)
    run_phases(PHASES, arguments.phases, arguments.out, arguments.until)


if __name__ == "__main__":
    main()
