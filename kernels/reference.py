"""Plain PyTorch forms of DeepSkip's operators: the oracle of the tests, the CPU path, the opponent in benchmarks.

deep skip (eq. 1)
    x_0 is the level's own encoder map at (H, W); x_1 .. x_m are deeper maps at (H, W) / s_i, s_i a power of two.
    out = concat(conv3(x_0; W_0), conv3(up(x_1); W_1), ..., conv3(up(x_m); W_m)), each linear, zero padding 1.

BCE + Dice (eqs. 5 to 8)
    o = sigmoid(z) or softmax over classes(z), t = target, w = sample weight where the pixel counts, else 0
    bce   = sum w * a * -log-likelihood        a = alpha on foreground, 1 - alpha on background
    count = sum w
    to_v  = sum w * t_v * o_v,  oo_v = sum w * o_v^2,  tt_v = sum w * t_v^2
    Every loss of the family is made of these few sums, so they can be added up over workers first.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def check_maps(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str) -> None:
    """Check the arguments of `deep_skip`.

    Raises:
        ValueError: no map, another number of weights than maps, maps of unequal batches, weights that are not
            (K, C_i, 3, 3) of one K, or an unknown mode.
    """
    if not inputs or len(inputs) != len(weights):
        raise ValueError(f"deep_skip takes one weight a map, and one map or more; got {len(inputs)} and {len(weights)}")
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f'mode is {mode!r}; it must be "bilinear" or "nearest"')
    # not len(), which makes a number of a size that an exported program leaves open
    N, K = inputs[0].shape[0], weights[0].shape[0]
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        if x.ndim != 4 or x.shape[0] != N or tuple(weight.shape) != (K, x.shape[1], 3, 3):
            raise ValueError(
                f"map {i} is {tuple(x.shape)} and its weight {tuple(weight.shape)}; "
                f"they must be ({N}, C, H, W) and ({K}, C, 3, 3)"
            )


def deep_skip(inputs: Sequence[Tensor], weights: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Concatenates the linear 3x3 convolutions of a decoder level's upsampled inputs (the paper's eq. 1).

    inputs: the level's own map (N, C_0, H, W) first, then deeper maps (N, C_i, H / s_i, W / s_i).
    weights: one (K, C_i, 3, 3) for each input. mode: "bilinear" (align_corners=False) or "nearest".
    Returns (N, K * len(inputs), H, W).
    """
    size = inputs[0].shape[-2:]
    branches = []
    for x, weight in zip(inputs, weights, strict=True):
        branches.append(conv3(x if x.shape[-2:] == size else upsample(x, size, mode), weight))
    return torch.cat(branches, dim=1)


def conv3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves (N, C, H, W) with (K, C, 3, 3), zero padding 1."""
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
    """Normalises (N, C, H, W) over all but C, then ReLU; arguments as in `torch.nn.functional.batch_norm`."""
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps).relu_()


def upsample(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Enlarges (N, C, h, w) to a size (H, W); mode: "bilinear" (align_corners=False) or "nearest"."""
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=False if mode == "bilinear" else None)


def check_target(logits: Tensor, target: Tensor) -> None:
    """Check a target of integers, (N, H, W) or (N, V, H, W), against logits (N, V, H, W).

    Raises:
        ValueError: another shape, or labels that are not integers or bool.
    """
    N, V, H, W = logits.shape
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"target holds {target.dtype}; labels must be integers or bool: target.to(torch.uint8)")
    if tuple(target.shape) not in ((N, V, H, W), (N, H, W)):
        raise ValueError(f"target of shape {tuple(target.shape)} does not fit logits of shape {tuple(logits.shape)}")


def ignored_label(dtype: torch.dtype, ignore_index: int | None) -> int | None:
    """Return the ignored label, or None where labels of this type cannot be it.

    torch wraps a number that a tensor's type cannot hold: `uint8_labels != 256` is false where the label is 0.
    A bool mask has foreground and background only.
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
    """Returns the sums that weighted BCE and Dice are made of (eqs. 6 and 7), in fp32, or fp64 for fp64 logits.

    logits: (N, V, H, W). target: integer labels (N, H, W), exclusive classes (softmax) for V > 1 and binary for V = 1;
    or independent labels (N, V, H, W) of 0 and 1 (sigmoid). Entries equal to ignore_index, and samples of weight 0,
    add to no sum. sample_weight: (N,).
    Returns (2 + 3 V,): bce, count (pixels), then V times sum t*o, V times sum o^2, V times sum t^2.
    Labels are not range-checked here (it would wait for the device); the stream checks them as it decodes.
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
    # a sample of weight 0 may hold anything, infinities too: 0 * inf would be nan
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
    """Returns loss = beta * BCE + Dice, BCE and Dice (eqs. 5 to 7), scalars, of the sums that `bce_dice_sums` gives.

    sums: (2 + 3 V,). class_weights: (V,), Q_v of eq. 7, sum 1; equal where None. eps: smoothing of Dice, in pixels.
    """
    intersection, prediction_sq, target_sq = sums[2:].view(3, -1)
    # a batch without a single counted pixel has loss 0 from BCE, not nan
    bce = sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny)
    weights = 1 / len(intersection) if class_weights is None else class_weights
    dice = 1 - (weights * (2 * intersection + eps) / (target_sq + prediction_sq + eps)).sum()
    return beta * bce + dice, bce, dice
