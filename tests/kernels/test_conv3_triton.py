"""3x3 convolutions of few channels in Triton, interpreted without a GPU, equal float64."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from deepskip import kernels
from deepskip.kernels import backend

pytestmark = pytest.mark.new_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST, FIRST = torch.channels_last, torch.contiguous_format
# Relative to the norm: outputs, and weights in a narrower type, are rounded to half a unit of the last place.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize(
    ("N", "C", "K", "H", "W", "dtype", "layout"),
    [
        (1, 3, 8, 5, 6, torch.float32, LAST),
        (2, 8, 8, 1, 1, torch.float32, FIRST),
        (1, 8, 8, 17, 2, torch.bfloat16, LAST),
        (1, 40, 8, 3, 5, torch.bfloat16, LAST),
        (2, 16, 16, 1, 9, torch.float16, FIRST),
        pytest.param(1, 80, 16, 3, 4, torch.float32, LAST, marks=pytest.mark.slow),
        pytest.param(1, 12, 5, 20, 140, torch.float16, LAST, marks=pytest.mark.slow),
    ],
)
def test_values_gradients_and_sums(
    conv3_triton: ModuleType, N: int, C: int, K: int, H: int, W: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(C)
    x = torch.randn(N, C, H, W, generator=generator).to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_()
    weight = (torch.randn(K, C, 3, 3, generator=generator) / (3 * C**0.5)).to(DEVICE).requires_grad_()
    exact_x, exact_w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = F.conv2d(exact_x, exact_w, padding=1)
    y, rows = conv3_triton.conv3_with_sums(x, weight)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    assert (y - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert (y - expected).abs().max() <= 8 * TOLERANCE[dtype] * expected.abs().max()
    # The sums are fp32 of products in the narrower type, and no output is rounded first.
    assert rows.shape[1:] == (2, K)
    sums = rows.double().sum(0)
    assert (sums[0] - expected.sum((0, 2, 3))).norm() <= TOLERANCE[dtype] * expected.abs().sum((0, 2, 3)).norm()
    assert (sums[1] - expected.square().sum((0, 2, 3))).norm() <= TOLERANCE[dtype] * expected.square().sum()
    grad = torch.randn(y.shape, generator=generator).to(DEVICE, dtype)
    expected.backward(grad.double())
    y.backward(grad.contiguous(memory_format=layout))
    for one, other in ((x, exact_x), (weight, exact_w)):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.double() - other.grad).norm() <= TOLERANCE[dtype] * other.grad.norm()


def test_a_bias_is_added_and_gets_its_gradient(conv3_triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_chosen", "next")
    x, weight, bias = torch.randn(1, 4, 3, 5, device=DEVICE), torch.randn(8, 4, 3, 3, device=DEVICE), torch.randn(8)
    bias = bias.to(DEVICE).requires_grad_()
    y = kernels.conv3(x, weight, bias)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    torch.testing.assert_close(found, torch.full_like(bias, 15.0))


def test_next_alone_takes_it_and_many_channels_get_the_plain_form(
    conv3_triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(conv3_triton, "_conv3", lambda x, weight, bias: called.append(x.shape[1]))
    small, weight = torch.zeros(1, 4, 2, 2, device=DEVICE), torch.zeros(8, 4, 3, 3, device=DEVICE)
    for form in ("triton", "next"):
        monkeypatch.setattr(backend, "_chosen", form)
        kernels.conv3(small, weight)
    assert called == [4]
    wide = torch.randn(1, 96, 2, 2, device=DEVICE)
    assert kernels.conv3(wide, torch.randn(8, 96, 3, 3, device=DEVICE)).shape == (1, 8, 2, 2)
    assert called == [4]
    with pytest.raises(ValueError, match="8 output and 96 input channels; the limits are 16 and 80"):
        conv3_triton.conv3_with_sums(wide, torch.randn(8, 96, 3, 3, device=DEVICE))


def test_sums_have_no_gradient(conv3_triton: ModuleType) -> None:
    x = torch.randn(1, 4, 2, 2, device=DEVICE, requires_grad=True)
    _, rows = conv3_triton.conv3_with_sums(x, torch.randn(4, 4, 3, 3, device=DEVICE))
    with pytest.raises(RuntimeError, match="have no gradient"):
        rows.sum().backward()


@pytest.mark.slow
def test_the_operators_keep_torchs_rules(conv3_triton: ModuleType) -> None:
    x = torch.randn(1, 4, 3, 3, device=DEVICE).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = torch.randn(4, 4, 3, 3, device=DEVICE, requires_grad=True), torch.randn(4, device=DEVICE)
    torch.library.opcheck(torch.ops.deepskip.conv3.default, (x, weight, bias))
    # Its sums have no gradient, which the check of gradients requires.
    torch.library.opcheck(
        torch.ops.deepskip.conv3_with_sums.default, (x, weight),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    grad = torch.randn(1, 4, 3, 3, device=DEVICE)
    torch.library.opcheck(torch.ops.deepskip.conv3_gradients.default, (grad, x.detach(), weight.detach(), [True, True]))
