"""Build the optimizers: AdamW, and Muon for the convolutions, which reaches more in short trainings (docs/paper.md)."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deepskip.config import OptimConfig

# Muon's learning rate in multiples of Adam's; half and twice this scored lower (docs/paper.md).
MUON_LEARNING_RATE = 5.0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def build_optimizer(config: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the config names; only weights of convolutions decay.

    Args:
        config: settings of the optimizer.
        network: network whose parameters the optimizer updates.
    """
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    if config.optimizer == "adamw":
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    # The head has too few rows to orthogonalise. A network without a `head` is taken to end with it.
    own_head = getattr(network, "head", None)
    head = {id(p) for p in (decayed[-1:] if own_head is None else own_head.parameters())}
    return Muon(
        [
            {"params": [p for p in decayed if id(p) not in head], "muon": True, "weight_decay": config.weight_decay},
            {"params": [p for p in decayed if id(p) in head] + others, "muon": False, "weight_decay": 0.0},
        ],
        config.learning_rate,
        config.momentum,
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to its final share, steps down, or the peak.

    Args:
        config: settings of the optimizer.
        step: 0 first.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    assert config.steps is not None, "check_values refuses other schedules without a number of steps"
    if config.schedule == "step":
        drops = (2 * step >= config.steps) + (4 * step >= 3 * config.steps)
        return float(config.learning_rate * 0.1**drops)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def averaging_decay(config: OptimConfig, step: int) -> float:
    """Return the decay of the weights' moving average at a step; it rises to ema_decay with the steps.

    At step t it is at most (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage and in diffusers' EMAModel.
    So an average of few steps is one of late weights, not of those at the start.

    Args:
        config: settings of the optimizer.
        step: 0 first.
    """
    return min(config.ema_decay, (1 + step) / (10 + step))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value


class Muon(torch.optim.Optimizer):
    """Update each weight matrix by orthogonalised momentum (Jordan et al. 2024), and other parameters by Adam.

    torch.optim.Muon takes matrices only, and orthogonalises in bfloat16. There the same gradient gives another step if
    it is summed in another order, as on another number of workers.

    Args:
        params: groups with "muon" true (convolutions) or false. Convolutions are matrices of out-channels by the rest,
            and their learning rate is MUON_LEARNING_RATE times as high.
        lr: learning rate.
        momentum: Nesterov momentum of Muon.
        betas: decay rates of Adam's averages of the gradient and its square.
        eps: Adam's eps, added to the root of the squared average.
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
        """Take one step.

        Args:
            closure: function that recomputes the loss; None takes the gradients as they are.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                (self._step_muon if group["muon"] else self._step_adam)(parameters, group)
        return loss

    # Each operation takes all parameters of a group: many are small, and a GPU takes longer to launch them than to run them.
    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        directions = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
        matrices = [as_matrix(direction) for direction in directions]
        lr = MUON_LEARNING_RATE * group["lr"]
        scales = [-lr * max(1, m.shape[0] / m.shape[1]) ** 0.5 for m in matrices]
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        updates = [as_weight(x, d) for x, d in zip(orthogonalized(matrices), directions, strict=True)]
        torch._foreach_add_(parameters, torch._foreach_mul(updates, scales))

    def _step_adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        gradients = [p.grad for p in parameters if p.grad is not None]
        steps = [self.state[p]["step"] for p in parameters]
        means = [self.state[p]["mean"] for p in parameters]
        squares = [self.state[p]["square"] for p in parameters]
        first, second = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        scales = torch._foreach_div(squares, [1 - second**step for step in steps])
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_addcdiv_(parameters, means, scales, [-group["lr"] / (1 - first**step) for step in steps])


def as_matrix(x: Tensor) -> Tensor:
    """View a weight (K, C, h, w) as a matrix (K, C h w) in the order of its memory; the order of columns does not matter."""
    if _is_channels_last(x):
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


def as_weight(matrix: Tensor, like: Tensor) -> Tensor:
    """View a matrix (K, C h w) of `as_matrix` as a weight (K, C, h, w) with the memory order of `like`."""
    if _is_channels_last(like):
        K, C, *window = like.shape
        return matrix.reshape(K, *window, C).permute(0, 3, 1, 2)
    return matrix.reshape(like.shape)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def orthogonalized(matrices: list[Tensor]) -> list[Tensor]:
    """Scale the singular values of each matrix to about 0.7 to 1.2 by five quintic Newton-Schulz steps.

    A step is x <- (a + b A + c A^2) x with A = x x^T, of the shorter side. The steps are polynomials of the first A. So they
    are multiplied in (m, m), for all matrices of that size at once, and x is multiplied once, at the end.

    Args:
        matrices: matrices (m, n) of any sizes.

    Returns:
        Matrices of the same shapes.
    """
    a, b, c = NEWTON_SCHULZ
    wide = [x if x.shape[0] <= x.shape[1] else x.T for x in matrices]
    alike = defaultdict(list)
    for i, x in enumerate(wide):
        alike[x.shape[0]].append(i)
    done = list(matrices)
    for members in alike.values():
        gram = torch.stack([wide[i] @ wide[i].T for i in members])
        norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].sqrt() + 1e-7
        gram /= norm.square()
        steps = norm.reciprocal()
        for i in range(NEWTON_SCHULZ_STEPS):
            step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            step.diagonal(dim1=1, dim2=2).add_(a)
            # the first is a multiple of the identity, and after the last nothing asks for the Gram matrix
            steps = step @ steps if i else step * steps
            if i + 1 < NEWTON_SCHULZ_STEPS:
                gram = step @ gram @ step
        for i, product in zip(members, steps, strict=True):
            x = product @ wide[i]
            done[i] = x if wide[i] is matrices[i] else x.T
    return done
