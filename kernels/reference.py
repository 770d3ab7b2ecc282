"""Plain PyTorch implementations of DeepSkip's operators: test oracle, fallback, and baseline of the benchmarks.

deep skip (eq. 1)
    x_0 is the level's own encoder map at (H, W); x_1 .. x_m are deeper maps at (H, W) / s_i, s_i a power of two.
    out = concat(conv3(x_0; W_0), conv3(up(x_1); W_1), ..., conv3(up(x_m); W_m)), each linear, zero padding 1.

BCE + Dice (eqs. 5 to 8)
    o = sigmoid(z) or softmax over classes(z), t = target, w = sample weight where the pixel counts, else 0
    bce   = sum w * a * -log-likelihood        a = alpha on foreground, 1 - alpha on background
    count = sum w
    to_v  = sum w * t_v * o_v,  oo_v = sum w * o_v^2,  tt_v = sum w * t_v^2
    Losses of this family depend on these few sums only, so the sums can be added up over workers first.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_maps(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str) -> None:
    """Validate the arguments of `deep_skip`.

    Args:
        inputs: maps (N, C_i, H_i, W_i).
        weights: a weight (K, C_i, 3, 3) for each map.
        mode: "bilinear" or "nearest".

    Raises:
        ValueError: if there is no map, the numbers of maps and weights differ, batch sizes differ, a weight is not
            (K, C_i, 3, 3) with one K for all, or the mode is unknown.
    """
    if not inputs or len(inputs) != len(weights):
        raise ValueError(
            f"deep_skip needs at least one map and a weight for each; got {len(inputs)} maps and {len(weights)} weights"
        )
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f'mode is {mode!r}; it must be "bilinear" or "nearest"')
    # len() would fix a size that an exported program keeps dynamic.
    N, K = inputs[0].shape[0], weights[0].shape[0]
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        if x.ndim != 4 or x.shape[0] != N or tuple(weight.shape) != (K, x.shape[1], 3, 3):
            raise ValueError(
                f"map {i} is {tuple(x.shape)} and its weight {tuple(weight.shape)}; "
                f"they must be ({N}, C, H, W) and ({K}, C, 3, 3)"
            )


def deep_skip(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Concatenate the linear 3x3 convolutions of a decoder level's upsampled inputs (eq. 1).

    Args:
        inputs: the level's own map (N, C_0, H, W) first, then deeper maps (N, C_i, H / s_i, W / s_i).
        weights: a weight (K, C_i, 3, 3) for each map.
        mode: upsampling, "bilinear" (align_corners=False) or "nearest".

    Returns:
        Map (N, K * len(inputs), H, W).
    """
    size = inputs[0].shape[-2:]
    branches = []
    for x, weight in zip(inputs, weights, strict=True):
        branches.append(conv3(x if x.shape[-2:] == size else upsample(x, size, mode), weight))
    return torch.cat(branches, dim=1)


def conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve a map with 3x3 weights and zero padding 1.

    Args:
        x: map (N, C, H, W).
        weight: weights (K, C, 3, 3).
        bias: bias (K,), or None.

    Returns:
        Map (N, K, H, W).
    """
    return F.conv2d(x, weight, bias, padding=1)


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
    """Normalize a map over all axes but its channels, then apply ReLU; arguments as in `torch.nn.functional.batch_norm`.

    Args:
        x: map (N, C, H, W).
        weight: scale (C,).
        bias: shift (C,).
        running_mean: running mean (C,); updated in place in training.
        running_var: running variance (C,); updated in place in training.
        training: whether to use the batch's statistics; else the running ones.
        momentum: weight of the batch's statistics in the running ones.
        eps: added to the variance.

    Returns:
        Map (N, C, H, W).
    """
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps).relu_()


def upsample(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Upsample a map (N, C, h, w) to a size.

    Args:
        x: map (N, C, h, w).
        size: height and width of the result (H, W).
        mode: "bilinear" (align_corners=False) or "nearest".

    Returns:
        Map (N, C, H, W).
    """
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=False if mode == "bilinear" else None)


def check_target(logits: Tensor, target: Tensor) -> None:
    """Validate a target against logits.

    Args:
        logits: logits (N, V, H, W).
        target: labels, integers or bool, (N, H, W) or (N, V, H, W).

    Raises:
        ValueError: if the shapes do not fit, or the labels are not integers or bool.
    """
    N, V, H, W = logits.shape
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"target holds {target.dtype}; labels must be integers or bool: target.to(torch.uint8)")
    if tuple(target.shape) not in ((N, V, H, W), (N, H, W)):
        raise ValueError(f"target of shape {tuple(target.shape)} does not fit logits of shape {tuple(logits.shape)}")


