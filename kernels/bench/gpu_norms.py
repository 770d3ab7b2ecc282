"""Batch norm and ReLU on a GPU: compared with float64, timed alone, and alternately with eager PyTorch's.

These are jobs of `gpu_phases`. The launches are those of run.kernels = "next"; names end with ", next".
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
# Far above the rounding of fp32, in which both ours and PyTorch's compute.
CORNER = 1e-4
Norm = Callable[..., Tensor]


def norm_name(u: int) -> str:
    """Return the name of a level's operator."""
    return f"level {u} norm + ReLU, next"


def fused(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Compute our batch norm and ReLU in training.

    Args:
        x: map (N, C, H, W).
        weight: scale (C,).
        bias: shift (C,).
        mean: running mean (C,); updated in place.
        var: running variance (C,); updated in place.
    """
    return batch_norm_triton.batch_norm_relu(x, weight, bias, mean, var, True, MOMENTUM, EPS)


def plain(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Compute PyTorch's batch norm and ReLU in training, as the network does today.

    Args:
        x: map (N, C, H, W).
        weight: scale (C,).
        bias: shift (C,).
        mean: running mean (C,); updated in place.
        var: running variance (C,); updated in place.
    """
    return F.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS).relu_()


def inputs_of(
    u: int, N: int, H: int, W: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> list[Tensor]:
    """Make the inputs of encoder level u.

    Args:
        u: level, 1 first.
        N: images.
        H: height of the level.
        W: width of the level.
        dtype: dtype of x.
        layout: memory format of x.
        device: device of all.

    Returns:
        x (N, C, H, W), weight (C,) and bias (C,), which are leaves, then running mean (C,) and variance (C,).
    """
    C = cases.BASE << (u - 1)
    x = torch.randn(N, C, H, W, device=device) + torch.randn(C, 1, 1, device=device)
    leaves = [x.to(dtype).contiguous(memory_format=layout), 1 + 0.3 * torch.randn(C, device=device)]
    leaves.append(torch.randn(C, device=device))
    return [*(one.requires_grad_() for one in leaves), torch.zeros(C, device=device), torch.ones(C, device=device)]


def rows_of(x: Tensor, pixels: int = 2048) -> Tensor:
    """Sum a map as the operator that made it would.

    Args:
        x: map (N, C, H, W).
        pixels: pixels of each row.

    Returns:
        Sums and sums of squares (rows, 2, C) fp32.
    """
    flat = x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1]).float()
    parts = flat.split(pixels)
    return torch.stack([torch.stack([part.sum(0), part.square().sum(0)]) for part in parts])


def norm_step(form: Norm, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Run an implementation forward and backward.

    Args:
        form: implementation.
        tensors: its inputs, as `inputs_of` makes them.
        grad: gradient (N, C, H, W) of the output.
    """
    return torch.autograd.grad(form(*tensors), tensors[:3], grad)


def norm_forward(form: Norm, tensors: list[Tensor]) -> Tensor:
    """Run an implementation forward only.

    Args:
        form: implementation.
        tensors: its inputs, x (N, C, H, W) first, as `inputs_of` makes them.
    """
    with torch.no_grad():
        return form(*tensors)


def norm_values(run: Run, u: int, dtype: torch.dtype, layout: torch.memory_format) -> list[list[Tensor]]:
    """Compute values, gradients and running statistics with our form, PyTorch's in the same dtype, and PyTorch's in float64.

    Args:
        run: the run.
        u: level, 1 first.
        dtype: dtype of x.
        layout: memory format of x.
    """
    N, H, W = run.sizes.stages[0]
    tensors = inputs_of(u, max(1, N // 4), H >> (u - 1), W >> (u - 1), dtype, layout, run.device)
    # Where rounding decides on which side of ReLU's corner a value lies, gradients cannot be compared.
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
    """Make the arguments of each of our operators at level u, by its name.

    Args:
        u: level, 1 first.
        shape: (N, H, W) of the level.
        dtype: dtype of x.
        device: device of all.
    """
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
    """Time each of our operators alone, then all of them."""
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
    """Time PyTorch's batch norm and ReLU alternately with ours: forward, and forward and backward."""
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
    """Yield the levels of every size that the gate found right: name, level, (N, H, W)."""
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
    """Time PyTorch's alternately with ours."""
    for name, u, shape in sizes(run):
        row = {"suite": "norm contenders", "size": name, "implementation": "plain, channels last"}
        yield row | {"dtype": str(run.sizes.dtype)}, partial(norm_pair, run, u, shape)
