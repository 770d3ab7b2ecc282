"""Normalise half of the channels by instance norm and half by batch norm (IBN-Net, Pan et al. 2018).

Instance norm removes what varies from image to image; the batch-norm half keeps it.

Both are x * scale + shift with a scale and a shift for each sample and channel, from one pass of statistics. All
computation is in fp32 or finer, and the result has the input's dtype. Half precision has too few digits for sums over
whole maps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pooled(statistics_NC: Tensor, own: int) -> Tensor:
    """Replace the statistics of channels `own` and up by their mean over the samples: these channels are the batch's."""
    shared = statistics_NC[:, own:].mean(0).expand(len(statistics_NC), -1)
    return torch.cat([statistics_NC[:, :own], shared], 1)


def _affine(x: Tensor, scale_NC: Tensor, shift_NC: Tensor) -> Tensor:
    return torch.addcmul(shift_NC[:, :, None, None], x, scale_NC[:, :, None, None])


class _InstanceBatchNorm(torch.autograd.Function):
    """Compute the gradient by hand: autograd's own takes 1.5 times as long through the statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        own = ctx.own = len(weight) // 2
        wide = _wide(x)
        variances, means = torch.var_mean(wide, (2, 3), correction=0)
        mean = _pooled(means, own)
        variance = _pooled(variances + (means - mean).square(), own)
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        batch_mean, batch_variance = mean[0, own:].clone(), variance[0, own:].clone()
        ctx.mark_non_differentiable(batch_mean, batch_variance)
        scale = weight * inverse
        return _affine(wide, scale, bias - mean * scale).to(x.dtype), batch_mean, batch_variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        wide, grad = _wide(x), _wide(grad)
        of_grad = grad.mean((2, 3))
        # The mean of grad * x_hat for each sample and channel.
        of_product = ((grad * wide).mean((2, 3)) - of_grad * mean) * inverse
        pixels = x.shape[2] * x.shape[3]
        # dx = scale (grad - mean of grad - x_hat * mean of grad x_hat), with means over the same pixels as the statistics.
        scale = weight * inverse
        slope = -scale * inverse * _pooled(of_product, ctx.own)
        shift = -scale * _pooled(of_grad, ctx.own) - slope * mean
        d_x = _affine(grad, scale, shift).addcmul_(wide, slope[:, :, None, None])
        return d_x.to(x.dtype), of_product.sum(0) * pixels, of_grad.sum(0) * pixels, None


class InstanceBatchNorm(nn.Module):
    """Normalise (N, C, H, W): the first half of the channels over (H, W), the others over (N, H, W).

    In evaluation the others use running statistics, as `torch.nn.BatchNorm2d` does.

    Args:
        channels: C, 2 or more.
        eps: added to the variance.
        momentum: share of a batch in the running statistics, 0 to 1.

    Raises:
        ValueError: for fewer than two channels.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels is {channels}; instance-batch norm takes 2 or more")
        self.own, self.eps, self.momentum = channels // 2, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels - self.own))
        self.register_buffer("running_var", torch.ones(channels - self.own))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise maps (N, C, H, W); the result has their shape and dtype.

        Args:
            x: maps (N, C, H, W).

        Raises:
            ValueError: in training, for maps of one pixel, whose instance-norm half would be nothing but its bias.
        """
        if not self.training:
            return self._evaluated(_wide(x)).to(x.dtype)
        if x.shape[2] * x.shape[3] < 2:
            raise ValueError(f"x is {tuple(x.shape)}; instance norm needs more than one pixel: use larger images")
        y: Tensor
        y, mean, variance = _InstanceBatchNorm.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return y

    def _evaluated(self, x: Tensor) -> Tensor:
        own, weight, bias = self.own, self.weight, self.bias
        # Rows first, as for an image's statistics: runtimes of exported models sum fp32 naively. group_norm would compute
        # the variance as a difference of large sums.
        centred = x[:, :own] - x[:, :own].mean(3, keepdim=True).mean(2, keepdim=True)
        variance = centred.square().mean(3, keepdim=True).mean(2, keepdim=True)
        alone = centred * (weight[:own, None, None] * (variance + self.eps).rsqrt()) + bias[:own, None, None]
        running = (self.running_mean, self.running_var, weight[own:], bias[own:])
        return torch.cat([alone, F.batch_norm(x[:, own:], *running, eps=self.eps)], 1)
