"""Batch norm and ReLU in Triton, interpreted without a GPU, equal torch's own in float64."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepskip import BCEDiceLoss, DeepSkipUNet, kernels
from deepskip.encoders import ConvNormReLU
from deepskip.kernels.bench.traffic import Traffic

pytestmark = pytest.mark.new_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}
EPS = 1e-5
SINGLE = torch.finfo(torch.float32).eps


@pytest.fixture
def cut_small(triton_batch_norm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Cut small maps into many tiles and programs, so that each loop runs and ends within a tile."""
    for name, value in {"WIDTH": 16, "WARPS": 1, "LOADS": 2, "CHANNELS": 8, "MAX_PROGRAMS": 3, "ROWS": 2}.items():
        monkeypatch.setattr(triton_batch_norm, name, value)
    return triton_batch_norm


def case(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "last", mean: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Return leaves x, weight and bias, and running mean and variance; each channel has its own mean and deviation."""
    generator = torch.Generator().manual_seed(shape[1])
    C = shape[1]
    shift, spread, weight, bias, running = torch.randn(5, C, generator=generator)
    x = torch.randn(shape, generator=generator) * (0.5 + spread.abs())[:, None, None] + (mean + shift)[:, None, None]
    x = x.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout])
    leaves = [x, (1.0 + 0.3 * weight).to(DEVICE), (0.5 * bias).to(DEVICE)]
    return [one.requires_grad_() for one in leaves], [(mean + running).to(DEVICE), running.exp().to(DEVICE)]


def exact_form(
    leaves: list[Tensor], running: list[Tensor], training: bool, momentum: float, grad: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute output, gradients and running statistics with torch in float64."""
    x, weight, bias = (one.detach().double().requires_grad_() for one in leaves)
    mean, var = (one.double() for one in running)
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, EPS).relu()
    return y.detach(), list(torch.autograd.grad(y, (x, weight, bias), grad.double())), [mean, var]


class Sizes(NamedTuple):
    """Magnitudes of the terms that the gradients sum up, by which their rounding is judged."""

    d_x: Tensor
    d_weight: Tensor
    d_bias: Tensor


def sizes_of(leaves: list[Tensor], running: list[Tensor], training: bool, grad: Tensor) -> Sizes:
    """Compute the magnitudes of the sums' terms: s g of each pixel, and the terms of weight and bias."""
    x, weight, g = leaves[0].detach().double(), leaves[1].detach().double(), grad.double().abs()
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (one.double() for one in running)
    inverse = (var + EPS).rsqrt()
    normal = (x - mean[:, None, None]) * inverse[:, None, None]
    return Sizes(g * (weight * inverse)[:, None, None], (g * normal.abs()).sum((0, 2, 3)), g.sum((0, 2, 3)))


def check(
    form: Callable[..., Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    training: bool,
    mean: float = 0.0,
) -> None:
    """Compare output, gradients and running statistics with float64."""
    leaves, running = case(shape, dtype, layout, mean)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    y_exact, exact, after = exact_form(leaves, running, training, 0.3, grad)
    sizes = sizes_of(leaves, running, training, grad)
    y = form(*leaves, *running, training, 0.3, EPS)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    d_x, d_weight, d_bias = torch.autograd.grad(y, leaves, grad)
    # There is a rounding to x's type, a truncation in the interpreter, and some roundings of fp32 on the way.
    tolerance = 4 * SINGLE if dtype == torch.float32 else torch.finfo(dtype).eps
    for one, other, size in ((y, y_exact, y_exact), (d_x, exact[0], sizes.d_x)):
        assert (one.double() - other).norm() <= tolerance * size.norm()
        # A norm would hide a single pixel that nobody wrote.
        assert (one.double() - other).abs().max() <= 4 * tolerance * size.abs().max()
    # A program adds up some tens of numbers one by one, and its rows are in fp64.
    assert ((d_bias.double() - exact[2]).abs() <= 8 * SINGLE * sizes.d_bias).all()
    assert ((d_weight.double() - exact[1]).abs() <= 8 * SINGLE * sizes.d_weight).all()
    # The running variance keeps its own digits, whatever the mean is.
    torch.testing.assert_close(running[0].double(), after[0], rtol=4 * SINGLE, atol=4 * SINGLE)
    torch.testing.assert_close(running[1].double(), after[1], rtol=16 * SINGLE, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 8, 9, 7), torch.float32),
        ((2, 8, 9, 7), torch.float16),
        ((2, 8, 9, 7), torch.bfloat16),
        ((3, 1, 5, 9), torch.float32),
        ((1, 11, 3, 7), torch.bfloat16),
        ((1, 3, 1, 2), torch.float32),
    ],
    ids=str,
)
def test_values_and_gradients(
    cut_small: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, layout: str, training: bool
) -> None:
    check(cut_small.batch_norm_relu, shape, dtype, layout, training)


