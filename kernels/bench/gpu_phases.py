"""The phases of a GPU run that need only the kernels; `gpu` runs deepskip.kernels.bench.gpu_phases PHASE ... --out DIR."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepskip import kernels
from deepskip.kernels import reference
from deepskip.kernels.bench import candidates, cases, gpu_norms, measure, opponents
from deepskip.kernels.bench.gpu_part import Job, Phase, Row, Run, arguments_of, finite, run_phases, timed

# Errors of a norm that rounding explains. If the plain implementation in the same dtype is worse, three times its error.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PLAIN_FACTOR = 3.0
NEXT = candidates.NEXT
LAST, FIRST = torch.channels_last, torch.contiguous_format


def machine(run: Run) -> Iterator[Job]:
    """Report the environment of the measurements."""
    yield {"suite": "environment"}, lambda: measure.environment(run.device)


def bandwidth(run: Run) -> Iterator[Job]:
    """Measure copying, reading and writing."""
    for size in run.sizes.bandwidths:
        for kind in ("copy", "read", "write"):
            row = {"suite": "bandwidth", "implementation": kind, "bytes": size}
            yield (
                row,
                lambda kind=kind, size=size: {  # type: ignore[misc]
                    "seconds": measure.bandwidth_seconds(kind, size, run.device, run.sizes.rounds)
                },
            )


def judged(dtype: torch.dtype, ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> Row:
    """Compare values and gradients with exact ones; an error of nan is wrong.

    Args:
        dtype: dtype of the first two lists.
        ours: tensors of our implementation, of any shape (*,).
        plain: tensors of the plain implementation, of the same shapes.
        exact: the tensors in float64, of the same shapes.
    """
    errors, plains = (
        [float((one.double() - other).norm() / other.norm()) for one, other in zip(some, exact, strict=True)]
        for some in (ours, plain)
    )
    right = all(one <= max(TOLERANCES[dtype], PLAIN_FACTOR * other) for one, other in zip(errors, plains, strict=True))
    # max() returns or drops nan by its position.
    worst = max(errors) if all(error == error for error in errors) else float("nan")
    return {"error": finite(worst), "plain_error": finite(max(plains)), "tolerance": TOLERANCES[dtype], "right": right}


def stage_gate(run: Run, u: int, dtype: torch.dtype, layout: torch.memory_format, ours: cases.Stage) -> Row:
    """Compare a level's stage, values and every gradient, with float64, at a quarter of the batch."""
    N, H, W = run.sizes.stages[0]
    inputs, weights = cases.level_inputs(u, max(1, N // 4), H >> (u - 1), W >> (u - 1), dtype, layout, run.device)
    grad = torch.randn_like(stage_forward(ours, (inputs, weights)))
    found = []
    for stage, double in ((ours, False), (reference.deep_skip, False), (reference.deep_skip, True)):
        maps, kernel_weights = (
            [x.detach().to(torch.float64 if double else dtype).requires_grad_() for x in some]
            for some in (inputs, weights)
        )
        out = stage(maps, kernel_weights)
        found.append([out.detach(), *torch.autograd.grad(out, [*maps, *kernel_weights], grad.to(out.dtype))])
    return judged(dtype, *found)


def norm_gate(run: Run, u: int, dtype: torch.dtype, layout: torch.memory_format) -> Row:
    """Compare a level's batch norm and ReLU, gradients and running statistics, with float64, at a quarter of the batch."""
    return judged(dtype, *gpu_norms.norm_values(run, u, dtype, layout))


def convolution_gate(run: Run, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> Row:
    """Compare a convolution with few channels, values and gradients, with float64, at a quarter of the batch."""
    x, weight = cases.convolution_inputs((max(1, size[0] // 4), *size[1:]), dtype, run.device)
    grad = torch.randn_like(reference.conv3(x, weight).detach())
    found = []
    for form, double in ((cases.next_conv3, False), (reference.conv3, False), (reference.conv3, True)):
        leaves = [y.detach().to(torch.float64 if double else dtype).requires_grad_() for y in (x, weight)]
        out = form(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    return judged(dtype, *found)


def loss_gate(run: Run, shape: tuple[int, ...], dtype: torch.dtype, labels: torch.dtype) -> Row:
    """Compare the loss and its gradient with float64, with ignored pixels and sample weights."""
    logits, target = cases.loss_inputs(shape, dtype, run.device)
    target = target.to(labels)
    target[:, :2] = 255
    weight = torch.linspace(1.0, 0.5, shape[0], device=run.device)
    plain, exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    found = []
    for form, z in ((kernels, logits), (reference, plain), (reference, exact)):
        sums = form.bce_dice_sums(z, target, alpha=0.3, sample_weight=weight)
        value = form.loss_of_sums(sums)[0]
        found.append([value.detach(), *torch.autograd.grad(value, z)])
    return judged(dtype, *found)


def convolution_name(size: tuple[int, int, int, int, int]) -> str:
    """Return the name of a convolution with the new launches, as in the gate."""
    return f"conv3 {size[1]} -> {size[2]}, next"


def with_next(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with the launches that no GPU has timed yet."""
    with kernels.backend.chosen("next"):
        return work(*arguments)


def gate_of(run: Run, dtype: torch.dtype) -> Iterator[Job]:
    """Compare every operator in a dtype; the last row marks the comparison as complete."""
    about: Row = {"suite": "gate", "dtype": str(dtype)}
    for u in run.sizes.levels:
        for layout in (LAST, FIRST):
            row = about | {"operator": f"level {u} stage", "layout": str(layout)}
            yield row, partial(stage_gate, run, u, dtype, layout, kernels.deep_skip)
            row = about | {"operator": gpu_norms.norm_name(u), "layout": str(layout)}
            yield row, partial(norm_gate, run, u, dtype, layout)
    for u in run.sizes.next_levels:
        row = about | {"operator": f"level {u} stage, next", "layout": str(LAST)}
        yield row, partial(stage_gate, run, u, dtype, LAST, cases.next_stage)
    for size in run.sizes.convolutions:
        yield about | {"operator": convolution_name(size)}, partial(convolution_gate, run, size, dtype)
    for shape in dict.fromkeys((2, V, min(H, 256), min(W, 256)) for _, V, H, W in run.sizes.losses):
        for labels in (torch.uint8, torch.int64):
            row = about | {"operator": "loss", "labels": str(labels), "classes": shape[1]}
            yield row, partial(loss_gate, run, shape, dtype, labels)
        if shape[1] == 1:
            row = about | {"operator": f"loss{NEXT}", "labels": str(torch.uint8), "classes": 1}
            yield row, partial(with_next, loss_gate, run, shape, dtype, torch.uint8)
    yield about | {"operator": "all"}, lambda: {"complete": True}


def gate(run: Run) -> Iterator[Job]:
    """Compare in the dtype that is timed; wrong operators are not timed."""
    yield from gate_of(run, run.sizes.dtype)


def other_types(run: Run) -> Iterator[Job]:
    """Compare in the other dtypes."""
    for dtype in run.sizes.checked:
        yield from gate_of(run, dtype)


class _OurCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deepskip":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def stage_step(stage: cases.Stage, tensors: tuple[list[Tensor], list[Tensor]], grad: Tensor) -> tuple[Tensor, ...]:
    """Run a stage forward and backward.

    Args:
        stage: implementation.
        tensors: maps (N, C_i, H_i, W_i) and weights (K, C_i, 3, 3).
        grad: gradient (N, K maps, H, W) of the output.
    """
    return torch.autograd.grad(stage(*tensors), [*tensors[0], *tensors[1]], grad)


def stage_forward(stage: cases.Stage, tensors: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    """Run a stage forward only.

    Args:
        stage: implementation.
        tensors: maps (N, C_i, H_i, W_i) and weights (K, C_i, 3, 3).
    """
    with torch.no_grad():
        return stage(*tensors)


def loss_step(loss: opponents.Loss, logits: Tensor, target: Tensor) -> Tensor:
    """Run a loss forward and backward.

    Args:
        loss: implementation.
        logits: logits (N, V, H, W).
        target: labels (N, H, W).
    """
    return torch.autograd.grad(loss(logits, target), logits)[0]


def levels(run: Run, suffix: str = "") -> Iterator[tuple[str, int, tuple[int, int, int]]]:
    """Yield the levels of every size that the gate found right: name, level, (N, H, W).

    Args:
        run: the run.
        suffix: "" for today's launches, NEXT for the new ones.
    """
    for N, H, W in run.sizes.stages:
        for u in run.sizes.next_levels if suffix else run.sizes.levels:
            if f"level {u} stage{suffix}" not in run.wrong:
                yield f"level {u}, {N}x{H >> (u - 1)}x{W >> (u - 1)}{suffix}", u, (N, H >> (u - 1), W >> (u - 1))


def losses(run: Run) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Yield every size of the loss, if the gate found it right: name, (N, V, H, W)."""
    if "loss" not in run.wrong:
        yield from (("x".join(map(str, shape)), shape) for shape in run.sizes.losses)


def next_losses(run: Run) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Yield the sizes that the new launches of the loss support, if the gate found them right."""
    if f"loss{NEXT}" not in run.wrong:
        yield from ((f"{name}{NEXT}", shape) for name, shape in losses(run) if shape[1] == 1)


def operators(run: Run, whole: dict[str, Callable[[], Any]], seen: _OurCalls) -> list[Row]:
    """Time each of the observed operators alone, then the calls in which they were observed."""
    calls = {
        operator._opname: measure.rotated(operator, *arguments, device=run.device) for operator, arguments in seen.calls
    }
    return [{"operator": name} | timed(run, {"": call}) for name, call in (calls | whole).items()]


def stage_launches(run: Run, u: int, shape: tuple[int, int, int], stage: cases.Stage) -> list[Row]:
    """Time our operators as a level calls them, and the whole stage."""
    tensors = cases.level_inputs(u, *shape, run.sizes.dtype, LAST, run.device)
    grad = torch.randn_like(stage_forward(stage, tensors))
    with _OurCalls() as seen:
        stage_step(stage, tensors, grad)
    forward = measure.rotated(partial(stage_forward, stage), tensors, device=run.device)
    both = measure.rotated(partial(stage_step, stage), tensors, grad, device=run.device)
    return operators(run, {"stage forward": forward, "stage forward + backward": both}, seen)


def loss_launches(run: Run, shape: tuple[int, ...]) -> list[Row]:
    """Time our operators as the loss calls them, and the whole loss."""
    inputs = cases.loss_inputs(shape, run.sizes.dtype, run.device)
    with _OurCalls() as seen:
        loss_step(opponents.fused, *inputs)
    both = measure.rotated(partial(loss_step, opponents.fused), *inputs, device=run.device)
    return operators(run, {"loss + gradient": both}, seen)


def convolution_launches(run: Run, size: tuple[int, int, int, int, int]) -> list[Row]:
    """Time a convolution with few channels alternately with the library's: forward, and forward and backward."""
    x, weight = cases.convolution_inputs(size, run.sizes.dtype, run.device)
    leaves = [y for y in (x, weight) if y.requires_grad]
    grad = torch.randn_like(reference.conv3(x, weight).detach())

    def forward(form: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return form(x, weight)

    def both(form: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(x, weight), [x, weight][-len(leaves) :], grad)

    forms = {"": cases.next_conv3, "plain": reference.conv3}
    rows = []
    cases_of: tuple[tuple[str, Callable[..., Any], tuple[Tensor, ...]], ...] = (
        ("forward", forward, (x, weight)), ("forward + backward", both, (x, weight, grad)),
    )  # fmt: skip
    for name, what, arguments in cases_of:
        calls = {
            side: measure.rotated(partial(what, form), *arguments, device=run.device) for side, form in forms.items()
        }
        rows.append({"operator": f"{convolution_name(size)}, {name}"} | timed(run, calls))
    return rows


def launches(run: Run) -> Iterator[Job]:
    """Time each of our operators alone, then the whole stage and the whole loss."""
    about: Row = {"suite": "launches", "dtype": str(run.sizes.dtype)}
    for suffix, stage in (("", kernels.deep_skip), (", next", cases.next_stage)):
        for name, u, shape in levels(run, suffix):
            yield about | {"size": name}, partial(stage_launches, run, u, shape, stage)
    yield from gpu_norms.launch_jobs(run)
    for size in run.sizes.convolutions:
        if convolution_name(size) not in run.wrong:
            yield about | {"size": "x".join(map(str, size))}, partial(convolution_launches, run, size)
    for name, logits_shape in losses(run):
        yield about | {"size": f"loss, {name}"}, partial(loss_launches, run, logits_shape)
    for name, logits_shape in next_losses(run):
        yield about | {"size": f"loss, {name}"}, partial(with_next, loss_launches, run, logits_shape)


def candidate_shapes(run: Run) -> Iterator[Job]:
    """Time every shape of a launch that compiles without spilling, the one in use included."""
    loss_sizes = [*losses(run), *next_losses(run)]
    names = {name for suffix in ("", NEXT) for name, *_ in levels(run, suffix)}
    names |= {f"loss, {name}" for name, _ in loss_sizes} | {name for name, *_ in gpu_norms.sizes(run)}
    for candidate, spilled in candidates.built(run.sizes, run.device, run.left):
        if candidate.case not in names:
            continue
        row = {
            "suite": "candidates", "size": candidate.case, "operator": candidate.operator,
            "implementation": candidate.name, "taken": candidate.taken, "spills": spilled,
        }  # fmt: skip
        if spilled:
            yield row, dict
        else:
            yield row, partial(candidate_times, run, candidate)


def candidate_times(run: Run, candidate: candidates.Candidate) -> Row:
    """Time a launch with a candidate's shape."""
    call = candidates.call(candidate, run.sizes.dtype, run.device)
    with candidates.patched(candidate):
        return timed(run, {"": call})


def stage_pair(run: Run, u: int, shape: tuple[int, int, int], name: str) -> list[Row]:
    """Time an implementation of a level's stage alternately with ours: forward, and forward and backward."""
    stage, layout = cases.stage(name, **run.compile_options)
    sides = {
        "": (stage, cases.level_inputs(u, *shape, run.sizes.dtype, layout, run.device)),
        "deepskip": (kernels.deep_skip, cases.level_inputs(u, *shape, run.sizes.dtype, LAST, run.device)),
    }
    found = []
    for what in ("forward", "forward + backward"):
        row: Row = {"operator": what}
        calls: dict[str, Callable[[], Any]] = {}
        for side, (form, tensors) in sides.items():
            if what == "forward":
                calls[side] = measure.rotated(partial(stage_forward, form), tensors, device=run.device)
            else:
                # Each gets the gradient in the layout of its own output.
                grad = torch.randn_like(stage_forward(form, tensors))
                calls[side] = measure.rotated(partial(stage_step, form), tensors, grad, device=run.device)
            prefix = f"{side}_" if side else ""
            row[f"{prefix}saved_bytes"] = measure.saved_bytes(partial(form, *tensors), (*tensors[0], *tensors[1]))
            row[f"{prefix}peak_bytes"] = measure.peak_bytes(calls[side], run.device)
        found.append(row | timed(run, calls))
    return found


def loss_pair(run: Run, shape: tuple[int, int, int, int], name: str) -> Row:
    """Time a loss alternately with ours."""
    inputs = cases.loss_inputs(shape, run.sizes.dtype, run.device)
    forms = {"": opponents.all_of(shape[1], **run.compile_options)[name], "deepskip": opponents.fused}
    calls = {
        side: measure.rotated(partial(loss_step, form), *inputs, device=run.device) for side, form in forms.items()
    }
    peaks = {
        f"{side}_peak_bytes" if side else "peak_bytes": measure.peak_bytes(call, run.device)
        for side, call in calls.items()
    }
    return {"bytes": cases.loss_bytes(shape, run.sizes.dtype)} | peaks | timed(run, calls)


def contenders(run: Run) -> Iterator[Job]:
    """Time eager PyTorch and other projects' losses, then the plain ones under torch.compile, which takes longest."""
    dtype = str(run.sizes.dtype)

    def stages(name: str) -> Iterator[Job]:
        for size, u, shape in levels(run):
            row = {"suite": "stage contenders", "size": size, "implementation": name, "dtype": dtype}
            yield row, partial(stage_pair, run, u, shape, name)

    def loss_forms(wanted: Callable[[str], bool]) -> Iterator[Job]:
        for size, shape in losses(run):
            for name in filter(wanted, opponents.all_of(shape[1], **run.compile_options)):
                row = {"suite": "loss contenders", "size": size, "implementation": name, "dtype": dtype}
                yield row, partial(loss_pair, run, shape, name)

    yield from stages("plain, channels last")
    yield from gpu_norms.contender_jobs(run)
    yield from loss_forms(lambda name: name not in ("deepskip", "torch.compile"))
    yield from stages("torch.compile, channels last")
    yield from loss_forms(lambda name: name == "torch.compile")
    yield from stages("plain, contiguous")


def autotune(run: Run) -> Iterator[Job]:
    """Time level 1 with torch.compile's widest search, which may not finish in time."""
    widest = run._replace(compile_options=run.compile_options or {"mode": "max-autotune-no-cudagraphs"})
    for size, u, shape in list(levels(run))[:1]:
        row = {"suite": "stage contenders", "size": size, "implementation": "torch.compile, max-autotune"}
        row["dtype"] = str(run.sizes.dtype)
        yield row, partial(stage_pair, widest, u, shape, "torch.compile, channels last")


PHASES: dict[str, Phase] = {
    "machine": machine, "bandwidth": bandwidth, "gate": gate, "launches": launches, "candidates": candidate_shapes,
    "contenders": contenders, "autotune": autotune, "other types": other_types,
}  # fmt: skip


def main() -> None:
    """Run the phases of the command line."""
    arguments = arguments_of("python -m deepskip.kernels.bench.gpu_phases", list(PHASES), __doc__)
    run_phases(PHASES, arguments.phases, arguments.out, arguments.until)


if __name__ == "__main__":
    main()
