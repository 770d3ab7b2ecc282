"""Batch norm and ReLU in Triton: operators with their gradients; `batch_norm_passes_triton` has the maths and the kernels.

Forward reads x twice, or once if its producer has computed the sums, and writes y. Backward reads x and dy twice and writes dx.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from deepskip.kernels import backend, reference
from deepskip.kernels import batch_norm_passes_triton as passes
from deepskip.kernels.bce_dice_triton import must_run, no_second_backward

# Bytes that a thread loads at once, and loads of each tensor that it has in flight.
WIDTH, LOADS = 16, 4
WARPS = 4
# The most channels of a channels-last map that a program takes: 128 bytes of a pixel in half precision.
CHANNELS = 64
# About how many programs compute the sums: six for each of an H100's 132 SMs, whose registers hold six at once.
MAX_PROGRAMS = 792
# Rows of partial sums that are added up at a time, and the warps that do it.
ROWS, ROW_WARPS = 256, 4


class Plan(NamedTuple):
    """How a map is divided among programs.

    Attributes:
        samples: contiguous runs of pixels: one for all images if channels are last, else one for each image.
        pixels: pixels of such a run.
        rows: pixels of a tile.
        channels: channels of a tile.
        blocks: blocks of channels.
        last: whether channels are last.
    """

    samples: int
    pixels: int
    rows: int
    channels: int
    blocks: int
    last: bool

    def programs(self, tiles: int, most: int | None = None) -> int:
        """Return how many programs share a run of pixels.

        Args:
            tiles: tiles of each program.
            most: about how many programs the whole launch may have; programs then take more tiles.
        """
        wanted: int = triton.cdiv(self.pixels, self.rows * tiles)
        return wanted if most is None else max(1, min(wanted, most // (self.samples * self.blocks)))


def plan(x: Tensor) -> Plan:
    """Divide a map into tiles of which each thread loads 16 bytes.

    Args:
        x: map (N, C, H, W), channels last or contiguous.
    """
    N, C, H, W = x.shape
    elements = 32 * WARPS * WIDTH // x.element_size()
    if not _is_last(x):
        return Plan(N, H * W, elements, 1, C, False)
    channels = min(CHANNELS, triton.next_power_of_2(C))
    return Plan(1, N * H * W, elements // channels, channels, triton.cdiv(C, channels), True)


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _like(x: Tensor) -> Tensor:
    layout = torch.channels_last if _is_last(x) else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _sums_of(x: Tensor) -> Tensor:
    """Return every program's sums and sums of squares of its pixels, (programs, 2, C) fp64."""
    cut = plan(x)
    C = x.shape[1]
    programs = cut.programs(2 * LOADS, MAX_PROGRAMS)
    rows = torch.empty(cut.samples * programs, 2, C, dtype=torch.float64, device=x.device)
    with backend.device_of(x):
        passes.batch_norm_sums[(len(rows), cut.blocks)](
            x, rows, programs, cut.pixels, C=C, TILE=cut.rows, CHANNELS=cut.channels, LOADS=LOADS, LAST=cut.last,
            num_warps=WARPS,
        )  # fmt: skip
    return rows


def _statistics_of(
    rows: Tensor | None, count: int, affine: tuple[Tensor, Tensor], running: tuple[Tensor, Tensor], momentum: float,
    eps: float,
) -> Tensor:  # fmt: skip
    C = len(affine[0])
    out = torch.empty(passes.STATISTICS, C, dtype=torch.float32, device=affine[0].device)
    with backend.device_of(out):
        passes.batch_norm_statistics[(C,)](
            # Without rows the kernel needs some pointer, which it does not read.
            out if rows is None else rows, *affine, *running, out, 0 if rows is None else len(rows), C, count, momentum, eps,
            TRAINING=rows is not None, ROWS=ROWS, num_warps=ROW_WARPS,
        )  # fmt: skip
    return out