@pytest.mark.parametrize(
    "shape", [pytest.param((2, 300, 3, 3), marks=pytest.mark.slow), (1, 70, 1, 3), (2, 8, 41, 29)], ids=str
)
def test_tiles_of_the_real_size(triton_batch_norm: ModuleType, shape: tuple[int, ...]) -> None:
    check(triton_batch_norm.batch_norm_relu, shape, torch.float32, "last", True)


@pytest.mark.parametrize("mean", [-1000.0, 30000.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_far_from_zero_leaves_the_variance(cut_small: ModuleType, layout: str, mean: float) -> None:
    check(cut_small.batch_norm_relu, (2, 3, 9, 11), torch.float32, layout, True, mean)


def rows_of(x: Tensor, programs: int) -> Tensor:
    """Add up a map as a producer's epilogue does, in plain fp32; each program takes a share of the pixels."""
    pixels = x.detach().float().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return torch.stack([torch.stack([part.sum(0), part.square().sum(0)]) for part in pixels.tensor_split(programs)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [1, 11])
def test_with_sums_that_the_producer_made(cut_small: ModuleType, dtype: torch.dtype, programs: int) -> None:
    def form(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *settings: Any) -> Tensor:
        rows = rows_of(x, programs).requires_grad_()
        return cut_small.batch_norm_relu_of_sums(x, rows, weight, bias, mean, var, *settings[1:])

    check(form, (2, 8, 7, 11), dtype, "last", True)


def test_plain_sums_are_good_enough_at_a_mean_of_five_deviations(triton_batch_norm: ModuleType) -> None:
    # As batch_norm_relu_of_sums explains, squares are 26 times the variance, and so are two roundings of their sums.
    x = (torch.randn(4, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 5.0).to(DEVICE)
    weight, bias, mean, var = (torch.full((8,), value, device=DEVICE) for value in (1.0, 0.0, 0.0, 1.0))
    triton_batch_norm._batch_statistics(None, rows_of(x, 4), 4 * 64 * 64, weight, bias, mean, var, 1.0, EPS)
    exact = x.double().var((0, 2, 3))
    assert ((var.double() - exact).abs() / exact).max() <= 2 * 26 * SINGLE


def test_rows_of_another_map_are_refused(triton_batch_norm: ModuleType) -> None:
    leaves, running = case((2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"rows are \(7, 2, 5\); for this map they must be \(programs, 2, 4\)"):
        triton_batch_norm.batch_norm_relu_of_sums(leaves[0], torch.zeros(7, 2, 5), *leaves[1:], *running, 0.1, EPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_every_time(cut_small: ModuleType, layout: str) -> None:
    runs = []
    for _ in range(2):
        leaves, running = case((2, 3, 5, 7), layout=layout)
        y = cut_small.batch_norm_relu(*leaves, *running, True, 0.1, EPS)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves), *running])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["expanded", "strided", "other layout"])
def test_gradients_of_any_strides_are_taken(cut_small: ModuleType, layout: str, kind: str) -> None:
    shape = (2, 4, 6, 5)
    leaves, running = case(shape, layout=layout)
    grad = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(2)).to(DEVICE)[..., ::2]
    if kind == "expanded":
        grad = grad[:, :, :1, :1].expand(shape)
    elif kind == "other layout":
        grad = grad.contiguous(memory_format=LAYOUTS["first" if layout == "last" else "last"])
    _, exact, _ = exact_form(leaves, running, True, 0.1, grad)
    found = torch.autograd.grad(cut_small.batch_norm_relu(*leaves, *running, True, 0.1, EPS), leaves, grad)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() <= 8 * SINGLE * other.norm()


def test_a_map_that_is_a_view_is_taken(cut_small: ModuleType) -> None:
    leaves, running = case((2, 4, 6, 10))
    leaves[0] = leaves[0].detach()[..., ::2].requires_grad_()
    expected, _, _ = exact_form(leaves, running, False, 0.1, torch.ones_like(leaves[0]))
    y = cut_small.batch_norm_relu(*leaves, *running, False, 0.1, EPS)
    assert (y - expected).norm() <= 4 * SINGLE * expected.norm()


def test_a_batch_of_nothing_and_one_of_one_value_are_as_in_torch(triton_batch_norm: ModuleType) -> None:
    leaves, running = case((1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        triton_batch_norm.batch_norm_relu(*leaves, *running, True, 0.1, EPS)
    expected, _, _ = exact_form(leaves, running, False, 0.1, torch.ones_like(leaves[0]))
    torch.testing.assert_close(triton_batch_norm.batch_norm_relu(*leaves, *running, False, 0.1, EPS).double(), expected)
    empty = torch.empty(0, 4, 3, 3, device=DEVICE, requires_grad=True)
    before = [one.clone() for one in running]
    y = triton_batch_norm.batch_norm_relu(empty, *leaves[1:], *running, True, 0.1, EPS)
    y.sum().backward()
    assert y.shape == empty.shape
    assert torch.equal(torch.stack(running), torch.stack(before))
    assert empty.grad is not None


def test_what_is_no_number_stays_none(cut_small: ModuleType) -> None:
    # A ReLU that turned nan into zeros would hide that a training has failed.
    leaves, running = case((2, 4, 5, 5))
    with torch.no_grad():
        leaves[0][1, 2, 3, 4] = torch.nan
    y = cut_small.batch_norm_relu(*leaves, *running, True, 0.1, EPS)
    assert y[:, 2].isnan().all()
    assert not y[:, [0, 1, 3]].isnan().any()
    assert running[0].isnan().tolist() == [False, False, True, False]
    (d_x,) = torch.autograd.grad(y.sum(), leaves[0])
    assert d_x[:, 2].isnan().all()


def test_parameters_of_other_types_get_the_plain_form(triton_batch_norm: ModuleType) -> None:
    leaves, running = case((2, 4, 5, 5), torch.bfloat16)
    half = [one.detach().bfloat16() for one in (*leaves[1:], *running)]
    y = triton_batch_norm.batch_norm_relu(leaves[0], *half, False, 0.1, EPS)
    assert torch.equal(y, F.batch_norm(leaves[0], half[2], half[3], half[0], half[1], False, 0.1, EPS).relu())


def test_a_second_derivative_is_refused(cut_small: ModuleType) -> None:
    leaves, running = case((2, 4, 3, 3))
    y = cut_small.batch_norm_relu(*leaves, *running, True, 0.1, EPS)
    (d_x,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        d_x.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_the_operators_keep_torchs_rules(cut_small: ModuleType, layout: str) -> None:
    leaves, running = case((2, 4, 5, 3), layout=layout)
    x, weight, bias = leaves
    ops = torch.ops.deepskip
    plain = [one.detach() for one in leaves]
    opcheck = torch.library.opcheck
    opcheck(ops.batch_norm_statistics.default, (plain[0], None, 30, *plain[1:], *running, 0.1, EPS))
    opcheck(ops.batch_norm_statistics.default, (None, rows_of(x, 3), 30, *plain[1:], *running, 0.1, EPS))
    opcheck(ops.batch_norm_fixed_statistics.default, (*plain[1:], *running, EPS))
    stats = ops.batch_norm_fixed_statistics(*plain[1:], *running, EPS)
    opcheck(ops.normalise_relu.default, (x, weight, bias, stats, True))
    opcheck(ops.normalise_relu_gradient.default, (torch.randn_like(plain[0]), plain[0], stats, True))


def test_backward_keeps_the_input_and_five_numbers_a_channel(cut_small: ModuleType) -> None:
    leaves, running = case((2, 8, 9, 11), torch.float16)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        cut_small.batch_norm_relu(*leaves, *running, True, 0.1, EPS)
    assert sum(kept.values()) == 2 * leaves[0].numel() + 4 * 5 * 8


def test_bytes_are_those_of_the_fewest_passes() -> None:
    # The tensors have no memory, so nothing runs.
    size, moved = 2 * 16 * 8 * 64 * 64, {}
    with torch.device("meta"):
        x = (
            torch.empty(16, 8, 64, 64, dtype=torch.bfloat16)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
        )
        settings = [torch.empty(8, requires_grad=i < 2) for i in range(4)]
        rows = torch.empty(32, 2, 8)
    for name, given in (("two passes", None), ("one", rows)):
        traffic = Traffic()
        with kernels.backend.chosen("next"), traffic:
            y = kernels.batch_norm_relu(x, *settings, True, 0.1, EPS, given)
            forward = len(traffic.moved)
            torch.autograd.grad(y, (x, *settings[:2]), torch.empty_like(y))
        parts = (traffic.moved[:forward], traffic.moved[forward:])
        moved[name] = [sum((one.read + one.written) // size for one in part) for part in parts]
    # Forward, x is read twice or once and y is written. Backward, x and dy are read twice and dx is written.
    assert moved["two passes"][0] == 3
    assert moved["one"][0] == 2
    assert moved["two passes"][1] == moved["one"][1] == 5


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_block_takes_it_and_compiles_as_one_graph(
    triton_batch_norm: ModuleType, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    torch.manual_seed(0)
    block = ConvNormReLU(3, 4, "batch").to(DEVICE).train(training)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    x = torch.randn(2, 3, 7, 9, device=DEVICE)
    found = {}
    for name, compiler in (("reference", None), ("next", None), ("one graph", "aot_eager")):
        monkeypatch.setenv("DEEPSKIP_KERNELS", "reference" if name == "reference" else "next")
        torch._dynamo.reset()
        block.load_state_dict(state)
        call = torch.compile(block, fullgraph=True, backend=compiler) if compiler else block
        y = call(x)
        grads = torch.autograd.grad(y.square().sum(), list(block.parameters()))
        found[name] = [y, *grads, block[1].running_mean.clone(), block[1].running_var.clone()]  # type: ignore[operator]
        assert block[1].num_batches_tracked == int(training)
    for name in ("next", "one graph"):
        for one, other in zip(found[name], found["reference"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # The same launches ran on the same numbers.
    assert torch.equal(found["next"][0], found["one graph"][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_type_of_the_map(triton_batch_norm: ModuleType, dtype: torch.dtype) -> None:
    leaves, running = case((2, 4, 5, 5), dtype)
    with torch.autocast(DEVICE, dtype):
        y = triton_batch_norm.batch_norm_relu(*leaves, *running, True, 0.1, EPS)
        plain = F.batch_norm(leaves[0], *running, *leaves[1:], True, 0.1, EPS)
    assert y.dtype == plain.dtype == dtype


@pytest.mark.slow
def test_the_whole_network_beside_the_plain_one(triton_batch_norm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = DeepSkipUNet(2, 1, base_channels=4, levels=3).to(DEVICE)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(2, 2, 12, 12, device=DEVICE)
    target = torch.randint(0, 2, (2, 12, 12), device=DEVICE)
    found = {}
    for name in ("reference", "next"):
        monkeypatch.setenv("DEEPSKIP_KERNELS", name)
        network.load_state_dict(state)
        loss = BCEDiceLoss()(network(x), target)
        grads = torch.autograd.grad(loss, list(network.parameters()))
        buffers = [one.flatten() for one in network.buffers() if one.is_floating_point()]
        found[name] = (loss.detach(), torch.cat([one.flatten() for one in grads]), torch.cat(buffers))
        network.eval()
        with torch.no_grad():
            found[name] += (network(x),)
        network.train()
    torch.testing.assert_close(found["next"][0], found["reference"][0], rtol=1e-5, atol=1e-6)
    for one, other in zip(found["next"][1:], found["reference"][1:], strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
