"""Instance-batch norm equals torch's two norms in float64: values, all gradients, running statistics, evaluation."""

import pytest
import torch
from torch import Tensor, nn

from deepskip import DeepSkipUNet
from deepskip.instance_batch_norm import InstanceBatchNorm


class Both(nn.Module):
    """torch's instance norm of the first half of the channels and its batch norm of the others, in float64."""

    def __init__(self, norm: InstanceBatchNorm) -> None:
        super().__init__()
        channels, self.own = len(norm.weight), len(norm.weight) // 2
        self.instance = nn.InstanceNorm2d(self.own)
        self.batch = nn.BatchNorm2d(channels - self.own, affine=False)
        self.weight, self.bias = (nn.Parameter(p.detach().double().clone()) for p in (norm.weight, norm.bias))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.instance(x[:, : self.own]), self.batch(x[:, self.own :])], 1)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def norm_of(channels: int) -> InstanceBatchNorm:
    torch.manual_seed(channels)
    norm = InstanceBatchNorm(channels)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [2, 5, 8])
def test_half_of_each(channels: int, layout: torch.memory_format) -> None:
    norm = norm_of(channels).double()
    other = Both(norm)
    for _ in range(3):
        # Each sample has a mean far from 0.
        x = torch.randn(3, channels, 6, 7, dtype=torch.float64) * 2 + torch.arange(3).view(3, 1, 1, 1) * 3
        x = x.to(memory_format=layout).requires_grad_()
        grad = torch.randn_like(x)
        found, expected = norm(x), other(x)
        assert found.is_contiguous(memory_format=layout)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        gradients = torch.autograd.grad(found, [x, norm.weight, norm.bias], grad)
        for own, known in zip(
            gradients, torch.autograd.grad(expected, [x, other.weight, other.bias], grad), strict=True
        ):
            torch.testing.assert_close(own, known, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm.running_mean, other.batch.running_mean)
    torch.testing.assert_close(norm.running_var, other.batch.running_var)
    torch.testing.assert_close(norm.eval()(x), other.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_is_rounded_once_at_the_end(training: bool) -> None:
    norm = norm_of(4).train(training)
    other = Both(norm).train(training)
    # Sums in bfloat16, whose steps at 300 are 2, would make all of this wrong.
    x = (300 + 5 * torch.randn(2, 4, 32, 32)).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    found, expected = norm(x), other(wide)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-3)
    grad = torch.randn_like(x)
    (own,), (known,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(own.double(), known, rtol=2**-8, atol=1e-3)


def test_what_has_no_variance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(8, 4, 1, 1\); instance norm needs more than one pixel"):
        InstanceBatchNorm(4)(torch.zeros(8, 4, 1, 1))
    with pytest.raises(ValueError, match="channels is 1"):
        InstanceBatchNorm(1)
    with pytest.raises(ValueError, match='base_channels is 1; with norm "instance-batch" it must be 2 or more'):
        DeepSkipUNet(3, 1, base_channels=1, norm="instance-batch")


def test_a_network_has_as_many_parameters_as_with_batch_norm() -> None:
    assert sum(p.numel() for p in DeepSkipUNet(3, 1, norm="instance-batch").parameters()) == 645_665


def test_a_networks_gradients_are_those_of_torchs_norms() -> None:
    torch.manual_seed(0)
    network = DeepSkipUNet(2, 1, base_channels=4, levels=3, norm="instance-batch").double()
    image = torch.randn(2, 2, 16, 24, dtype=torch.float64)
    names = [name for name, module in network.named_modules() if isinstance(module, InstanceBatchNorm)]
    assert len(names) == 10
    found = network(image)
    (of_first,) = torch.autograd.grad(found.square().sum(), network.encoder[0][0][0].weight)  # type: ignore[index]
    for name in names:
        parent, _, place = name.rpartition(".")
        setattr(network.get_submodule(parent), place, Both(network.get_submodule(name)))  # type: ignore[arg-type]
    expected = network(image)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (known,) = torch.autograd.grad(expected.square().sum(), network.encoder[0][0][0].weight)  # type: ignore[index]
    torch.testing.assert_close(of_first, known, rtol=1e-8, atol=1e-9)
