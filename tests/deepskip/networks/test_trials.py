"""Test the networks of docs/benchmarks/trials: branches fold exactly, a teacher's gradient is that of BCE."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from deepskip.encoders import ConvNormReLU
from deepskip.network import DeepSkipUNet

TRIALS = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "docs/benchmarks/trials/deepskip_trials.py")))


def test_branches_fold_into_the_network_of_equation_1() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        network = TRIALS.branched(2, 3, base_channels=4, levels=4).train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        for _ in range(3):
            network(torch.randn(2, 2, 32, 32))
        plain = TRIALS.folded(network, base_channels=4)
    finally:
        torch.set_default_dtype(torch.float32)
    # the plain network with the branches as they train, and norms of inference, in place of its blocks
    network.eval()
    image = torch.randn(1, 2, 48, 80, dtype=torch.float64)
    assert type(plain) is DeepSkipUNet
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in DeepSkipUNet(2, 3, 4, 4).parameters())
    folded = plain.eval()(image)
    assert any(isinstance(module, ConvNormReLU) for module in plain.modules())

    def unfolded(block: nn.Module) -> None:
        def forward(x: torch.Tensor) -> torch.Tensor:
            y = block.norm(F.conv2d(x, block.conv.weight, padding=1))
            y = y + block.point_norm(F.conv2d(x, block.point.weight))
            return F.relu(y if block.input_norm is None else y + block.input_norm(x))

        block.forward = forward  # type: ignore[method-assign]

    for module in network.modules():
        if type(module).__name__ == "BranchedBlock":
            unfolded(module)
    torch.testing.assert_close(folded, network(image), rtol=1e-9, atol=1e-9)


def test_a_teacher_adds_the_gradient_of_its_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 1, 5, 7, generator=generator, dtype=torch.float64)
    loss = logits.square().sum()
    expected = torch.autograd.grad(loss + 0.3 * F.binary_cross_entropy_with_logits(logits, target), logits)[0]
    seen = TRIALS.AddTeacher.apply(logits, target, 0.3)
    assert torch.equal(seen, logits)
    torch.testing.assert_close(torch.autograd.grad(seen.square().sum(), logits)[0], expected)
