"""Batch norm and ReLU in Triton: operators with their gradients; `batch_norm_passes_triton` has the maths and the launches.

Forward reads x twice, or once where its producer has made the sums, and writes y. Backward reads x and dy twice and writes dx.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from deepskip.kernels import backend, reference
from deepskip.kernels import batch_norm_passes_triton as passes
from deepskip.kernels.bce_dice_triton import must_run, no_second_backward

# bytes that a thread loads at once, and loads of each tensor that it has under way
WIDTH, LOADS = 16, 4
WARPS = 4
# channels that a program takes of channels-last maps, at most: 128 bytes of a pixel in half precision
CHANNELS = 64
# programs of the sums, about: six for each of an H100's 132 processors, whose registers hold as many at once
MAX_PROGRAMS = 792
# rows of partial sums that are added up at a time, and by how many warps
ROWS, ROW_WARPS = 256, 4


class Plan(NamedTuple):
    """How a map is cut into programs.

    samples: runs of pixels: one of all images' where channels are last, else one an image. pixels: of such a run.
    rows, channels: of a tile. blocks: of channels.
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
            tiles: of each program.
            most: programs of the whole launch, about; a program then has more tiles.
        """
        wanted = triton.cdiv(self.pixels, self.rows * tiles)
        return wanted if most is None else max(1, min(wanted, most // (self.samples * self.blocks)))


def plan(x: Tensor) -> Plan:
    """Cut a map, channels last or contiguous, into tiles of which each thread loads 16 bytes."""
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
    """Add up every program's pixels: (programs, 2, C) fp64, sums and sums of squares."""
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
            # where there are no rows, a pointer that is not read
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


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, _, stats, ctx.training = inputs
    ctx.save_for_backward(x, stats)


def _backward(ctx: Any, dy: Tensor) -> tuple:
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
    """Normalise a map over all but its channels, then ReLU: as `reference.batch_norm_relu`.

    Args:
        x: (N, C, H, W) fp32, fp16 or bf16; channels last is fast, contiguous is right.
        weight, bias: (C,) fp32, whatever x is; other types get the plain form.
        running_mean, running_var: (C,) fp32; in training they are updated in place, the variance with n / (n - 1).
        training: whether the statistics are the batch's, else the running ones.
        momentum: what the batch's statistics weigh in the running ones.
        eps: added to the variance.

    Returns:
        The map, of x's type and layout.

    Raises:
        ValueError: one value a channel in training, or tensors of a CPU.
        RuntimeError: where a second derivative is asked for.
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
    """Normalise in training as `batch_norm_relu`, with sums that what made x has written: x is read once.

    Args:
        x: as there.
        rows: (programs, 2, C) fp32: sum and sum of squares of x over the pixels that each program made. No gradient goes
            through them: x's is that of the whole.
        weight, bias, running_mean, running_var, momentum, eps: as there.

    Returns:
        As there.

    Raises:
        ValueError: as there, or rows of another shape.
    """
    # plain fp32 sums of squares lose digits of the variance: with a mean of k deviations 1 + k^2 times their own rounding, 1e-7
    # for some thousand pixels. A convolution without bias has means of a few deviations, and five of them cost 3e-6
    if rows.ndim != 3 or rows.shape[1:] != (2, x.shape[1]):
        raise ValueError(f"rows are {tuple(rows.shape)}; of this map they must be (programs, 2, {x.shape[1]})")
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
    # what the statistics do to the gradient is in that of normalise_relu
    with torch.no_grad():
        if training:
            stats = _batch_statistics(x if rows is None else None, rows, count, *channels, momentum, eps)
        else:
            stats = _fixed_statistics(*channels, eps)
    return _normalise_relu(x, weight, bias, stats, training)
