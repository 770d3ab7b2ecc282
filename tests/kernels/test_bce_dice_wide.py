"""The loss kernels for labels of a byte equal float64 written out by hand, alone and through the operators."""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from deepskip import kernels
from deepskip.kernels import backend, bce_dice_wide_triton
from tests.kernels.test_bce_dice import DEVICE, by_hand, case

pytestmark = pytest.mark.new_launches

# This allows for one rounding to the logits' own type, as for the other kernels.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def launched(triton_form: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Choose the new launches, and record the names of those that run."""
    names: list[str] = []
    for name in ("sum_rows", "gradient"):
        form = getattr(bce_dice_wide_triton, name)

        def noted(*args: object, name: str = name, form: object = form) -> object:
            names.append(name)
            return form(*args)  # type: ignore[operator]

        monkeypatch.setattr(bce_dice_wide_triton, name, noted)
    monkeypatch.setattr(backend, "_chosen", "next")
    return names


def sums_and_gradient(
    logits: Tensor, target: Tensor, g: np.ndarray, **options: object
) -> tuple[np.ndarray, np.ndarray]:
    leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    sums = kernels.bce_dice_sums(leaf, target, **options)  # type: ignore[arg-type]
    sums.backward(torch.from_numpy(g).float().to(sums.device))
    assert leaf.grad is not None
    assert leaf.grad.stride() == logits.stride()
    return sums.detach().cpu().numpy(), leaf.grad.cpu().double().numpy()


