"""Muon equals steps on singular values in float64, and its Adam equals PyTorch's."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from deepskip.config import OptimConfig
from deepskip.network import DeepSkipUNet
from deepskip.optimizer import MUON_LEARNING_RATE, Muon, build_optimizer, orthogonalized

# The matrices are tall, wide, square, and of one row. Two have the same size and are stepped together.
SHAPES = ((16, 8, 3, 3), (8, 3, 3, 3), (8, 2, 3, 3), (9, 1, 3, 3), (1, 4, 1, 1), (32, 2, 1, 1))


def by_singular_values(matrix: Tensor) -> Tensor:
    """Apply the steps to the singular values themselves: s <- a s + b s^3 + c s^5."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def test_every_matrix_of_a_group_gets_its_own_steps() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape).flatten(1) * 10**i for i, shape in enumerate(SHAPES)]
    for made, matrix in zip(orthogonalized(matrices), matrices, strict=True):
        torch.testing.assert_close(made.double(), by_singular_values(matrix), rtol=0, atol=2e-5)


def test_a_gradient_of_low_rank_and_one_of_zeros() -> None:
    torch.manual_seed(0)
    low = torch.randn(16, 2) @ torch.randn(2, 72)
    made, nothing = orthogonalized([low, torch.zeros(16, 9)])
    torch.testing.assert_close(made.double(), by_singular_values(low), rtol=0, atol=1e-4)
    assert not nothing.any()


@pytest.mark.parametrize("momentum", [0.95, 0.9])
def test_muon_takes_the_steps_of_its_formula(momentum: float) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    weights = [p.detach().double() for p in parameters]
    momenta = [torch.zeros_like(w) for w in weights]
    optimizer = Muon([{"params": parameters, "muon": True, "weight_decay": 0.1}], lr=2e-3, momentum=momentum)
    for _ in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            momenta[i] = momentum * momenta[i] + p.grad.double()
            update = by_singular_values((p.grad.double() + momentum * momenta[i]).flatten(1)).view(p.shape)
            lr = MUON_LEARNING_RATE * 2e-3
            rows, columns = p.flatten(1).shape
            weights[i] = (1 - lr * 0.1) * weights[i] - lr * max(1, rows / columns) ** 0.5 * update
        optimizer.step()
    for p, weight in zip(parameters, weights, strict=True):
        torch.testing.assert_close(p.detach().double(), weight, rtol=0, atol=2e-5)


def test_what_muon_leaves_goes_as_with_adam() -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(n)) for n in (3, 8, 8)]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    optimizer = Muon([{"params": mine, "muon": False, "weight_decay": 0.0}], lr=1e-2)
    adam = torch.optim.Adam(theirs, lr=1e-2)
    for step in range(5):
        for p, q in zip(mine, theirs, strict=True):
            # A parameter without a gradient does not change, and counts its own steps.
            p.grad = None if step == 2 and len(p) == 3 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        adam.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_only_convolutions_decay_and_every_parameter_is_moved_once(optimizer: Literal["muon", "adamw"]) -> None:
    ours = DeepSkipUNet(3, 1, base_channels=2, levels=3)
    another = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    for network, head in ((ours, ours.head.weight), (another, another[2].weight)):
        groups = build_optimizer(OptimConfig(optimizer=optimizer, momentum=0.9), network).param_groups
        assert optimizer == "adamw" or {group["momentum"] for group in groups} == {0.9}
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in network.parameters())
        for group in groups:
            assert all(p.ndim == 4 for p in group["params"]) or group["weight_decay"] == 0
            assert not group.get("muon") or id(head) not in {id(p) for p in group["params"]}
