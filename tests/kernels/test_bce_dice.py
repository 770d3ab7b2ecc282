"""The Triton kernels, run by Triton's interpreter on the CPU, equal float64 written out by hand."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from deepskip.kernels import bce_dice_cpu, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_hand(
    logits: Tensor, target: Tensor, alpha: float, ignore: int | None, weight: Tensor | None, g: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the sums and the gradient of g times the sums in float64 numpy, pixel by pixel of eqs. 6 and 7."""
    z = logits.cpu().double().numpy().copy()
    target, weight = target.cpu(), None if weight is None else weight.cpu()
    V = z.shape[1]
    exclusive = V > 1 and target.ndim == 3
    labels = target.long().numpy()
    if labels.ndim == 3:
        labels = labels[:, None]
    w = np.ones(labels.shape) if ignore is None else (labels != ignore).astype(float)
    if weight is not None:
        w = w * weight.double().numpy()[:, None, None, None]
    z[np.broadcast_to(w == 0, z.shape)] = 0
    labels = np.where(w == 0, 0, labels)
    if exclusive:
        e = np.exp(z - z.max(1, keepdims=True))
        o = e / e.sum(1, keepdims=True)
        t = (labels == np.arange(V)[None, :, None, None]).astype(float)
        a = np.where(labels != 0, alpha, 1 - alpha)
        bce = (w * a * -(t * np.log(o)).sum(1, keepdims=True)).sum()
        count = w.sum()
    else:
        o = 1 / (1 + np.exp(-z))
        t = labels.astype(float)
        bce = (w * (alpha * t * np.log1p(np.exp(-z)) + (1 - alpha) * (1 - t) * (z + np.log1p(np.exp(-z))))).sum()
        count = w.sum() / V
    axes = (0, 2, 3)
    sums = np.concatenate([[bce, count], (w * t * o).sum(axes), (w * o * o).sum(axes), (w * t * t).sum(axes)])
    h = g[2 : 2 + V, None, None] * t + 2 * g[2 + V : 2 + 2 * V, None, None] * o
    if exclusive:
        dz = w * (g[0] * a * (o - t) + o * (h - (h * o).sum(1, keepdims=True)))
    else:
        dz = w * (g[0] * ((1 - alpha) * (1 - t) * o - alpha * t * (1 - o)) + h * o * (1 - o))
    return sums, dz


