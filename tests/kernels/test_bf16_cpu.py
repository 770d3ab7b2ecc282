"""Under autocast to bf16 the CPU forms are as near to float64 as PyTorch's own operators are."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip import DeepSkipUNet
from deepskip.kernels import backend, batch_norm_cpu, conv3_cpu, cpu_types, deep_skip_cpu, reference
from tests.kernels.test_deep_skip import case
from tests.kernels.test_narrow_cpu import relative

Operator = Callable[[list[Tensor]], Tensor]


def errors(operator: Operator, exact: Operator, tensors: Sequence[Tensor]) -> list[float]:
    """Return the relative errors of the output and the gradients of an operator under autocast to bf16."""
    ours = [t.detach().clone().requires_grad_() for t in tensors]
    theirs = [t.detach().double().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        out = operator(ours)
    assert out.dtype == torch.bfloat16
    expected = exact(theirs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(grad)
    expected.backward(grad.double())
    assert [t.grad.dtype for t in ours if t.grad is not None] == [torch.float32] * len(ours)
    return [relative(out, expected), *(relative(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]


@pytest.mark.parametrize(("C", "K"), [(3, 8), (40, 8), (8, 40), (5, 4), (16, 16)])
@pytest.mark.parametrize("size", [(12, 16), (7, 10), (9, 9), (1, 2)])
def test_conv3(C: int, K: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(C)
    x = torch.randn(2, C, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    tensors = [x, torch.randn(K, C, 3, 3, generator=generator) / C]
    own = errors(lambda t: conv3_cpu.conv3(t[0], t[1]), lambda t: F.conv2d(*t, padding=1), tensors)
    assert max(own) < 2**-7


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    ("b", "factors", "size"),
    [(8, (1, 2, 4, 8, 2), (16, 24)), (4, (1, 2, 4, 2), (20, 12)), (16, (1, 2, 4, 2), (8, 8)), (5, (1, 2, 2), (2, 2))],
)
def test_deep_skip(b: int, factors: tuple[int, ...], size: tuple[int, int], mode: str) -> None:
    inputs, weights = case(b, factors, size)
    count = len(inputs)
    tensors = [*(x.contiguous(memory_format=torch.channels_last) for x in inputs), *weights]

    def exact(t: list[Tensor]) -> Tensor:
        return reference.deep_skip(t[:count], t[count:], mode)

    own = errors(lambda t: deep_skip_cpu.deep_skip(t[:count], t[count:], mode), exact, tensors)
    plain = errors(exact, exact, tensors)
    # The low-resolution output is rounded where the plain form rounds the enlarged input, and once more when it is enlarged.
    assert max(a / b for a, b in zip(own, plain, strict=True)) < 2
    assert max(own) < 2**-6


@pytest.mark.parametrize(("C", "mean"), [(8, 0.0), (4, 3.0), (2, -20.0)])
def test_batch_norm_and_relu(C: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(C)
    x = (mean + torch.randn(4, C, 16, 8, generator=generator)).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(C, generator=generator).requires_grad_() for _ in range(2))
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    running, twin = (torch.zeros(C), torch.ones(C)), (torch.zeros(C).double(), torch.ones(C).double())
    expected = F.batch_norm(exact[0], *twin, exact[1], exact[2], True, 0.1, 1e-5).relu()
    out = batch_norm_cpu.batch_norm_relu(x, weight, bias, *running, True, 0.1, 1e-5)
    assert out.dtype == torch.bfloat16
    assert relative(out, expected) < 2**-8
    grad = torch.randn(out.shape, generator=generator).bfloat16()
    out.backward(grad)
    expected.backward(grad.double())
    # ReLU's mask is that of the rounded output: both are 0 at the same places but for underflow.
    for ours, theirs in zip((x, weight, bias), exact, strict=True):
        assert relative(ours.grad, theirs.grad) < 2**-7
    for ours, theirs in zip(running, twin, strict=True):
        assert relative(ours, theirs) <= 1e-5


def test_a_whole_network_is_as_near_as_the_plain_one() -> None:
    torch.manual_seed(0)
    network = DeepSkipUNet(3, 1).to(memory_format=torch.channels_last)
    twin = DeepSkipUNet(3, 1).double()
    twin.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 48, 64)
    expected = twin(x.double())
    expected.square().sum().backward()
    found = {}
    for name in ("auto", "reference"):
        network.zero_grad()
        with backend.chosen(name), torch.autocast("cpu", torch.bfloat16):
            out = network(x)
        out.float().square().sum().backward()
        gradients = [relative(a.grad, b.grad) for a, b in zip(network.parameters(), twin.parameters(), strict=True)]
        found[name] = relative(out, expected), sum(gradients) / len(gradients)
    assert found["auto"][0] < 1.5 * found["reference"][0]
    assert found["auto"][1] < 1.5 * found["reference"][1]


def test_numbers_are_copied_four_at_a_time_where_they_lie_so() -> None:
    x = torch.randn(3, 5, 8).bfloat16()
    assert [t.dtype for t in cpu_types.wide(x, x[:, 1:])] == [torch.int64] * 2
    for odd in (x[..., 2:6], x[..., :6], x[..., ::2], x.float()):
        assert cpu_types.wide(x, odd) == (x, odd)
    into = torch.zeros(5, 3, 8).bfloat16()
    cpu_types.copy(into, x.transpose(0, 1))
    assert torch.equal(into, x.transpose(0, 1))
    assert cpu_types.working_type(x) is None
    with torch.autocast("cpu", torch.float16):
        assert cpu_types.working_type(x.float()) is None