@pytest.mark.parametrize("alpha", [0.5, 0.3])
@pytest.mark.parametrize("labels", [torch.uint8, torch.bool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
# The pixels fill whole blocks, or leave a last one that is partial. There is one class, or three independent ones.
@pytest.mark.parametrize(("V", "size"), [(1, (16, 32)), (3, (8, 43))])
def test_sums_and_gradient_are_those_written_out_by_hand(
    launched: list[str], monkeypatch: pytest.MonkeyPatch, V: int, size: tuple[int, int], dtype: torch.dtype,
    labels: torch.dtype, alpha: float,
) -> None:  # fmt: skip
    # Each program has several blocks.
    monkeypatch.setattr(bce_dice_wide_triton, "PROGRAMS", 4)
    logits, target = case(V, V > 1, dtype, labels, size)
    weight = torch.tensor([1.0, 0.0, 0.5], device=DEVICE)
    ignore = None
    if labels != torch.bool:
        ignore = 255
        # Some words of labels are ignored whole, some in part, and at each place in a word.
        target[..., 1, :] = ignore
        target[torch.rand(target.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.2] = ignore
        logits[torch.broadcast_to((target if V > 1 else target[:, None]) == ignore, logits.shape)] = float("nan")
    # Values that do not count may be anything.
    logits[1] = float("inf")
    g = np.random.default_rng(0).normal(size=2 + 3 * V)
    clean = torch.where(logits.isfinite(), logits, 0)
    expected, gradient = by_hand(clean, target, alpha, ignore, weight, g)
    found, dz = sums_and_gradient(logits, target, g, alpha=alpha, ignore_index=ignore, sample_weight=weight)
    assert launched == ["sum_rows", "gradient"]
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_allclose(dz, gradient, rtol=TOLERANCE[dtype], atol=max(1e-6, TOLERANCE[dtype] / 10))
    assert (dz[1] == 0).all()


@pytest.mark.parametrize("ignore", [255, 0, 1, 7, None])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_every_label_of_a_byte_counts_as_in_the_reference(
    launched: list[str], ignore: int | None, alpha: float
) -> None:
    # Labels of a binary mask are 0 and 1, but others are no error here.
    logits, _ = case(1, False, torch.float32, torch.uint8, (16, 32), 2)
    target = torch.arange(2 * 16 * 32, device=DEVICE).reshape(2, 16, 32).remainder(256).to(torch.uint8)
    g = np.array([0.7, 0.0, -0.01, 0.02, 0.0])
    expected, gradient = by_hand(logits, target, alpha, ignore, None, g)
    found, dz = sums_and_gradient(logits, target, g, alpha=alpha, ignore_index=ignore)
    assert launched == ["sum_rows", "gradient"]
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_allclose(dz, gradient, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_small_and_large_logits_keep_their_digits(launched: list[str], alpha: float) -> None:
    # A -log o of 1e-9 would be lost in 1 + exp(-z), and fp32 ends at exp(88).
    for value, label in ((20.0, 1), (-20.0, 0), (14.0, 1), (100.0, 0), (-3e4, 1)):
        logits = torch.full((1, 1, 8, 8), value, device=DEVICE)
        target = torch.full((1, 8, 8), label, dtype=torch.uint8, device=DEVICE)
        g = np.array([1.0, 0.0, -0.3, 0.2, 0.0])
        found, dz = sums_and_gradient(logits, target, g, alpha=alpha)
        z = logits.double().cpu().requires_grad_()
        right = kernels.reference.bce_dice_sums(z, target.cpu(), alpha=alpha)
        (exact,) = torch.autograd.grad(right, z, torch.from_numpy(g))
        np.testing.assert_allclose(found, right.detach().numpy(), rtol=4e-6, atol=1e-30)
        np.testing.assert_allclose(dz, exact.numpy(), rtol=4e-6, atol=1e-30)


def test_thirty_blocks_a_program_are_no_overflow(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # At logits of 0, each pixel doubles the product.
    monkeypatch.setattr(bce_dice_wide_triton, "PROGRAMS", 1)
    pixels = 4 * 32 * 2 * bce_dice_wide_triton.MOST_TRIPS
    logits = torch.zeros(1, 1, 8, pixels // 8, device=DEVICE, dtype=torch.bfloat16)
    sums = kernels.bce_dice_sums(logits, torch.zeros(1, 8, pixels // 8, device=DEVICE, dtype=torch.uint8))
    assert 4 * bce_dice_wide_triton.MOST_TRIPS + 1 < 128
    np.testing.assert_allclose(sums.cpu().numpy(), [0.5 * pixels * np.log(2), pixels, 0, pixels / 4, 0], rtol=2e-6)


def test_what_does_not_fit_takes_todays_launches(launched: list[str]) -> None:
    cases = [
        case(1, False, torch.float32, torch.int64, (16, 16)),
        # Here, pixels do not fill whole words, classes exclude each other, or classes are interleaved.
        case(1, False, torch.float32, torch.uint8, (5, 5)),
        case(3, False, torch.float32, torch.uint8, (16, 16)),
        tuple(
            x.contiguous(memory_format=torch.channels_last) for x in case(3, True, torch.float32, torch.uint8, (8, 8))
        ),
    ]
    logits, target = case(1, False, torch.float32, torch.uint8, (16, 16))
    # These labels do not begin at the start of a word.
    cases.append((logits, torch.cat([target.flatten()[:1], target.flatten()])[1:].view_as(target)))
    for z, t in cases:
        g = np.random.default_rng(0).normal(size=2 + 3 * z.shape[1])
        expected, gradient = by_hand(z, t, 0.5, 255, None, g)
        found, dz = sums_and_gradient(z, t, g)
        np.testing.assert_allclose(found, expected, rtol=2e-6)
        np.testing.assert_allclose(dz, gradient, rtol=2e-6, atol=1e-6)
    assert launched == []


def test_a_broken_logit_is_seen(launched: list[str]) -> None:
    # A training stops at a loss that is nan.
    logits, target = case(1, False, torch.float32, torch.uint8, (16, 16))
    logits[0, 0, 3, 3] = float("nan")
    found, dz = sums_and_gradient(logits, target, np.ones(5))
    assert np.isnan(found[[0, 3]]).all()
    assert np.isnan(dz).sum() == 1
