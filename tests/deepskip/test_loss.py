"""The loss equals eqs. 5 to 8 written out in numpy, in float64, with gradients derived by hand."""

import numpy as np
import pytest
import torch

from deepskip import BCEDiceLoss

IGNORE = 255


def by_hand(
    z: np.ndarray, target: np.ndarray, sample_weight: np.ndarray, alpha: float, beta: float, Q: np.ndarray, eps: float
) -> tuple[float, np.ndarray]:
    """Return loss and gradient for z (N, V, H, W) and target (N, H, W), or (N, V, H, W) with independent labels."""
    N, V, H, W = z.shape
    z = z.astype(np.float64)
    independent = target.ndim == 4 or V == 1
    if independent:
        labels = target.reshape(N, V, H, W)
        counts = (labels != IGNORE) & (sample_weight != 0)[:, None, None, None]
        t = np.where(counts, labels, 0).astype(np.float64)
        o = 1 / (1 + np.exp(-z))
        n = counts.sum() / V
        bce = -(alpha * t * np.log(o) + (1 - alpha) * (1 - t) * np.log(1 - o))[counts].sum() / n
        bce_gradient = -(alpha * t * (1 - o) - (1 - alpha) * (1 - t) * o) / n
    else:
        counts = ((target != IGNORE) & (sample_weight != 0)[:, None, None])[:, None]
        labels = np.where(counts[:, 0], target, 0)
        t = np.stack([labels == v for v in range(V)], axis=1).astype(np.float64)
        o = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        n = counts.sum()
        a = np.where(labels != 0, alpha, 1 - alpha)[:, None]
        bce = -(np.broadcast_to(counts, t.shape) * a * t * np.log(o)).sum() / n
        bce_gradient = a * (o - t) / n
    w = np.broadcast_to(counts, o.shape)
    A = (2 * w * t * o).sum((0, 2, 3)) + eps
    B = (w * (t**2 + o**2)).sum((0, 2, 3)) + eps
    dice = 1 - (Q * A / B).sum()
    g = -(Q / B**2)[:, None, None] * (2 * t * B[:, None, None] - 2 * o * A[:, None, None])
    dice_gradient = g * o * (1 - o) if independent else o * (g - (o * g).sum(1, keepdims=True))
    return beta * bce + dice, w * (beta * bce_gradient + dice_gradient)


def masks(kind: str, shape: tuple[int, ...], classes: int, rng: np.random.Generator) -> np.ndarray:
    highest = max(classes - 1, 1)
    if kind == "empty":
        return np.zeros(shape, np.int64)
    if kind == "full":
        return np.full(shape, highest, np.int64)
    mask = rng.integers(0, highest + 1, shape)
    if kind == "ignored":
        mask[rng.random(shape) < 0.3] = IGNORE
    return mask


@pytest.mark.parametrize("kind", ["mixed", "empty", "full", "ignored"])
@pytest.mark.parametrize("form", ["binary", "classes", "independent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_equations_5_to_8(kind: str, form: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng([len(kind), len(form)])
    N, V, H, W = 3, 1 if form == "binary" else 5, 17, 23
    z = (4 * rng.standard_normal((N, V, H, W))).astype(np.float32)
    target = masks(kind, (N, V, H, W), 1, rng) if form == "independent" else masks(kind, (N, H, W), V, rng)
    weight = np.array([1.0, 0.0, 1.0])
    class_weights = rng.random(V) + 0.1
    criterion = BCEDiceLoss(alpha=0.7, beta=1.3, class_weights=class_weights.tolist(), ignore_index=IGNORE, eps=0.5)
    logits = torch.tensor(z, dtype=dtype, requires_grad=True)
    loss = criterion(logits, torch.from_numpy(target), torch.from_numpy(weight))
    loss.backward()
    expected, gradient = by_hand(z, target, weight, 0.7, 1.3, class_weights / class_weights.sum(), 0.5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    assert logits.grad is not None
    assert np.linalg.norm(logits.grad.numpy() - gradient) <= tolerance * np.linalg.norm(gradient)
    assert (logits.grad[1] == 0).all()


def test_independent_labels_of_one_class_are_binary() -> None:
    z, target = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))
    assert BCEDiceLoss()(z, target).item() == BCEDiceLoss()(z, target[:, None]).item()


def test_extreme_logits_stay_finite() -> None:
    z = torch.tensor([1e4, -1e4, 1e4, -1e4]).view(1, 1, 2, 2).requires_grad_()
    loss = BCEDiceLoss()(z, torch.tensor([[[1, 0], [0, 1]]]))
    loss.backward()
    assert torch.isfinite(loss)
    # Two of four pixels are wrong by 1e4, halved by alpha. The Dice has 1 right pixel of 2 and 2.
    assert loss.item() == pytest.approx(5000 / 2 + 1 - 3 / 5, rel=1e-6)


def test_a_sample_of_weight_0_may_hold_anything() -> None:
    z, target = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))
    alone = BCEDiceLoss()(z[:1], target[:1])
    z[1] = torch.inf
    assert BCEDiceLoss()(z, target, torch.tensor([1.0, 0.0])).item() == pytest.approx(alone.item(), rel=1e-6)


def test_a_batch_without_pixels_has_no_bce() -> None:
    z = torch.randn(1, 1, 4, 4, requires_grad=True)
    parts = BCEDiceLoss().parts(z, torch.full((1, 4, 4), IGNORE))
    parts.loss.backward()
    assert parts.bce.item() == 0
    assert parts.dice.item() == 0
    assert z.grad is not None
    assert (z.grad == 0).all()


def test_half_precision_sums_do_not_overflow() -> None:
    z = torch.full((1, 1, 512, 512), 8.0, dtype=torch.float16)
    sums = BCEDiceLoss().sums(z, torch.ones(1, 512, 512, dtype=torch.uint8))
    assert sums.dtype == torch.float32
    assert sums[1].item() == 512 * 512
    assert sums[4].item() == 512 * 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": 1.5}, "alpha is 1.5"), ({"eps": 0}, "eps is 0"), ({"class_weights": [0, -1]}, "none may be negative")],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BCEDiceLoss(**arguments)


def test_target_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"target of shape \(1, 4, 5\)"):
        BCEDiceLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 5, dtype=torch.int64))


def test_soft_iou_is_the_quotient_of_sums_and_its_gradient_autograds() -> None:
    rng = np.random.default_rng(5)
    z, target = rng.normal(size=(3, 1, 5, 7)), rng.integers(0, 2, (3, 5, 7))
    target[rng.random(target.shape) < 0.2] = IGNORE
    logits = torch.tensor(z, requires_grad=True)
    beta, eps = 0.7, 3.0
    found = BCEDiceLoss(beta=beta, eps=eps, overlap="iou").parts(logits, torch.tensor(target))
    found.loss.backward()

    again = torch.tensor(z, requires_grad=True)
    counted = torch.tensor(target)[:, None] != IGNORE
    t, o = torch.tensor(target)[:, None][counted].double(), again.sigmoid()[counted]
    bce = -0.5 * (t * o.log() + (1 - t) * (1 - o).log()).mean()
    intersection = (t * o).sum()
    iou = (intersection + eps / 2) / ((t**2).sum() + (o**2).sum() - intersection + eps / 2)
    expected = beta * bce + 1 - iou
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-9, atol=1e-14)
    # What is reported as Dice remains Dice.
    dice = BCEDiceLoss(beta=beta, eps=eps).parts(torch.tensor(z), torch.tensor(target)).dice
    assert found.dice.item() == dice.item()
    with pytest.raises(ValueError, match="overlap is 'both'"):
        BCEDiceLoss(overlap="both")
