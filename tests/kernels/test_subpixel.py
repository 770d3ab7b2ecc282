"""The deep-skip stage in sub-pixel form, interpreted without a GPU, equals the plain form in float64."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip import kernels, network
from deepskip.kernels import reference

pytestmark = pytest.mark.new_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST, FIRST = torch.channels_last, torch.contiguous_format
# Relative to the norm: each matrix entry and each output is rounded by half a unit of the last place, up or down.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def case(
    b: int, factors: tuple[int, ...], H: int, W: int, N: int, dtype: torch.dtype, layout: torch.memory_format = LAST
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(b)
    inputs, weights = [], []
    for s in (1, *factors):
        C = b * s
        x = torch.randn(N, C, H // s, W // s, generator=generator)
        inputs.append(x.to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_())
        w = torch.randn(b, C, 3, 3, generator=generator) / (3 * C**0.5)
        weights.append(w.to(DEVICE, dtype).contiguous(memory_format=layout).requires_grad_())
    return inputs, weights


def exact_of(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("s", [1, 2, 4])
def test_the_matrices_are_those_of_upsampling_and_convolution(subpixel: ModuleType, s: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(s)
    weight = torch.randn(3, 5, 3, 3, generator=generator, device=DEVICE)
    (matrices,) = subpixel.subpixel_tables.expanded([weight], [s], mode, torch.float32)
    x = torch.randn(1, 5, 4, 6, generator=generator, device=DEVICE, dtype=torch.float64)
    expected = reference.deep_skip(
        [x.new_zeros(1, 1, 4 * s, 6 * s), x], [x.new_zeros(3, 1, 3, 3), weight.double()], mode
    )
    # Rows and columns have kinds by neighbour: in the middle, and in the first and the last cell.
    for y, X, rows, columns in (
        (1, 2, {-1: [0], 0: [1], 1: [2]}, {-1: 0, 0: 1, 1: 2}),
        (0, 0, {0: [1, 3], 1: [2]}, {0: 3, 1: 2}),
        (3, 5, {-1: [0], 0: [1, 4]}, {-1: 0, 0: 4}),
    ):
        cell = torch.zeros(s, s, 3, dtype=torch.float64, device=DEVICE)
        for d, kinds in rows.items():
            for e, column in columns.items():
                matrix = sum(matrices[kind, :, column].double() for kind in kinds)
                cell += torch.einsum("pqck,c->pqk", matrix, x[0, :, y + d, X + e])
        wanted = expected[0, 3:, y * s : y * s + s, X * s : X * s + s].permute(1, 2, 0)
        torch.testing.assert_close(cell, wanted, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("b", "factors", "H", "W", "N", "dtype", "mode", "layout"),
    [
        (8, (2, 4, 8, 2), 8, 16, 1, torch.bfloat16, "bilinear", LAST),
        (5, (2, 2), 2, 2, 2, torch.float32, "nearest", FIRST),
        (4, (4, 2), 4, 12, 2, torch.float16, "bilinear", FIRST),
        pytest.param(16, (2,), 36, 4, 1, torch.float32, "bilinear", LAST, marks=pytest.mark.slow),
        pytest.param(4, (2, 4, 8, 16, 2), 32, 16, 1, torch.float16, "nearest", LAST, marks=pytest.mark.slow),
        pytest.param(11, (2, 4), 8, 144, 1, torch.bfloat16, "nearest", LAST, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_values_and_gradients(
    subpixel: ModuleType, b: int, factors: tuple[int, ...], H: int, W: int, N: int, dtype: torch.dtype, mode: str,
    layout: torch.memory_format,
) -> None:  # fmt: skip
    inputs, weights = case(b, factors, H, W, N, dtype, layout)
    exact = exact_of(inputs), exact_of(weights)
    expected = reference.deep_skip(*exact, mode)
    out = subpixel.deep_skip(inputs, weights, mode)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    assert (out - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    # Each output is checked alone. A norm would hide a pixel that nobody wrote, or that was written twice.
    assert (out - expected).abs().max() <= 8 * TOLERANCE[dtype] * expected.abs().max()
    # The outermost frame is checked too, which the identity alone does not give.
    frame = torch.ones(H, W, dtype=torch.bool, device=DEVICE)
    frame[1:-1, 1:-1] = False
    assert (out - expected)[..., frame].norm() <= TOLERANCE[dtype] * expected[..., frame].norm()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    expected.backward(grad.double())
    out.backward(grad.contiguous(memory_format=layout))
    for one, other in zip((*inputs, *weights), (*exact[0], *exact[1]), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.double() - other.grad).norm() <= TOLERANCE[dtype] * other.grad.norm()


def test_what_is_asked_for_gets_gradients_of_the_same_bits(subpixel: ModuleType) -> None:
    inputs, weights = case(8, (2,), 4, 8, 1, torch.float32)
    leaves = [inputs[1].requires_grad_(), weights[0].requires_grad_()]
    inputs[0].requires_grad_(False)
    weights[1].requires_grad_(False)
    # The gradient is a view, not a copy.
    grad = torch.randn(1, 16, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)[..., ::2]
    runs = [torch.autograd.grad(subpixel.deep_skip(inputs, weights), leaves, grad) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    exact = exact_of(inputs), exact_of(weights)
    wanted = torch.autograd.grad(reference.deep_skip(*exact), [exact[0][1], exact[1][0]], grad.double())
    for one, other in zip(runs[0], wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_sums_of_many_gradients_pass_what_fp16_can_hold(subpixel: ModuleType) -> None:
    # 576 gradients of 30,000 add up to 2^24, and weights of 1/1024 scale that down.
    inputs, weights = case(4, (4,), 4, 4, 1, torch.float16)
    with torch.no_grad():
        weights[1].fill_(1 / 1024)
    out = subpixel.deep_skip(inputs, weights)
    (found,) = torch.autograd.grad(out, inputs[1], torch.full_like(out, 3e4))
    exact = exact_of(inputs), exact_of(weights)
    (wanted,) = torch.autograd.grad(reference.deep_skip(*exact), exact[0][1], torch.full_like(out, 3e4).double())
    assert found.isfinite().all()
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


def test_nothing_upsampled_is_kept(subpixel: ModuleType) -> None:
    inputs, weights = case(4, (2,), 4, 4, 1, torch.float32)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        subpixel.deep_skip(inputs, weights)
    assert sum(kept.values()) == sum(4 * x.numel() for x in (*inputs, *weights))


def test_many_channels_and_other_sizes_get_the_other_forms(
    subpixel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(subpixel.deep_skip_triton, "deep_skip", lambda *arguments: called.append(arguments))
    subpixel.deep_skip(*case(20, (2,), 4, 4, 1, torch.float32))
    assert len(called) == 1
    inputs, weights = case(8, (2,), 8, 8, 1, torch.float32)
    inputs[1] = inputs[1][..., :3]
    assert torch.equal(subpixel.deep_skip(inputs, weights), reference.deep_skip(inputs, weights))
    assert len(called) == 1


@pytest.mark.slow
def test_the_operators_keep_torchs_rules(subpixel: ModuleType) -> None:
    inputs, weights = case(4, (2,), 4, 4, 1, torch.float32, FIRST)
    torch.library.opcheck(torch.ops.deepskip.subpixel_stage.default, (inputs, weights, [], [0, 1], "bilinear"))
    grad = torch.randn(1, 8, 4, 4, device=DEVICE)
    detached = [x.detach() for x in inputs], [w.detach() for w in weights]
    torch.library.opcheck(
        torch.ops.deepskip.subpixel_stage_gradients.default,
        (grad, *detached, [], [0, 1], "bilinear", [True, False, True, True]),
    )


@pytest.mark.slow
def test_the_network_is_one_graph_and_the_plain_one(subpixel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = network.DeepSkipUNet(3, 1, base_channels=4, levels=3).to(DEVICE, memory_format=LAST).train()
    x = torch.randn(1, 3, 8, 8, device=DEVICE).contiguous(memory_format=LAST)
    found = {}
    for form in ("next", "reference"):
        monkeypatch.setattr(kernels.backend, "_chosen", form)
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if form == "next" else model
        out = run(x)
        found[form] = out, torch.cat([g.flatten() for g in torch.autograd.grad(out.sum(), list(model.parameters()))])
    # Batch norm of few pixels amplifies rounding.
    torch.testing.assert_close(found["next"][0], found["reference"][0], rtol=1e-4, atol=1e-5)
    difference = found["next"][1] - found["reference"][1]
    assert difference.norm() <= 1e-3 * found["reference"][1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_gives_the_branches_in_its_type(subpixel: ModuleType, dtype: torch.dtype) -> None:
    inputs, weights = case(4, (2,), 4, 4, 1, torch.float32)
    with torch.autocast(DEVICE, dtype):
        out = subpixel.deep_skip(inputs, weights)
    assert out.dtype == dtype
    expected = reference.deep_skip([x.double() for x in inputs], [w.double() for w in weights])
    assert (out - expected).norm() <= 1e-2 * expected.norm()
    grads = torch.autograd.grad(out, [*inputs, *weights], torch.ones_like(out))
    assert all(g.dtype == torch.float32 and F.relu(g.abs()).sum() > 0 for g in grads)