def case(
    V: int,
    independent: bool,
    dtype: torch.dtype,
    labels: torch.dtype,
    size: tuple[int, int] = (13, 11),
    N: int = 3,
    device: str = DEVICE,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(V)
    logits = (4 * torch.randn(N, V, *size, generator=generator)).to(dtype)
    shape = (N, V, *size) if independent else (N, *size)
    highest = 2 if independent or V == 1 else V
    target = torch.randint(0, highest, shape, generator=generator).to(labels)
    return logits.to(device), target.to(device)


CASES = [
    (1, False, torch.float32, torch.uint8),
    (1, False, torch.bfloat16, torch.bool),
    (1, True, torch.float16, torch.int16),
    (3, True, torch.float32, torch.int64),
    (3, False, torch.float32, torch.int64),
    (19, False, torch.bfloat16, torch.uint8),
    (2, False, torch.float16, torch.int32),
]


@pytest.mark.parametrize(("V", "independent", "dtype", "labels"), CASES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("form", ["triton", "cpu"])
def test_sums_and_gradient_are_those_written_out_by_hand(
    form: str,
    triton_form: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    V: int,
    independent: bool,
    dtype: torch.dtype,
    labels: torch.dtype,
    channels_last: bool,
) -> None:
    device = DEVICE if form == "triton" else "cpu"
    logits, target = case(V, independent, dtype, labels, device=device)
    ignore = None
    weight = torch.tensor([1.0, 0.0, 0.5], device=device)
    if labels != torch.bool:
        ignore = 255 if labels == torch.uint8 else -1
        target[..., 2:4, :] = ignore
    # Values that do not count may be anything.
    logits[1] = float("inf")
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    g = np.random.default_rng(0).normal(size=2 + 3 * V)
    expected, gradient = by_hand(logits, target, 0.3, ignore, weight, g)
    leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    # There are several blocks, of which the last is smaller.
    monkeypatch.setattr(bce_dice_cpu, "BLOCK", 5 * 11 * V)
    implementation = triton_form if form == "triton" else bce_dice_cpu
    sums = implementation.bce_dice_sums(leaf, target, alpha=0.3, ignore_index=ignore, sample_weight=weight)
    np.testing.assert_allclose(sums.detach().cpu().numpy(), expected, rtol=2e-6)
    sums.backward(torch.from_numpy(g).float().to(device))
    assert leaf.grad is not None
    assert leaf.grad.stride() == logits.stride()
    # This allows for one rounding to the logits' own type.
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(
        leaf.grad.cpu().double().numpy(), gradient, rtol=tolerance, atol=max(1e-6, tolerance / 10)
    )
    assert (leaf.grad[1] == 0).all()


def test_more_blocks_than_programs(triton_form: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_form, "MAX_PROGRAMS", 4)
    for V in (1, 3):
        logits, target = case(V, False, torch.float32, torch.uint8, (64, 97), 2)
        expected, _ = by_hand(logits, target, 0.5, 255, None, np.zeros(2 + 3 * V))
        first, second = (triton_form.bce_dice_sums(logits, target) for _ in range(2))
        np.testing.assert_allclose(first.cpu().numpy(), expected, rtol=2e-6)
        assert torch.equal(first, second)


def test_views_and_samples_of_size_one(triton_form: ModuleType) -> None:
    logits, target = case(3, False, torch.float32, torch.uint8, (16, 16), 4)
    for z, t in ((logits[::2, :, 2:9, 3:], target[::2, 2:9, 3:]), (logits[:1, :, :1, :], target[:1, :1])):
        expected, _ = by_hand(z, t, 0.5, 255, None, np.zeros(11))
        np.testing.assert_allclose(triton_form.bce_dice_sums(z, t).cpu().numpy(), expected, rtol=2e-6)
    with pytest.raises(ValueError, match=r"target of shape \(4, 16, 15\) does not fit logits of shape"):
        triton_form.bce_dice_sums(logits, target[..., 1:])


@pytest.mark.parametrize(("V", "independent"), [(1, False), (3, False), (3, True)])
def test_the_operators_keep_torchs_rules(triton_form: ModuleType, V: int, independent: bool) -> None:
    logits, target = case(V, independent, torch.float32, torch.int64, (5, 4), 2)
    weight = torch.tensor([1.0, 0.5], device=DEVICE)
    arguments = (logits.requires_grad_(), target, weight, 0.3, 255)
    torch.library.opcheck(torch.ops.deepskip.bce_dice_sums.default, arguments)
    grad = torch.randn(2 + 3 * V, device=DEVICE)
    torch.library.opcheck(torch.ops.deepskip.bce_dice_gradient.default, (grad, logits.detach(), *arguments[1:]))


def test_compiled_whole_and_no_second_derivative(triton_form: ModuleType) -> None:
    logits, target = case(3, False, torch.float32, torch.uint8, (6, 7), 2)

    def loss(z: Tensor) -> Tensor:
        return triton_form.bce_dice_sums(z, target).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.testing.assert_close(compiled(one), loss(other))
    torch.testing.assert_close(*torch.autograd.grad(compiled(one), one), *torch.autograd.grad(loss(other), other))
    (first,) = torch.autograd.grad(loss(other), other, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


# Some values fit the label's type, others do not. torch compares a uint8 with 256 as with 0.
@pytest.mark.parametrize(
    ("labels", "ignore", "ignored"),
    [
        (torch.int64, 2**32 + 1, 2**32 + 1),
        (torch.int64, -(2**31), -(2**31)),
        (torch.int64, 1, 1),
        (torch.int32, 2**32 + 1, None),
        (torch.int32, -(2**31), -(2**31)),
        (torch.int16, 2**16 + 1, None),
        (torch.uint8, 256, None),
        (torch.uint8, -1, None),
        (torch.bool, 1, None),
    ],
)
@pytest.mark.parametrize("V", [1, 3])
@pytest.mark.parametrize("form", ["triton", "cpu", "reference"])
def test_the_ignored_label_is_compared_in_the_labels_own_type(
    triton_form: ModuleType, form: str, V: int, labels: torch.dtype, ignore: int, ignored: int | None
) -> None:
    implementation = {"triton": triton_form, "cpu": bce_dice_cpu, "reference": reference}[form]
    device = "cpu" if form == "cpu" else DEVICE
    logits, target = case(V, False, torch.float32, torch.uint8, device=device)
    target = (target != 0 if labels == torch.bool else target).to(labels)
    if ignored is not None:
        target[:, 2:5] = ignored
    # By hand, ignored pixels are 7.
    plain = torch.where(target == ignored, 7, target.long()) if ignored is not None else target.long()
    g = np.random.default_rng(0).normal(size=2 + 3 * V)
    expected, gradient = by_hand(logits, plain, 0.3, 7, None, g)
    leaf = logits.clone().requires_grad_()
    sums = implementation.bce_dice_sums(leaf, target, alpha=0.3, ignore_index=ignore)
    np.testing.assert_allclose(sums.detach().cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
    sums.backward(torch.from_numpy(g).float().to(device))
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.cpu().numpy(), gradient, rtol=1e-4, atol=1e-5)


def test_labels_that_are_not_integers_are_refused(triton_form: ModuleType) -> None:
    for implementation in (triton_form, bce_dice_cpu, reference):
        with pytest.raises(ValueError, match=r"target holds torch\.float32; labels must be integers or bool"):
            implementation.bce_dice_sums(torch.zeros(1, 1, 4, 4, device=DEVICE), torch.rand(1, 4, 4, device=DEVICE))


def test_a_confident_and_right_network_has_a_loss_of_almost_nothing() -> None:
    # 20 - softplus(20) would lose all digits.
    logits, target = torch.full((1, 1, 8, 8), 20.0), torch.ones(1, 8, 8, dtype=torch.uint8)
    assert bce_dice_cpu.bce_dice_sums(logits, target)[0].item() == pytest.approx(
        64 * 0.5 * np.log1p(np.exp(-20)), rel=1e-5
    )


def test_the_reference_is_the_kernels_twin(triton_form: ModuleType) -> None:
    for V, independent in ((1, False), (4, False), (4, True)):
        logits, target = case(V, independent, torch.float32, torch.uint8)
        target[0, ..., :3, :] = 255
        options = {"alpha": 0.8, "sample_weight": torch.tensor([1.0, 2.0, 0.0], device=DEVICE)}
        torch.testing.assert_close(
            triton_form.bce_dice_sums(logits, target, **options),
            reference.bce_dice_sums(logits, target, **options),
            rtol=2e-6, atol=1e-5,
        )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="looks at addresses through the interpreter")
def test_elements_beyond_two_to_the_31(triton_form: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pages that are not written share the system's one page of zeros.
    far = 2**31 + 2**20
    z = torch.from_numpy(np.zeros(far + 2**20, np.float16))
    dz = torch.from_numpy(np.zeros(far + 2**20, np.float16))
    labels = torch.from_numpy(np.zeros(far + 2**20, np.uint8))
    # The interpreter would copy all six gigabytes of arguments back onto themselves.
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *arguments: None)
    N, V, pixels = 2, 2, 70
    small, target = case(V, True, torch.float16, torch.uint8, (1, pixels), N, "cpu")
    small_exclusive = target[:, 0]
    g = np.random.default_rng(0).normal(size=2 + 3 * V)
    # Samples, classes or pixels are far apart.
    for z_n, z_v, z_p in ((far, 128, 1), (128, far, 1), (1, 2, far // 69)):
        n, v, p = (torch.arange(count) for count in (N, V, pixels))
        places = n[:, None, None] * z_n + v[:, None] * z_v + p * z_p
        z[places] = small[:, :, 0]
        labels[places] = target[:, :, 0]
        expected, gradient = by_hand(small, target, 0.3, 255, None, g)
        # There are two programs a sample, each with a row of bce, count, to, oo and tt.
        rows = torch.empty(N * 2, 5 * V)
        strides = (z_n, z_v, z_p)
        triton_form._sigmoid_sums[(N * 2, V)](
            z,
            labels,
            z,
            rows,
            2,
            pixels,
            V,
            0.3,
            255,
            *strides,
            *strides,
            5 * V,
            HAS_WEIGHT=False,
            HAS_IGNORE=True,
            BLOCK=16,
        )
        np.testing.assert_allclose(triton_form._added_up(rows, V, V).numpy(), expected, rtol=2e-6)
        triton_form._sigmoid_gradient[(N * 5, V)](
            z, labels, z, torch.from_numpy(g).float(), dz, 5, pixels, V, 0.3, 255, *strides, *strides,
            HAS_WEIGHT=False, HAS_IGNORE=True, BLOCK=16,
        )  # fmt: skip
        np.testing.assert_allclose(dz[places].double().numpy(), gradient[:, :, 0], rtol=1e-3, atol=1e-4)

        labels[places[:, 0]] = small_exclusive[:, 0]
        expected, gradient = by_hand(small, small_exclusive, 0.3, 255, None, g)
        rows = torch.empty(N * 2, 2 + 3 * V)
        sizes = {"HAS_WEIGHT": False, "HAS_IGNORE": True, "CLASSES": 2, "BLOCK": 16}
        triton_form._softmax_sums[(N * 2,)](
            z, labels, z, rows, 2, pixels, V, 0.3, 255, *strides, z_n, z_p, 2 + 3 * V, **sizes
        )
        np.testing.assert_allclose(triton_form._added_up(rows, V, 1).numpy(), expected, rtol=2e-6)
        triton_form._softmax_gradient[(N * 5,)](
            z, labels, z, torch.from_numpy(g).float(), dz, 5, pixels, V, 0.3, 255, *strides, z_n, z_p, **sizes
        )
        np.testing.assert_allclose(dz[places].double().numpy(), gradient[:, :, 0], rtol=1e-3, atol=1e-4)


def test_autocast_changes_nothing_but_the_logits_type(triton_form: ModuleType) -> None:
    for form, device in ((triton_form, DEVICE), (bce_dice_cpu, "cpu"), (reference, "cpu")):
        logits, target = case(3, False, torch.bfloat16, torch.uint8, device=device)
        one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            inside = form.bce_dice_sums(one, target)
            inside.square().sum().backward()
        outside = form.bce_dice_sums(other, target)
        outside.square().sum().backward()
        assert inside.dtype == torch.float32
        assert one.grad is not None
        assert one.grad.dtype == torch.bfloat16
        assert torch.equal(inside, outside)
        assert torch.equal(one.grad, other.grad)
