"""Convolutions and norms of few channels on CPUs equal torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepskip import DeepSkipUNet, kernels
from deepskip.kernels import batch_norm_cpu, conv3_cpu


def relative(ours: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert ours is not None
    assert exact is not None
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("C", "K"), [(3, 8), (8, 8), (40, 8), (8, 40), (5, 4), (16, 16)])
@pytest.mark.parametrize("size", [(12, 16), (7, 10), (9, 9), (1, 2)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_conv3(C: int, K: int, size: tuple[int, int], layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(C)
    x = torch.randn(2, C, *size, generator=generator).contiguous(memory_format=layout).requires_grad_()
    weight = (torch.randn(K, C, 3, 3, generator=generator) / C).requires_grad_()
    bias = torch.randn(K, generator=generator)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = F.conv2d(*exact, padding=1)
    out = conv3_cpu.conv3(x, weight)
    assert relative(out, expected) <= 1e-6
    grad = torch.randn(out.shape, generator=generator)
    out.backward(grad)
    expected.backward(grad.double())
    assert relative(x.grad, exact[0].grad) <= 1e-6
    assert relative(weight.grad, exact[1].grad) <= 1e-6
    with torch.no_grad():
        assert relative(conv3_cpu.conv3(x, weight, bias), expected + bias.double()[:, None, None]) <= 1e-6


def test_narrow_convolutions_go_by_pairs() -> None:
    # Otherwise, the test above would prove nothing.
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert conv3_cpu._paired(x, 8)
    assert not conv3_cpu._paired(x, 16)
    assert not conv3_cpu._paired(x[..., :3], 8)


@pytest.mark.parametrize(("C", "mean"), [(8, 0.0), (4, 3.0), (2, -100.0), (16, 1.0), (6, 0.0)])
def test_batch_norm_and_relu(C: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(C)
    x = (mean + torch.randn(4, C, 16, 8, generator=generator)).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight, bias = (torch.randn(C, generator=generator).requires_grad_() for _ in range(2))
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    running, twin = (torch.zeros(C), torch.ones(C)), (torch.zeros(C).double(), torch.ones(C).double())
    expected = F.batch_norm(exact[0], *twin, exact[1], exact[2], True, 0.1, 1e-5).relu()
    out = batch_norm_cpu.batch_norm_relu(x, weight, bias, *running, True, 0.1, 1e-5)
    # A mean of 100 leaves fewer digits.
    tolerance = 1e-6 * max(1, abs(mean))
    assert relative(out, expected) <= tolerance
    grad = torch.randn(out.shape, generator=generator)
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip((x, weight, bias), exact, strict=True):
        assert relative(ours.grad, theirs.grad) <= 3 * tolerance
    for ours, theirs in zip(running, twin, strict=True):
        assert relative(ours, theirs) <= 1e-6


def test_a_whole_network_and_its_norms_folded_into_convolutions() -> None:
    torch.manual_seed(0)
    network = DeepSkipUNet(3, 2).to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 48, 64)
    twin = DeepSkipUNet(3, 2).double()
    twin.load_state_dict(network.state_dict())
    for training in (True, False):
        network.train(training)
        twin.train(training)
        with torch.set_grad_enabled(training):
            assert relative(network(x), twin(x.double())) <= 3e-6
    assert kernels.backend.implementation(x.double()) == "reference"
    counts = [m.num_batches_tracked.item() for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts == [1] * len(counts)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(network.get_buffer(name).double(), buffer.double(), rtol=1e-4, atol=1e-5)
