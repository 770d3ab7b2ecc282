"""The deep-skip stage in Triton, interpreted without a GPU, equals the plain form in float64."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip import kernels, network
from deepskip.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the norm: each tap and each sum of rows is rounded by a unit of the last place, up or down.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def case(b: int, factors: tuple[int, ...], H: int, W: int, dtype: torch.dtype, N: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(b)
    inputs, weights = [], []
    for s in (1, *factors):
        C = b * s
        inputs.append(torch.randn(N, C, H // s, W // s, generator=generator).to(DEVICE, dtype))
        weights.append((torch.randn(b, C, 3, 3, generator=generator) / (3 * C**0.5)).to(DEVICE, dtype))
    return [inputs, weights]


# Each size is tested with each pair of a type, a mode and a layout.
FORMS = [
    (torch.float32, "bilinear", torch.channels_last), (torch.float32, "nearest", torch.contiguous_format),
    (torch.float16, "bilinear", torch.contiguous_format), (torch.float16, "nearest", torch.channels_last),
    (torch.bfloat16, "bilinear", torch.channels_last), (torch.bfloat16, "nearest", torch.contiguous_format),
]  # fmt: skip
SMALL = [(20, (2,), 6, 62), (64, (4, 2), 4, 8), (5, (2, 2), 2, 2)]
# These take 10 to 20 s each, so each has two of the six forms: both modes and both layouts.
LARGE = [((8, (2, 4, 8, 2), 16, 40), (0, 3)), ((4, (2, 4, 8, 16, 2), 16, 32), (1, 4))]


@pytest.mark.parametrize(
    ("size", "form"),
    [(size, form) for size in SMALL for form in FORMS]
    + [pytest.param(size, FORMS[i], marks=pytest.mark.slow) for size, some in LARGE for i in some],
    ids=str,
)
def test_values_and_gradients(
    triton_deep_skip: ModuleType,
    size: tuple[int, tuple[int, ...], int, int],
    form: tuple[torch.dtype, str, torch.memory_format],
) -> None:
    dtype, mode, layout = form
    inputs, weights = case(*size, dtype)
    exact = [[x.double().requires_grad_() for x in one] for one in (inputs, weights)]
    ours = [[x.contiguous(memory_format=layout).requires_grad_() for x in one] for one in (inputs, weights)]
    expected = reference.deep_skip(*exact, mode)
    out = triton_deep_skip.deep_skip(*ours, mode)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    assert (out - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    expected.backward(grad.double())
    out.backward(grad.contiguous(memory_format=layout))
    for one, other in zip(ours[0] + ours[1], exact[0] + exact[1], strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.double() - other.grad).norm() <= TOLERANCE[dtype] * other.grad.norm()
    # Each output is checked alone. A norm would hide a pixel that nobody wrote, or that was written twice.
    assert (out - expected).abs().max() <= 8 * TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.slow
def test_the_same_bits_every_time(triton_deep_skip: ModuleType) -> None:
    inputs, weights = case(8, (2, 4, 2), 16, 16, torch.float32)
    leaves = [x.requires_grad_() for x in (*inputs, *weights)]
    runs = [torch.autograd.grad(triton_deep_skip.deep_skip(inputs, weights).sum(), leaves) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_is_a_view_is_taken(triton_deep_skip: ModuleType) -> None:
    inputs, weights = case(8, (2, 4), 8, 8, torch.float32)
    out = triton_deep_skip.deep_skip([x.requires_grad_() for x in inputs], weights)
    grad = torch.randn(2, 24, 8, 16, device=DEVICE)[..., ::2]
    (d_x,) = torch.autograd.grad(out, inputs[2], grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference.deep_skip(exact, [w.double() for w in weights]).backward(grad.double())
    torch.testing.assert_close(d_x.double(), exact[2].grad, rtol=1e-5, atol=1e-5)


def test_nothing_upsampled_is_kept(triton_deep_skip: ModuleType) -> None:
    inputs, weights = case(8, (2, 4, 8), 32, 32, torch.float32)
    inputs = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in inputs]
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        triton_deep_skip.deep_skip(inputs, [w.requires_grad_() for w in weights])
    # The inputs are kept, and the weights in the order of the matrix product.
    assert sum(kept.values()) == sum(4 * x.numel() for x in (*inputs, *weights))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.slow
def test_the_operators_keep_torchs_rules(triton_deep_skip: ModuleType, last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(2, 8, 8, 12, generator=generator).to(DEVICE)
    own = own.contiguous(memory_format=torch.channels_last) if last else own
    taps = [torch.randn(2, 8 // s, 12 // s, 72, generator=generator).to(DEVICE).requires_grad_() for s in (2, 4)]
    torch.library.opcheck(torch.ops.deepskip.spread_taps.default, (own.requires_grad_(), taps, "bilinear"))
    grad = torch.randn(2, 24, 8, 12, generator=generator).to(DEVICE)
    grad = grad.contiguous(memory_format=torch.channels_last) if last else grad
    torch.library.opcheck(torch.ops.deepskip.gather_taps.default, (grad, [2, 4], "bilinear"))


def test_other_sizes_get_the_plain_form(triton_deep_skip: ModuleType) -> None:
    inputs, weights = case(8, (2, 2), 8, 8, torch.float32)
    inputs[1] = inputs[1][..., :3]
    inputs[2] = F.pad(inputs[2], (0, 0, 0, 1))
    torch.testing.assert_close(
        triton_deep_skip.deep_skip(inputs, weights), reference.deep_skip(inputs, weights), rtol=0, atol=0
    )


@pytest.mark.parametrize("form", ["triton", "auto", "reference"])
def test_one_map_is_its_own_convolution(
    triton_deep_skip: ModuleType, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(kernels.backend, "_chosen", form)
    inputs, weights = case(8, (), 4, 6, torch.float32)
    torch.testing.assert_close(kernels.deep_skip(inputs, weights), F.conv2d(inputs[0], weights[0], padding=1))


@pytest.mark.parametrize("form", ["triton", "auto", "reference"])
def test_arguments_that_do_not_fit_are_refused(
    triton_deep_skip: ModuleType, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(kernels.backend, "_chosen", form)
    inputs, weights = case(8, (2,), 4, 4, torch.float32)
    for maps, kernel_weights, mode, message in (
        ([], [], "bilinear", "at least one map and a weight for each; got 0 maps and 0 weights"),
        (inputs, weights[:1], "bilinear", "got 2 maps and 1 weights"),
        (inputs, weights, "bicubic", "mode is 'bicubic'"),
        # With fewer output channels than the level's own, the launch would read beyond the taps.
        (inputs, [weights[0], weights[1][:4]], "bilinear", r"map 1 is \(2, 16, 2, 2\) and its weight \(4, 16, 3, 3\)"),
        ([inputs[0], inputs[1][:1]], weights, "bilinear", r"map 1 is \(1, 16, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.deep_skip(maps, kernel_weights, mode)


def test_sums_of_fp16_gradients_do_not_overflow(triton_deep_skip: ModuleType) -> None:
    # A tap of the map at s = 8 is in 8 x 8 outputs. The sums of 64 gradients of 2,000 exceed 65,504.
    inputs, weights = case(4, (8,), 16, 16, torch.float16)
    weights[1] = weights[1] / 256
    leaves = [x.requires_grad_() for x in (*inputs, *weights)]
    out = triton_deep_skip.deep_skip(leaves[:2], leaves[2:])
    grad = torch.full_like(out, 2000)
    (d_x,) = torch.autograd.grad(out, leaves[1], grad)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    (expected,) = torch.autograd.grad(reference.deep_skip(exact[:2], exact[2:]), exact[1], grad.double())
    assert d_x.dtype == torch.float16
    assert (d_x - expected).norm() <= 1e-3 * expected.norm()


def test_a_second_derivative_is_refused(triton_deep_skip: ModuleType) -> None:
    inputs, weights = case(8, (2,), 4, 4, torch.float32)
    out = triton_deep_skip.deep_skip([x.requires_grad_() for x in inputs], weights)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.slow
def test_the_whole_network_and_its_loss_compile_into_one_graph(
    triton_deep_skip: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSKIP_KERNELS", "triton")
    torch.manual_seed(0)
    model = network.DeepSkipUNet(2, 1, base_channels=4, levels=3).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 10, 14, generator=generator).to(DEVICE)
    target = torch.randint(0, 2, (2, 10, 14), generator=generator, dtype=torch.uint8).to(DEVICE)

    def step(x: Tensor) -> Tensor:
        return kernels.loss_of_sums(kernels.bce_dice_sums(model(x), target))[0]

    found = {}
    for name, backend in (("eager", None), ("one graph", "aot_eager"), ("plain", None)):
        if name == "plain":
            monkeypatch.setenv("DEEPSKIP_KERNELS", "reference")
        one = torch.compile(step, fullgraph=True, backend=backend) if backend else step
        loss = one(x)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found[name] = (loss, torch.cat([g.flatten() for g in grads]))
    for name in ("eager", "one graph"):
        torch.testing.assert_close(found[name][0], found["plain"][0], rtol=1e-5, atol=1e-6)
        assert (found[name][1] - found["plain"][1]).norm() <= 1e-4 * found["plain"][1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_branches_in_its_type(triton_deep_skip: ModuleType, dtype: torch.dtype) -> None:
    inputs, weights = case(8, (2, 4), 8, 8, torch.float32)
    with torch.autocast(DEVICE, dtype):
        out = triton_deep_skip.deep_skip(inputs, weights)
    assert out.dtype == dtype
    expected = reference.deep_skip([x.double() for x in inputs], [w.double() for w in weights])
    assert (out - expected).norm() <= 1e-2 * expected.norm()