@torch.library.custom_op("deepskip::batch_norm_statistics", mutates_args=("running_mean", "running_var"))
def _batch_statistics(
    x: Tensor | None, rows: Tensor | None, count: int, weight: Tensor, bias: Tensor, running_mean: Tensor,
    running_var: Tensor, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    if rows is None:
        assert x is not None
        rows = _sums_of(_dense(x, _is_last(x)))
    return _statistics_of(rows.contiguous(), count, (weight, bias), (running_mean, running_var), momentum, eps)


@_batch_statistics.register_fake
def _(
    x: Tensor | None, rows: Tensor | None, count: int, weight: Tensor, bias: Tensor, running_mean: Tensor,
    running_var: Tensor, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    return weight.new_empty(passes.STATISTICS, len(weight))


@torch.library.custom_op("deepskip::batch_norm_fixed_statistics", mutates_args=())
def _fixed_statistics(weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    return _statistics_of(None, 0, (weight, bias), (running_mean, running_var), 0.0, eps)


@_fixed_statistics.register_fake
def _(weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    return weight.new_empty(passes.STATISTICS, len(weight))


@torch.library.custom_op("deepskip::normalise_relu", mutates_args=())
def _normalise_relu(x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, training: bool) -> Tensor:
    x = _dense(x, _is_last(x))
    y = _like(x)
    cut = plan(x)
    programs = cut.programs(LOADS)
    with backend.device_of(x):
        passes.batch_norm_relu[(cut.samples * programs, cut.blocks)](
            x, stats, y, programs, cut.pixels,
            C=x.shape[1], TILE=LOADS * cut.rows, CHANNELS=cut.channels, LAST=cut.last, num_warps=WARPS,
        )  # fmt: skip
    return y


@_normalise_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, training: bool) -> Tensor:
    return _like(x)


@torch.library.custom_op("deepskip::normalise_relu_gradient", mutates_args=())
def _normalise_relu_gradient(dy: Tensor, x: Tensor, stats: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    last = _is_last(x)
    x, dy = _dense(x, last), _dense(dy, last)
    dx = _like(x)
    C = x.shape[1]
    d_weight, d_bias = stats.new_empty(C), stats.new_empty(C)
    coefficients = stats.new_empty(2, C)
    cut = plan(x)
    shared = {"C": C, "CHANNELS": cut.channels, "LAST": cut.last, "num_warps": WARPS}
    few, many = cut.programs(2 * LOADS, MAX_PROGRAMS), cut.programs(LOADS)
    rows = stats.new_empty(cut.samples * few, 2, C)
    with backend.device_of(x):
        passes.batch_norm_gradient_sums[(len(rows), cut.blocks)](
            dy, x, stats, rows, few, cut.pixels, TILE=cut.rows, LOADS=LOADS, **shared
        )
        passes.batch_norm_coefficients[(C,)](
            rows, stats, d_weight, d_bias, coefficients, len(rows), C, x.numel() // C, TRAINING=training, ROWS=ROWS,
            num_warps=ROW_WARPS,
        )  # fmt: skip
        passes.batch_norm_input_gradient[(cut.samples * many, cut.blocks)](
            dy, x, stats, coefficients, dx, many, cut.pixels, TILE=LOADS * cut.rows, **shared
        )
    return dx, d_weight, d_bias


@_normalise_relu_gradient.register_fake
def _(dy: Tensor, x: Tensor, stats: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), stats.new_empty(x.shape[1]), stats.new_empty(x.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, stats, ctx.training = inputs
    ctx.save_for_backward(x, stats)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_normalise_relu_gradient(dy, *ctx.saved_tensors, ctx.training), None, None


_normalise_relu.register_autograd(_backward, setup_context=_keep)
_normalise_relu_gradient.register_autograd(no_second_backward, setup_context=lambda ctx, inputs, output: None)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalize a map over all axes but its channels, then apply ReLU, as `reference.batch_norm_relu`.

    Args:
        x: map (N, C, H, W), fp32, fp16 or bf16; channels last is fast, contiguous also works.
        weight: scale (C,), fp32 whatever x is; other dtypes use the plain implementation.
        bias: shift (C,), as `weight`.
        running_mean: running mean (C,) fp32; updated in place in training.
        running_var: running variance (C,) fp32; updated in place in training, with n / (n - 1).
        training: whether to use the batch's statistics; else the running ones.
        momentum: weight of the batch's statistics in the running ones.
        eps: added to the variance.

    Returns:
        Map (N, C, H, W) of x's dtype and layout.

    Raises:
        ValueError: if a channel has only one value in training, or the tensors are on a CPU.
        RuntimeError: if a second derivative is computed.
    """
    return _of(x, None, weight, bias, running_mean, running_var, training, momentum, eps)


def batch_norm_relu_of_sums(
    x: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalize in training as `batch_norm_relu`, with sums from the operator that made x, so that x is read only once.

    Args:
        x: map (N, C, H, W), as in `batch_norm_relu`.
        rows: sum and sum of squares of x over the pixels of each program, (programs, 2, C) fp32. No gradient flows through
            them: x's gradient already includes their effect.
        weight: scale (C,), as in `batch_norm_relu`.
        bias: shift (C,), as in `batch_norm_relu`.
        running_mean: running mean (C,) fp32; updated in place.
        running_var: running variance (C,) fp32; updated in place, with n / (n - 1).
        momentum: weight of the batch's statistics in the running ones.
        eps: added to the variance.

    Returns:
        Map (N, C, H, W) of x's dtype and layout.

    Raises:
        ValueError: if the rows have another shape, a channel has only one value, or the tensors are on a CPU.
        RuntimeError: if a second derivative is computed.
    """
    # Plain fp32 sums of squares lose digits of the variance. With a mean of k deviations the error is 1 + k^2 times the
    # sums' own rounding, which is 1e-7 for some thousand pixels. Convolutions without bias have means of a few deviations;
    # five of them cost 3e-6.
    if rows.ndim != 3 or rows.shape[1:] != (2, x.shape[1]):
        raise ValueError(f"rows are {tuple(rows.shape)}; for this map they must be (programs, 2, {x.shape[1]})")
    return _of(x, rows, weight, bias, running_mean, running_var, True, momentum, eps)


def _of(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    must_run(x)
    channels = (weight, bias, running_mean, running_var)
    if x.numel() == 0 or not all(one.dtype == torch.float32 and one.is_contiguous() for one in channels):
        return reference.batch_norm_relu(x, weight, bias, running_mean, running_var, training, momentum, eps)
    count = x.numel() // x.shape[1]
    if training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    # The gradient of normalise_relu includes the effect of the statistics.
    with torch.no_grad():
        if training:
            stats = _batch_statistics(x if rows is None else None, rows, count, *channels, momentum, eps)
        else:
            stats = _fixed_statistics(*channels, eps)
    y: Tensor = _normalise_relu(x, weight, bias, stats, training)
    return y