def ignored_label(dtype: torch.dtype, ignore_index: int | None) -> int | None:
    """Return the ignored label, or None if labels of this dtype cannot have that value.

    torch wraps a number that a tensor's dtype cannot hold: `uint8_labels != 256` is false where the label is 0.
    A bool mask has only foreground and background.

    Args:
        dtype: dtype of the labels.
        ignore_index: label of pixels that are not counted, or None.
    """
    if ignore_index is None or dtype == torch.bool:
        return None
    limits = torch.iinfo(dtype)
    return ignore_index if limits.min <= ignore_index <= limits.max else None


def bce_dice_sums(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    ignore_index: int | None = 255,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Compute the sums that weighted BCE and Dice are made of (eqs. 6 and 7).

    Labels equal to `ignore_index`, and samples of weight 0, are not counted in any sum. Labels are not range-checked here,
    because that would wait for the device; the stream checks them when it decodes.

    Args:
        logits: logits (N, V, H, W).
        target: integer labels (N, H, W), exclusive classes (softmax) for V > 1 and binary for V = 1; or independent labels
            (N, V, H, W) of 0 and 1 (sigmoid).
        alpha: weight of foreground pixels in BCE; background gets 1 - alpha.
        ignore_index: label of pixels that are not counted; None counts all.
        sample_weight: weights of the samples, (N,), or None for all one.

    Returns:
        Sums (2 + 3 V,) in fp32, or fp64 for fp64 logits: bce, count (pixels), then sum t*o, sum o^2 and sum t^2, each of V
        classes.

    Raises:
        ValueError: if the target does not fit the logits (`check_target`).
    """
    z_NVHW = logits if logits.dtype == torch.float64 else logits.float()
    V = logits.shape[1]
    independent = target.ndim == 4 or V == 1
    check_target(logits, target)
    labels = target if target.ndim == 4 or not independent else target[:, None]

    ignore = ignored_label(labels.dtype, ignore_index)
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
    weight = counts.to(z_NVHW.dtype)
    if sample_weight is not None:
        weight = weight * sample_weight.to(z_NVHW.dtype).view(-1, *[1] * (labels.ndim - 1))
    # A sample of weight 0 may hold anything, infinities too, and 0 * inf would be nan.
    counts = weight != 0
    labels = torch.where(counts, labels, 0)

    if independent:
        z_NVHW = torch.where(counts, z_NVHW, 0)
        t_NVHW = labels.to(z_NVHW.dtype)
        o_NVHW = torch.sigmoid(z_NVHW)
        bce = -(alpha * t_NVHW * F.logsigmoid(z_NVHW) + (1 - alpha) * (1 - t_NVHW) * F.logsigmoid(-z_NVHW))
        bce_sum = (weight * bce).sum()
        count = weight.sum() / V
        weight_NVHW = weight
    else:
        z_NVHW = torch.where(counts[:, None], z_NVHW, 0)
        log_o = F.log_softmax(z_NVHW, dim=1)
        o_NVHW = log_o.exp()
        t_NVHW = F.one_hot(labels.long(), V).movedim(-1, 1).to(z_NVHW.dtype)
        foreground = (labels != 0).to(z_NVHW.dtype)
        balance = alpha * foreground + (1 - alpha) * (1 - foreground)
        bce_sum = (weight * balance * -log_o.gather(1, labels.long()[:, None])[:, 0]).sum()
        count = weight.sum()
        weight_NVHW = weight[:, None]

    pixels = (0, 2, 3)
    return torch.cat(
        [
            torch.stack([bce_sum, count]),
            (weight_NVHW * t_NVHW * o_NVHW).sum(pixels),
            (weight_NVHW * o_NVHW * o_NVHW).sum(pixels),
            (weight_NVHW * t_NVHW * t_NVHW).sum(pixels),
        ]
    )


def loss_of_sums(
    sums: Tensor, class_weights: Tensor | None = None, beta: float = 1.0, eps: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss = beta * BCE + Dice, BCE and Dice (eqs. 5 to 7) from the sums of `bce_dice_sums`.

    Args:
        sums: sums (2 + 3 V,).
        class_weights: Q_v of eq. 7, (V,), with sum 1; None weights all classes equally.
        beta: weight of BCE.
        eps: smoothing of Dice, in pixels.

    Returns:
        Loss, BCE and Dice, scalars.
    """
    intersection, prediction_sq, target_sq = sums[2:].view(3, -1)
    # The BCE of a batch without a counted pixel is 0, not nan.
    bce = sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny)
    weights = 1 / len(intersection) if class_weights is None else class_weights
    dice = 1 - (weights * (2 * intersection + eps) / (target_sq + prediction_sq + eps)).sum()
    return beta * bce + dice, bce, dice
