"""The optimizers: AdamW, and Muon for the convolutions, which gets further in short trainings (docs/paper.md)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deepskip.config import OptimConfig

# Muon's learning rate in multiples of Adam's; half and double of it scored lower (docs/paper.md)
MUON_LEARNING_RATE = 5.0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def build_optimizer(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer that the config names; it decays the weights of convolutions only."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    if config.optimizer == "adamw":
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    # the head's few rows are no matrix to orthogonalise
    head = {id(p) for p in network.get_submodule("head").parameters()}
    return Muon(
        [
            {"params": [p for p in decayed if id(p) not in head], "muon": True, "weight_decay": config.weight_decay},
            {"params": [p for p in decayed if id(p) in head] + others, "muon": False, "weight_decay": 0.0},
        ],
        config.learning_rate,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is orthogonalised (Jordan et al. 2024), with Adam for other parameters.

    params: groups with "muon" true (convolutions, taken as matrices of out-channels by the rest; they move by
    MUON_LEARNING_RATE times the learning rate) or false. lr: learning rate. momentum: of Muon, Nesterov's. betas, eps:
    Adam's. torch.optim.Muon takes matrices only, and orthogonalises in bfloat16, in which the same gradient summed in
    another order, as on another number of workers, gives another step.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step; gives what the closure gives, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (self._step_muon if group["muon"] else self._step_adam)(p, group)
        return loss

    def _step_muon(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].mul_(group["momentum"]).add_(p.grad)
        direction = torch.add(p.grad, momentum, alpha=group["momentum"]).flatten(1)
        rows, columns = direction.shape
        lr = MUON_LEARNING_RATE * group["lr"]
        p.mul_(1 - lr * group["weight_decay"])
        p.add_(orthogonalized(direction).view(p.shape), alpha=-lr * max(1, rows / columns) ** 0.5)

    def _step_adam(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        state["step"] += 1
        first, second = group["betas"]
        mean = state["mean"].lerp_(p.grad, 1 - first)
        square = state["square"].lerp_(p.grad.square(), 1 - second)
        scale = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, scale, value=-group["lr"] / (1 - first ** state["step"]))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Brings the singular values of (m, n) near 1, to about 0.7 to 1.2, by five quintic Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
