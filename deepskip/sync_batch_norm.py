"""Batch norm over the global batch: its statistics are those of all samples on all ranks.

torch.nn.SyncBatchNorm computes on GPUs only. This computes on CPUs too, and leaves out samples of weight 0, which only
fill a batch: their number depends on the number of ranks.

    n, mean, M2 of a rank        from its samples, M2 = sum (x - mean)^2
    mean = sum n_r mean_r / n    var = sum (M2_r + n_r (mean_r - mean)^2) / n    (Chan et al. 1979)
    x_hat = (x - mean) / sqrt(var + eps),  y = weight x_hat + bias
    dx = weight / sqrt(var + eps) (g - sum g / n - x_hat sum g x_hat / n),  sums over all ranks

Sums of squares would cancel where the mean is large. The few numbers of a channel are combined in fp64, so that the result
does not depend on how samples are divided.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def in_group() -> bool:
    """Return whether this process belongs to a process group of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _affine(x: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    return torch.addcmul(shift_C[:, None, None], x, scale_C[:, None, None])


def _moments(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean and the variance of each channel over all ranks.

    Args:
        x: maps of this rank (N, C, H, W).
        counts: whether each sample is counted, (N,) bool.

    Returns:
        Mean and variance (C,), and the number of values of a channel, a scalar, all fp64.
    """
    pixels = x.shape[2] * x.shape[3]
    variances, means = (each.double() for each in torch.var_mean(x, (2, 3), correction=0))
    n_N1 = (counts * float(pixels)).double()[:, None]
    n, mean, M2 = _combined(n_N1, means, variances * pixels)
    if in_group():
        row = torch.cat([n, mean, M2])
        rows = row.new_empty(dist.get_world_size(), len(row))
        dist.all_gather(list(rows.unbind()), row)
        n, mean, M2 = _combined(*rows.split([1, len(mean), len(mean)], 1))
    n = n.clamp_min(1)
    return mean, M2 / n, n


def _combined(n_R1: Tensor, mean_RC: Tensor, M2_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Parts without a value may hold anything.
    mean_RC, M2_RC = (torch.where(n_R1 > 0, each, 0) for each in (mean_RC, M2_RC))
    n = n_R1.sum(0)
    mean = (n_R1 * mean_RC).sum(0) / n.clamp_min(1)
    return n, mean, (M2_RC + n_R1 * (mean_RC - mean).square()).sum(0)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, counts: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _wide(x)
        mean, variance, n = _moments(wide, counts)
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse, counts, n)
        ctx.mark_non_differentiable(mean, variance, n)
        scale = weight * inverse
        shift = bias - mean * scale
        return _affine(wide, scale.to(wide.dtype), shift.to(wide.dtype)).to(x.dtype), mean, variance, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts, n = ctx.saved_tensors
        wide, grad = _wide(x), _wide(grad)
        centred = wide - mean.to(wide.dtype)[:, None, None]
        # Over pixels in the dtype of the maps, then over samples in fp64.
        d_bias = grad.sum((2, 3)).double().sum(0)
        d_weight = (grad * centred).sum((2, 3)).double().sum(0) * inverse
        sums = torch.stack([d_bias, d_weight])
        if in_group():
            dist.all_reduce(sums)
        scale = weight * inverse
        shift, slope = -scale / n * sums[0], -scale / n * sums[1] * inverse
        through_moments = _affine(centred, slope.to(wide.dtype), shift.to(wide.dtype))
        d_x = grad * scale.to(wide.dtype)[:, None, None]
        # Samples that are not counted have no part in the statistics.
        d_x.add_(torch.where(counts[:, None, None, None], through_moments, 0))
        return d_x.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Normalise (N, C, H, W) by the statistics of the samples of weight other than 0 on all ranks.

    Its state has the names of `torch.nn.BatchNorm2d`, and in evaluation it is that. In training every rank of the process
    group calls it equally often: once forward and once backward, each with one collective.

    Attributes:
        weights: weights of the samples of the next batch, (N,), or None if all count; the training step sets it.
    """

    weights: Tensor | None = None

    def is_plain(self) -> bool:
        """Return whether the next forward pass is that of `torch.nn.BatchNorm2d`."""
        return not self.training or (self.weights is None and not in_group())

    def forward(self, input: Tensor) -> Tensor:
        """Normalise maps (N, C, H, W); the result has their shape and dtype."""
        if self.is_plain():
            return super().forward(input)
        if torch.compiler.is_compiling():
            # As a decorator, disable would import the compiler with this module, which takes two seconds of each process.
            synchronised: Tensor = torch.compiler.disable(self._synchronised)(input)
            return synchronised
        return self._synchronised(input)

    def _synchronised(self, x: Tensor) -> Tensor:
        weights = self.weights
        counts = x.new_ones(len(x), dtype=torch.bool) if weights is None else weights.to(x.device) != 0
        y: Tensor
        y, mean, variance, n = _SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, counts, self.eps
        )
        running_mean, running_var, momentum = self.running_mean, self.running_var, self.momentum
        assert running_mean is not None
        assert running_var is not None
        assert momentum is not None
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (n / (n - 1).clamp_min(1))).to(running_var.dtype), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y
