"""Instance-batch norm against torch's own two norms in float64: values, every gradient, running statistics, evaluation."""

import pytest
import torch
from torch import Tensor, nn

from deepskip import DeepSkipUNet
from deepskip.instance_batch_norm import InstanceBatchNorm


def both(x: Tensor, weight: Tensor, bias: Tensor, instance: nn.Module, batch: nn.Module) -> Tensor:
    """Normalises the first half by torch's instance norm and the rest by its batch norm."""
    own = len(weight) // 2
    y = torch.cat([instance(x[:, :own]), batch(x[:, own:])], 1)
    return y * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("channels", [2, 5, 8])
def test_half_of_each(channels: int) -> None:
    torch.manual_seed(0)
    norm = InstanceBatchNorm(channels).double()
    instance = nn.InstanceNorm2d(channels // 2)
    batch = nn.BatchNorm2d(channels - channels // 2, affine=False).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    for _ in range(3):
        # a mean far from 0 for each sample
        x = torch.randn(3, channels, 6, 7, dtype=torch.float64) * 2 + torch.arange(3).view(3, 1, 1, 1) * 3
        x.requires_grad_()
        grad = torch.randn_like(x)
        found, expected = norm(x), both(x, norm.weight, norm.bias, instance, batch)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        wanted = [x, norm.weight, norm.bias]
        for own, other in zip(
            torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
        ):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_mean, batch.running_mean)
    torch.testing.assert_close(norm.running_var, batch.running_var)
    norm.eval()
    batch.eval()
    torch.testing.assert_close(norm(x), both(x, norm.weight, norm.bias, instance, batch), rtol=1e-10, atol=1e-10)


def test_half_precision_is_normalised_in_fp32() -> None:
    # in bfloat16 a mean of 300 leaves steps of 2
    x = (300 + torch.randn(2, 4, 16, 16)).bfloat16()
    norm = InstanceBatchNorm(4)
    torch.testing.assert_close(norm(x), norm(x.float()))
    assert norm(x).dtype == torch.float32


def test_one_value_has_no_variance() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 1, 1\); a channel of one value"):
        InstanceBatchNorm(4)(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match="channels is 1"):
        InstanceBatchNorm(1)


def test_a_network_of_it_has_as_many_parameters_and_sees_no_shift_of_brightness_in_one_half() -> None:
    torch.manual_seed(0)
    network = DeepSkipUNet(3, 1, norm="instance-batch")
    assert sum(p.numel() for p in network.parameters()) == 645_665
    first = network.encoder[0][0].eval()  # type: ignore[index]
    # an image that is constant beyond its edge has the same inside
    x = torch.randn(1, 3, 32, 32)
    inside = (..., slice(1, -1), slice(1, -1))
    with torch.no_grad():
        conv, norm, _ = first
        brighter = [norm(conv(y)[inside]) for y in (x, x + 5)]
    torch.testing.assert_close(brighter[0][:, :4], brighter[1][:, :4], rtol=1e-4, atol=1e-4)
    assert (brighter[0][:, 4:] - brighter[1][:, 4:]).abs().mean() > 0.1
