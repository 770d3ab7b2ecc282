"""Operators that DeepSkip spends its time in; `backend` says which implementation a tensor gets."""

from collections.abc import Sequence

from torch import Tensor

from deepskip.kernels import backend, batch_norm_cpu, bce_dice_cpu, conv3_cpu, deep_skip_cpu, reference

__all__ = ["backend", "batch_norm_relu", "bce_dice_sums", "conv3", "conv3_with_sums", "deep_skip", "loss_of_sums"]


def bce_dice_sums(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    ignore_index: int | None = 255,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Returns the sums that weighted BCE and Dice are made of (eqs. 6 and 7); see `reference.bce_dice_sums`."""
    found = backend.implementation(logits)
    if found == "triton":
        # triton is not there on every system
        from deepskip.kernels import bce_dice_triton

        sums = bce_dice_triton.bce_dice_sums
    else:
        sums = bce_dice_cpu.bce_dice_sums if found == "cpu" else reference.bce_dice_sums
    return sums(logits, target, alpha=alpha, ignore_index=ignore_index, sample_weight=sample_weight)


def loss_of_sums(
    sums: Tensor, class_weights: Tensor | None = None, beta: float = 1.0, eps: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, BCE and Dice (eqs. 5 to 7), scalars, of those sums; see `reference.loss_of_sums`."""
    found = backend.implementation(sums)
    if found == "triton":
        from deepskip.kernels import bce_dice_loss_triton

        return bce_dice_loss_triton.loss_of_sums(sums, class_weights, beta, eps)
    form = bce_dice_cpu if found == "cpu" else reference
    return form.loss_of_sums(sums, class_weights, beta, eps)


def deep_skip(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Concatenates the linear 3x3 convolutions of a decoder level's upsampled inputs (eq. 1); see `reference.deep_skip`."""
    reference.check_maps(inputs, weights, mode)
    found = backend.implementation(inputs[0])
    if found == "triton":
        from deepskip.kernels import deep_skip_triton, subpixel

        form = subpixel if backend.uses_next() else deep_skip_triton
        return form.deep_skip(inputs, weights, mode)
    plain = deep_skip_cpu if found == "cpu" else reference
    return plain.deep_skip(inputs, weights, mode)


def conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves (N, C, H, W) with (K, C, 3, 3), zero padding 1."""
    found = backend.implementation(x)
    if found == "triton" and backend.uses_next():
        from deepskip.kernels import conv3_triton

        return conv3_triton.conv3(x, weight, bias)
    form = conv3_cpu if found == "cpu" else reference
    return form.conv3(x, weight, bias)


def conv3_with_sums(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve as `conv3`, and sum what batch norm needs if the form does so in passing.

    Args:
        x: (N, C, H, W).
        weight: (K, C, 3, 3).

    Returns:
        The map (N, K, H, W), and (programs, 2, K) fp32 for `batch_norm_relu`, or None.
    """
    if backend.implementation(x) == "triton" and backend.uses_next():
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
    """Normalise (N, C, H, W) over all but C, then ReLU.

    Args:
        x, weight, bias, running_mean, running_var, training, momentum, eps: as in `torch.nn.functional.batch_norm`.
        rows: (programs, 2, C) fp32, sums and sums of squares of x that its producer has written, or None. In training the new
            Triton launches then read x once; other forms do not need them.

    Returns:
        The map, of x's type.
    """
    found = backend.implementation(x)
    settings = (weight, bias, running_mean, running_var)
    if found == "triton" and backend.uses_next():
        from deepskip.kernels import batch_norm_triton

        if training and rows is not None:
            return batch_norm_triton.batch_norm_relu_of_sums(x, rows, *settings, momentum, eps)
        return batch_norm_triton.batch_norm_relu(x, *settings, training, momentum, eps)
    form = batch_norm_cpu if found == "cpu" else reference
    return form.batch_norm_relu(x, *settings, training, momentum, eps)


if __name__ == "kernels":
    from deepskip.old_names import alias

    alias(__name__)
