"""The loss of the sums in each form equals the plain form in float64 and its automatic gradient."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepskip import kernels
from deepskip.kernels import bce_dice_cpu, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sums_of(V: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(V)
    return (100 * torch.rand(2 + 3 * V, generator=generator)).to(device)


@pytest.mark.parametrize("form", ["triton", "cpu"])
@pytest.mark.parametrize("V", [1, 5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("of", [(1.0, 0.0, 0.0), (0.5, 2.0, -1.0)])
def test_value_and_gradient(
    triton_loss: ModuleType, form: str, V: int, weighted: bool, of: tuple[float, float, float]
) -> None:
    device = DEVICE if form == "triton" else "cpu"
    Q = torch.arange(1.0, V + 1) / (V * (V + 1) / 2) if weighted else None
    sums = sums_of(V, device).requires_grad_()
    exact = sums.detach().cpu().double().requires_grad_()
    expected = reference.loss_of_sums(exact, None if Q is None else Q.double(), 1.3, 0.5)
    sum(weight * x for weight, x in zip(of, expected, strict=True) if weight).backward()  # type: ignore[union-attr]
    implementation = triton_loss if form == "triton" else bce_dice_cpu
    parts = implementation.loss_of_sums(sums, None if Q is None else Q.to(device), 1.3, 0.5)
    for ours, theirs in zip(parts, expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    sum(weight * x for weight, x in zip(of, parts, strict=True) if weight).backward()
    assert sums.grad is not None
    torch.testing.assert_close(sums.grad.cpu().double(), exact.grad, rtol=2e-6, atol=1e-9)


def test_no_pixels_no_nan(triton_loss: ModuleType) -> None:
    for form, device in ((triton_loss, DEVICE), (bce_dice_cpu, "cpu")):
        sums = torch.zeros(5, device=device, requires_grad=True)
        loss, bce, dice = form.loss_of_sums(sums)
        assert (loss.item(), bce.item(), dice.item()) == (0, 0, 0)
        loss.backward()
        assert sums.grad is not None
        assert torch.isfinite(sums.grad).all()
        assert sums.grad[1] == 0


def test_the_operators_keep_torchs_rules(triton_loss: ModuleType) -> None:
    sums = sums_of(3, DEVICE)
    Q = torch.tensor([0.5, 0.3, 0.2], device=DEVICE)
    torch.library.opcheck(torch.ops.deepskip.loss_of_sums.default, (sums.requires_grad_(), Q, 1.0, 1.0))
    one = torch.ones((), device=DEVICE)
    for grads in ((one, None, None), (one, one, one)):
        torch.library.opcheck(torch.ops.deepskip.loss_of_sums_gradient.default, (*grads, sums.detach(), Q, 1.0, 1.0))


class Launches(TorchDispatchMode):
    """A mode that records the names of operators, except those that only allocate or view memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        if name not in ("aten::empty_strided", "aten::detach", "aten::empty.memory_format", "aten::empty"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_loss_and_its_gradient_are_five_launches(
    triton_loss: ModuleType, triton_form: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.backend, "_chosen", "triton")
    logits = torch.randn(2, 1, 8, 8, device=DEVICE, requires_grad=True)
    target = torch.zeros(2, 8, 8, dtype=torch.uint8, device=DEVICE)
    with Launches() as seen:
        loss, _, _ = kernels.loss_of_sums(kernels.bce_dice_sums(logits, target))
        loss.backward()
    # The first operator is two launches: the rows and their sums. Autograd itself fills the first gradient.
    assert [name for name in seen.names if name != "aten::ones_like"] == [
        "deepskip::bce_dice_sums", "deepskip::loss_of_sums", "deepskip::loss_of_sums_gradient",
        "deepskip::bce_dice_gradient",
    ]  # fmt: skip
