"""Operators of the sub-pixel stage and of 3x3 convolutions with few channels, with their gradients.

The launches are in `subpixel_triton` and `subpixel_gradients_triton`. Only inputs and weights are kept for backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepskip.kernels import deep_skip_triton, reference, subpixel_gradients_triton, subpixel_tables, subpixel_triton
from deepskip.kernels.bce_dice_triton import must_run, no_second_backward
from deepskip.kernels.subpixel_tables import is_last
from deepskip.kernels.subpixel_triton import NEAR

# The most outputs of a branch, and inputs of a convolution, that its programs hold in registers.
MOST_OUTPUTS, MOST_INPUTS = 16, 80


def low_precision(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast converts a convolution's input to, or the input's own if autocast is off.

    Args:
        x: input (N, C, H, W).
    """
    # The meta device, which the counts run on, has no autocast.
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _last(x: Tensor) -> Tensor:
    return x if is_last(x) else x.contiguous(memory_format=torch.channels_last)


def _like(x: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=layout)


def _as(x: Tensor, last: bool) -> Tensor:
    return x if last else x.contiguous()


def _factors(grad: Tensor, maps: Sequence[Tensor]) -> list[int]:
    return [grad.shape[2] // x.shape[2] for x in maps]


@torch.library.custom_op("deepskip::subpixel_stage", mutates_args=())
def _stage(
    maps: Sequence[Tensor], weights: Sequence[Tensor], taps: Sequence[Tensor], slices: Sequence[int], mode: str
) -> Tensor:
    out = _like(maps[0], _wide(maps, weights, slices), True)
    matrices = subpixel_tables.expanded(weights, _factors(out, maps), mode, out.dtype)
    subpixel_triton.launch_stage(out, [_last(x) for x in maps], matrices, [x.contiguous() for x in taps], slices, mode)
    return _as(out, is_last(maps[0]))


def _wide(maps: Sequence[Tensor], weights: Sequence[Tensor], slices: Sequence[int]) -> tuple[int, ...]:
    N, _, H, W = maps[0].shape
    return N, weights[0].shape[0] * len(slices), H, W


@_stage.register_fake
def _(
    maps: Sequence[Tensor], weights: Sequence[Tensor], taps: Sequence[Tensor], slices: Sequence[int], mode: str
) -> Tensor:
    return _like(maps[0], _wide(maps, weights, slices), is_last(maps[0]))


def _gradient_tensors(
    grad: Tensor, maps: Sequence[Tensor], weights: Sequence[Tensor], factors: Sequence[int], needs: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    N, _, H, W = grad.shape
    K = weights[0].shape[0]
    mine = [_like(x, x.shape, is_last(x)) for x, asked in zip(maps, needs, strict=False) if asked]
    taps_type = torch.float32 if grad.dtype == torch.float16 else grad.dtype
    taps = [grad.new_empty(N, H // s, W // s, 9 * K, dtype=taps_type) for s in factors]
    theirs = [
        _like(w, w.shape, is_last(w) and not w.is_contiguous())
        for w, asked in zip(weights, needs[len(maps) :], strict=True)
        if asked
    ]
    return mine, taps, theirs


@torch.library.custom_op("deepskip::subpixel_stage_gradients", mutates_args=())
def _stage_gradients(
    grad: Tensor, maps: Sequence[Tensor], weights: Sequence[Tensor], factors: Sequence[int], slices: Sequence[int],
    mode: str, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    mine, taps, theirs = _gradient_tensors(grad, maps, weights, factors, needs)
    grad = _last(grad)
    asked = [i for i in range(len(maps)) if needs[i]]
    near = _factors(grad, maps)
    made = [x if is_last(x) else _like(x, x.shape, True) for x in mine]
    if asked or taps:
        matrices = []
        if asked:
            matrices = subpixel_tables.expanded([weights[i] for i in asked], [near[i] for i in asked], mode, grad.dtype)
        places = [slices[i] for i in asked] + list(slices[len(maps) :])
        subpixel_gradients_triton.launch_map_gradients(grad, made, matrices, taps, places, mode)
    asked = [i for i in range(len(weights)) if needs[len(maps) + i]]
    subpixel_gradients_triton.launch_weight_gradients(
        grad, [_last(maps[i]) for i in asked], theirs, [slices[i] for i in asked], mode
    )
    return [*(_as(x, is_last(y)) for x, y in zip(made, mine, strict=True)), *taps, *theirs]


@_stage_gradients.register_fake
def _(
    grad: Tensor, maps: Sequence[Tensor], weights: Sequence[Tensor], factors: Sequence[int], slices: Sequence[int],
    mode: str, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    mine, taps, theirs = _gradient_tensors(grad, maps, weights, factors, needs)
    return [*mine, *taps, *theirs]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, weights, taps, ctx.slices, ctx.mode = inputs
    ctx.count, ctx.factors = len(maps), [maps[0].shape[2] // x.shape[1] for x in taps]
    ctx.needs = [x.requires_grad for x in (*maps, *weights)]
    ctx.save_for_backward(*maps, *weights)


def _placed(made: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    left = list(made)
    return [left.pop(0) if asked else None for asked in needs]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    maps, weights = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    made = _stage_gradients(grad, maps, weights, ctx.factors, ctx.slices, ctx.mode, ctx.needs)
    own, theirs = ctx.needs[: ctx.count], ctx.needs[ctx.count :]
    first, second = sum(own), sum(own) + len(ctx.factors)
    return _placed(made[:first], own), _placed(made[second:], theirs), made[first:second], None, None


_stage.register_autograd(_backward, setup_context=_keep)
_stage_gradients.register_autograd(no_second_backward, setup_context=lambda ctx, inputs, output: None)


def deep_skip(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Compute the deep-skip stage (eq. 1) in sub-pixel form, as `reference.deep_skip`.

    More than 16 outputs, or more than 80 channels of a map of factor 1, 2 or 4, use the launches of `deep_skip_triton`. If a
    deeper map is not smaller by 2, 4, 8 or 16 in both directions, the plain implementation is used.

    Args:
        inputs: the level's own map (N, C_0, H, W) first, then deeper maps (N, C_i, H / s_i, W / s_i); fp32, fp16 or bf16,
            channels last or contiguous.
        weights: a weight (K, C_i, 3, 3) for each map.
        mode: upsampling, "bilinear" (align_corners=False) or "nearest".

    Returns:
        Map (N, K * len(inputs), H, W) in the layout of the level's own map.

    Raises:
        ValueError: if the tensors are on a CPU.
        RuntimeError: if a second derivative is computed.
    """
    must_run(inputs[0])
    factors = deep_skip_triton.factors_of(inputs)
    if factors is None:
        return reference.deep_skip(inputs, weights, mode)
    near = [i for i, s in enumerate(factors) if s in NEAR]
    far = [i for i, s in enumerate(factors) if s not in NEAR]
    if weights[0].shape[0] > MOST_OUTPUTS or any(inputs[i].shape[1] > MOST_INPUTS for i in near):
        return deep_skip_triton.deep_skip(inputs, weights, mode)
    dtype = low_precision(inputs[0])
    taps = [deep_skip_triton.taps_of(inputs[i], weights[i], dtype) for i in far]
    maps = [inputs[i].to(dtype) for i in near]
    joined: Tensor = _stage(maps, [weights[i] for i in near], taps, [*near, *far], mode)
    return joined
