"""The deep-skip stage in each form equals the plain form in float64, in values and all gradients."""

import pytest
import torch
from torch import Tensor

from deepskip.kernels import deep_skip_cpu, interpolation, reference


def case(b: int, factors: tuple[int, ...], size: tuple[int, int], N: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(b)
    inputs, weights = [], []
    for s in factors:
        C = b * s
        x = torch.randn(N, C, size[0] // s, size[1] // s, generator=generator)
        inputs.append(x.contiguous(memory_format=torch.channels_last))
        weights.append(torch.randn(b, C, 3, 3, generator=generator) / (3 * C**0.5))
    return inputs, weights


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(
    ("b", "factors", "size"),
    [
        (8, (1, 2, 4, 8, 2), (16, 24)),
        (4, (1, 2, 4, 8, 16, 2), (16, 48)),
        (16, (1, 2, 4, 2), (20, 12)),
        (64, (1, 2), (6, 10)),
        (5, (1, 2, 2), (2, 2)),
        (3, (1, 3, 6), (18, 6)),
    ],
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients(
    mode: str, b: int, factors: tuple[int, ...], size: tuple[int, int], layout: torch.memory_format
) -> None:
    inputs, weights = case(b, factors, size)
    exact = [x.double().requires_grad_() for x in (*inputs, *weights)]
    ours = [x.contiguous(memory_format=layout).requires_grad_() for x in (*inputs, *weights)]
    count = len(inputs)
    expected = reference.deep_skip(exact[:count], exact[count:], mode)
    out = deep_skip_cpu.deep_skip(ours[:count], ours[count:], mode)
    assert (out - expected).norm() <= 1e-6 * expected.norm()
    assert (out - expected).abs().max() <= 1e-5
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(grad.double())
    out.backward(grad)
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.double() - other.grad).norm() <= 1e-6 * other.grad.norm()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    inputs, weights = case(8, (1, 2, 4), (8, 8))
    weights[1].requires_grad_()
    inputs[2].requires_grad_()
    deep_skip_cpu.deep_skip(inputs, weights).sum().backward()
    assert [x.grad is not None for x in (*inputs, *weights)] == [False, False, True, False, True, False]


def test_nothing_upsampled_is_kept() -> None:
    inputs, weights = case(8, (1, 2, 4, 8), (32, 32))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        deep_skip_cpu.deep_skip([x.requires_grad_() for x in inputs], [w.requires_grad_() for w in weights])
    assert sum(kept.values()) == sum(4 * x.numel() for x in (*inputs, *weights))


def test_factors_that_are_not_whole_and_other_types_get_the_plain_form() -> None:
    inputs, weights = case(8, (1, 2), (8, 8))
    inputs[1] = inputs[1][..., :3]
    assert torch.equal(deep_skip_cpu.deep_skip(inputs, weights), reference.deep_skip(inputs, weights))
    half = [x.bfloat16() for x in inputs], [w.bfloat16() for w in weights]
    assert deep_skip_cpu.deep_skip(*half).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(("h", "s"), [(1, 2), (2, 4), (3, 8), (7, 2)])
def test_rows_are_those_that_torch_mixes(mode: str, h: int, s: int) -> None:
    x = torch.randn(h, generator=torch.Generator().manual_seed(0))
    tall = reference.upsample(x.view(1, 1, h, 1), (h * s, 1), mode).flatten()
    outside = torch.zeros(1)
    taps = torch.stack([torch.cat([outside, tall[:-1]]), tall, torch.cat([tall[1:], outside])], 1).view(h, s, 3)
    windows = torch.cat([outside, x, outside]).unfold(0, 3, 1)
    torch.testing.assert_close(torch.einsum("ypod,yo->ypd", interpolation.row_taps(h, s, mode), windows), taps)
