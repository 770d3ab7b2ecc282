"""Dispatch DeepSkip's operators to the implementation that `backend` chooses for a tensor."""

from collections.abc import Sequence

from torch import Tensor

from deepskip.kernels import backend, batch_norm_cpu, bce_dice_cpu, conv3_cpu, deep_skip_cpu, reference, timings

__all__ = ["backend", "batch_norm_relu", "bce_dice_sums", "conv3", "conv3_with_sums", "deep_skip", "loss_of_sums"]


def bce_dice_sums(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    ignore_index: int | None = 255,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Compute the sums that weighted BCE and Dice are made of (eqs. 6 and 7); see `reference.bce_dice_sums`.

    Args:
        logits: logits (N, V, H, W).
        target: labels (N, H, W), or (N, V, H, W) for independent labels.
        alpha: weight of foreground pixels in BCE; background gets 1 - alpha.
        ignore_index: label of pixels that are not counted; None counts all.
        sample_weight: weights of the samples, (N,), or None for all one.

    Returns:
        Sums (2 + 3 V,).

    Raises:
        ValueError: if the target does not fit the logits, or the backend cannot run on their device.
    """
    found = backend.implementation(logits)
    if found == "triton":
        # Triton is not installed on every system.
        from deepskip.kernels import bce_dice_triton

        sums = bce_dice_triton.bce_dice_sums
    else:
        sums = bce_dice_cpu.bce_dice_sums if found == "cpu" else reference.bce_dice_sums
    return sums(logits, target, alpha=alpha, ignore_index=ignore_index, sample_weight=sample_weight)


def loss_of_sums(
    sums: Tensor, class_weights: Tensor | None = None, beta: float = 1.0, eps: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, BCE and Dice (eqs. 5 to 7) from their sums; see `reference.loss_of_sums`.

    Args:
        sums: sums (2 + 3 V,), as `bce_dice_sums` returns them.
        class_weights: Q_v of eq. 7, (V,), with sum 1; None weights all classes equally.
        beta: weight of BCE.
        eps: smoothing of Dice, in pixels.

    Returns:
        Loss, BCE and Dice, scalars.
    """
    found = backend.implementation(sums)
    if found == "triton":
        from deepskip.kernels import bce_dice_loss_triton

        return bce_dice_loss_triton.loss_of_sums(sums, class_weights, beta, eps)
    form = bce_dice_cpu if found == "cpu" else reference
    parts: tuple[Tensor, Tensor, Tensor] = form.loss_of_sums(sums, class_weights, beta, eps)
    return parts


def deep_skip(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Concatenate the linear 3x3 convolutions of a decoder level's upsampled inputs (eq. 1); see `reference.deep_skip`.

    Args:
        inputs: the level's own map (N, C_0, H, W) first, then deeper maps (N, C_i, H / s_i, W / s_i).
        weights: a weight (K, C_i, 3, 3) for each map.
        mode: upsampling, "bilinear" (align_corners=False) or "nearest".

    Returns:
        Map (N, K * len(inputs), H, W).

    Raises:
        ValueError: if maps, weights and mode do not fit (`reference.check_maps`), or the backend cannot run on their device.
    """
    reference.check_maps(inputs, weights, mode)
    found = backend.implementation(inputs[0])
    if found == "triton":
        from deepskip.kernels import deep_skip_triton, subpixel

        name = timings.stage(len(weights[0]), len(inputs))
        form = subpixel if backend.uses_next(name, inputs[0]) else deep_skip_triton
        fused: Tensor = form.deep_skip(inputs, weights, mode)
        return fused
    plain = deep_skip_cpu if found == "cpu" else reference
    joined: Tensor = plain.deep_skip(inputs, weights, mode)
    return joined


def conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve a map with 3x3 weights and zero padding 1.

    Args:
        x: map (N, C, H, W).
        weight: weights (K, C, 3, 3).
        bias: bias (K,), or None.

    Returns:
        Map (N, K, H, W).
    """
    found = backend.implementation(x)
    if found == "triton" and backend.uses_next(timings.convolution(weight.shape[1], len(weight)), x):
        from deepskip.kernels import conv3_triton

        return conv3_triton.conv3(x, weight, bias)
    form = conv3_cpu if found == "cpu" else reference
    y: Tensor = form.conv3(x, weight, bias)
    return y


def conv3_with_sums(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve as `conv3`, and return the sums that batch norm needs if the implementation computes them in the same pass.

    Args:
        x: map (N, C, H, W).
        weight: weights (K, C, 3, 3).

    Returns:
        Map (N, K, H, W), and sums (programs, 2, K) fp32 for `batch_norm_relu`, or None.
    """
    name = timings.convolution(weight.shape[1], len(weight))
    if backend.implementation(x) == "triton" and backend.uses_next(name, x):
        from deepskip.kernels import conv3_triton

        if conv3_triton.takes(x, weight):
            return conv3_triton.conv3_with_sums(x, weight)
    return conv3(x, weight), None


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Normalize a map over all axes but its channels, then apply ReLU.

    All but `rows` are arguments of `torch.nn.functional.batch_norm`.

    Args:
        x: map (N, C, H, W).
        weight: scale (C,).
        bias: shift (C,).
        running_mean: running mean (C,); updated in place in training.
        running_var: running variance (C,); updated in place in training.
        training: whether to use the batch's statistics; else the running ones.
        momentum: weight of the batch's statistics in the running ones.
        eps: added to the variance.
        rows: sums and sums of squares of x, (programs, 2, C) fp32, from the operator that made x, or None. In training the
            new Triton launches then read x only once. Other implementations ignore them.

    Returns:
        Map (N, C, H, W) of x's dtype.
    """
    found = backend.implementation(x)
    settings = (weight, bias, running_mean, running_var)
    if found == "triton" and backend.uses_next(timings.norm(x.shape[1]), x):
        from deepskip.kernels import batch_norm_triton

        if training and rows is not None:
            return batch_norm_triton.batch_norm_relu_of_sums(x, rows, *settings, momentum, eps)
        return batch_norm_triton.batch_norm_relu(x, *settings, training, momentum, eps)
    form = batch_norm_cpu if found == "cpu" else reference
    y: Tensor = form.batch_norm_relu(x, *settings, training, momentum, eps)
    return y


if __name__ == "kernels":
    from deepskip.old_names import alias

    alias(__name__)
