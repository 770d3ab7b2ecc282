"""Batch norm and ReLU on a GPU: compared with float64, timed by themselves and in turns with eager PyTorch's.

Jobs of `gpu_phases`. The launches are those that run.kernels = "next" chooses; names end with ", next".
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip.kernels import batch_norm_triton
from deepskip.kernels.bench import cases, measure
from deepskip.kernels.bench.gpu_part import Job, Row, Run, timed

EPS, MOMENTUM = 1e-5, 0.1
# far above the rounding of fp32, which ours and PyTorch's both compute in
CORNER = 1e-4
Norm = Callable[..., Tensor]


def norm_name(u: int) -> str:
    """Name the operator of a level."""
    return f"level {u} norm + ReLU, next"


def fused(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Run ours in training."""
    return batch_norm_triton.batch_norm_relu(x, weight, bias, mean, var, True, MOMENTUM, EPS)


def plain(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Run PyTorch's in training, as the network does today."""
    return F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS).relu_()


def inputs_of(
    u: int, N: int, H: int, W: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> list[Tensor]:
    """Make x, weight and bias, leaves, and running statistics of encoder level u; H and W are the level's own."""
    C = cases.BASE << (u - 1)
    x = torch.randn(N, C, H, W, device=device) + torch.randn(C, 1, 1, device=device)
    leaves = [x.to(dtype).contiguous(memory_format=layout), 1 + 0.3 * torch.randn(C, device=device)]
    leaves.append(torch.randn(C, device=device))
    return [*(one.requires_grad_() for one in leaves), torch.zeros(C, device=device), torch.ones(C, device=device)]


def rows_of(x: Tensor, pixels: int = 2048) -> Tensor:
    """Add up a map as a producer's epilogue would, so many pixels at a time."""
    flat = x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float()
    parts = flat.split(pixels)
    return torch.stack([torch.stack([part.sum(0), part.square().sum(0)]) for part in parts])


def norm_step(form: Norm, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Run a form forward and backward."""
    return torch.autograd.grad(form(*tensors), tensors[:3], grad)


def norm_forward(form: Norm, tensors: list[Tensor]) -> Tensor:
    """Run a form forward alone."""
    with torch.no_grad():
        return form(*tensors)


def norm_values(run: Run, u: int, dtype: torch.dtype, layout: torch.memory_format) -> list[list[Tensor]]:
    """Return values, gradients and running statistics of ours, of PyTorch's in the same type, and in float64."""
    N, H, W = run.sizes.stages[0]
    tensors = inputs_of(u, max(1, N // 4), H >> (u - 1), W >> (u - 1), dtype, layout, run.device)
    # where rounding decides on which side of ReLU's corner a value lies, gradients are not to be compared
    x, weight, bias = (one.detach().double() for one in tensors[:3])
    clear = F.batch_norm(x, None, None, weight, bias, True, MOMENTUM, EPS).abs() > CORNER
    grad = torch.randn_like(tensors[0]) * clear
    found = []
    for form, double in ((fused, False), (plain, False), (plain, True)):
        mine = [one.detach().double() if double else one.detach().clone() for one in tensors]
        mine[:3] = [one.requires_grad_() for one in mine[:3]]
        y = form(*mine)
        found.append([y.detach(), *torch.autograd.grad(y, mine[:3], grad.to(y.dtype)), *mine[3:]])
    return found


def operator_inputs(
    u: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Any, ...]]:
    """Make what each of our operators takes at level u, by its name; shape: (N, H, W) of the level."""
    N, H, W = shape
    tensors = inputs_of(u, N, H, W, dtype, torch.channels_last, device)
    x, weight, bias, mean, var = (one.detach() for one in tensors)
    count = x.numel() // x.shape[1]
    statistics = x, None, count, weight, bias, mean, var, MOMENTUM, EPS
    stats = torch.ops.deepskip.batch_norm_fixed_statistics(weight, bias, mean, var, EPS)
    return {
        "batch_norm_statistics": statistics,
        "batch_norm_statistics of given rows": (None, rows_of(x), *statistics[2:]),
        "normalise_relu": (x, weight, bias, stats, True),
        "normalise_relu_gradient": (torch.randn_like(x), x, stats, True),
    }


def norm_launches(run: Run, u: int, shape: tuple[int, int, int]) -> list[Row]:
    """Time each of our operators by itself, then all of them."""
    calls: dict[str, Callable[[], Any]] = {
        name: measure.rotated(getattr(torch.ops.deepskip, name.split()[0]).default, *inputs, device=run.device)
        for name, inputs in operator_inputs(u, shape, run.sizes.dtype, run.device).items()
    }
    tensors = inputs_of(u, *shape, run.sizes.dtype, torch.channels_last, run.device)
    grad, step = torch.randn_like(tensors[0]), partial(norm_step, fused)
    calls["norm forward"] = measure.rotated(partial(norm_forward, fused), tensors, device=run.device)
    calls["norm forward + backward"] = measure.rotated(step, tensors, grad, device=run.device)
    return [{"operator": name} | timed(run, {"": call}) for name, call in calls.items()]


def norm_pair(run: Run, u: int, shape: tuple[int, int, int]) -> list[Row]:
    """Time PyTorch's batch norm and ReLU in turns with ours, forward, and forward and backward."""
    tensors = inputs_of(u, *shape, run.sizes.dtype, torch.channels_last, run.device)
    grad = torch.randn_like(tensors[0])
    found = []
    for what in ("forward", "forward + backward"):
        row: Row = {"operator": what}
        calls: dict[str, Callable[[], Any]] = {}
        for side, form in (("", plain), ("deepskip", fused)):
            if what == "forward":
                calls[side] = measure.rotated(partial(norm_forward, form), tensors, device=run.device)
            else:
                calls[side] = measure.rotated(partial(norm_step, form), tensors, grad, device=run.device)
            prefix = f"{side}_" if side else ""
            row[f"{prefix}saved_bytes"] = measure.saved_bytes(partial(form, *tensors), tuple(tensors))
            row[f"{prefix}peak_bytes"] = measure.peak_bytes(calls[side], run.device)
        found.append(row | timed(run, calls))
    return found


def sizes(run: Run) -> Iterator[tuple[str, int, tuple[int, int, int]]]:
    """Yield every size's levels that are right: name, level, (N, H, W)."""
    for N, H, W in run.sizes.stages:
        for u in run.sizes.levels:
            if norm_name(u) not in run.wrong:
                shape = N, H >> (u - 1), W >> (u - 1)
                yield f"{norm_name(u)}, {'x'.join(map(str, shape))}", u, shape


def launch_jobs(run: Run) -> Iterator[Job]:
    """Time our operators."""
    for name, u, shape in sizes(run):
        yield {"suite": "launches", "dtype": str(run.sizes.dtype), "size": name}, partial(norm_launches, run, u, shape)


def contender_jobs(run: Run) -> Iterator[Job]:
    """Time PyTorch's beside ours."""
    for name, u, shape in sizes(run):
        row = {"suite": "norm contenders", "size": name, "implementation": "plain, channels last"}
        yield row | {"dtype": str(run.sizes.dtype)}, partial(norm_pair, run, u, shape)
