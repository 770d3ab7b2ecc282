"""Batch norm over all ranks: the same on 1, 2 and 3 of them, and that of float64 over the samples that count."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepskip.encoders import ConvNormReLU, norm_layer
from deepskip.network import DeepSkipUNet
from deepskip.sync_batch_norm import SyncBatchNorm2d
from deepskip.training_step import TrainingStep
from tests.deepskip.test_trainer import DATA, batch_of, batches, config, on_ranks

STEPS = 4


def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return maps of four samples of large mean, the gradient of the result, and weights, of which one is 0."""
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(4, 6, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    return x + 1000, grad * weight[:, None, None, None], weight


def layer(x: torch.Tensor, grad: torch.Tensor, norm: nn.BatchNorm2d) -> list[torch.Tensor]:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
        norm.bias.copy_(torch.linspace(-1, 1, 6))
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad)
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def steps_of(rank: int, world_size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train, and return the losses and running statistics; the second batch is partial, as at the end of an epoch."""
    training = TrainingStep(config(norm="sync-batch"), DATA, torch.device("cpu"), world_size)
    training.distribute()
    found = []
    for step, batch in zip(range(STEPS), batches(0, rank, world_size), strict=False):
        if step == 1:
            share = len(batch["sample"])
            places = range(rank * share, rank * share + share)
            batch = batch_of([100 + p % 3 for p in places], [float(p < 3) for p in places])
        found.append(training(batch).loss.item())
    return found, {name: x for name, x in training.network.state_dict().items() if "running" in name}


def on_a_rank(folder: Path, rank: int, world_size: int) -> Any:
    x, grad, weight = maps()
    # Uneven shares: two, then one each.
    mine = (slice(0, 2), slice(2, 4 if world_size == 2 else 3), slice(3, 4))[rank]
    found = {}
    for dtype in (torch.float64, torch.float32):
        norm = SyncBatchNorm2d(6).to(dtype)
        norm.weights = weight[mine]
        found[dtype] = layer(x[mine].to(dtype), grad[mine].to(dtype), norm)
    return found, steps_of(rank, world_size)


@pytest.mark.slow
def test_one_two_and_three_ranks(tmp_path: Path) -> None:
    x, grad, weight = maps()
    counted = weight != 0
    expected = layer(x[counted], grad[counted], nn.BatchNorm2d(6).double())
    alone, statistics = steps_of(0, 1)
    for world_size in (2, 3):
        ranks = on_ranks(world_size, tmp_path, on_a_rank)
        for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
            mine = [found[dtype] for found, _ in ranks]
            for number in (0, 1):
                whole = torch.cat([each[number] for each in mine]).double()
                torch.testing.assert_close(whole[counted], expected[number], rtol=bound, atol=bound)
            assert not torch.cat([each[1] for each in mine])[~counted].any()
            for number in (2, 3):
                # The process group adds up the ranks' shares of these.
                whole = sum(each[number].double() for each in mine)
                torch.testing.assert_close(whole, expected[number], rtol=bound, atol=bound)
            for number in (4, 5):
                for each in mine:
                    torch.testing.assert_close(each[number].double(), expected[number], rtol=1e-6, atol=1e-6)
        for _, (losses, theirs) in ranks:
            assert losses == pytest.approx(alone, rel=1e-5)
            for name, value in statistics.items():
                torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encoder", ["vgg16", "resnet34"])
def test_gradients_of_a_network_in_float64(encoder: str) -> None:
    # Of three samples one does not count. Plain batch norm sees the other two alone.
    torch.manual_seed(0)
    plain = DeepSkipUNet(2, 1, base_channels=4, levels=3, encoder=encoder).double()
    ours = DeepSkipUNet(2, 1, base_channels=4, levels=3, encoder=encoder, norm="sync-batch").double()
    ours.load_state_dict(plain.state_dict())
    for module in ours.modules():
        if isinstance(module, SyncBatchNorm2d):
            module.weights = torch.tensor([1.0, 0.0, 1.0])
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    (plain(x[[0, 2]]).sigmoid() ** 2).sum().backward()
    (ours(x)[[0, 2]].sigmoid() ** 2).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, one), other in zip(plain.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(other, one, msg=name)


def test_alone_it_is_batch_norm_with_its_fast_forms() -> None:
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    plain, ours = ConvNormReLU(3, 8, "batch"), ConvNormReLU(3, 8, "sync-batch")
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours(x), plain(x))
    plain.eval()
    ours.eval()
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    assert isinstance(norm_layer("sync-batch", 4), nn.BatchNorm2d)


def test_compiled_it_is_the_same() -> None:
    x, grad, weight = maps()
    plain, compiled = SyncBatchNorm2d(6).double(), SyncBatchNorm2d(6).double()
    plain.weights = compiled.weights = weight
    compiled.compile(backend="eager")
    for one, other in zip(layer(x, grad, plain), layer(x, grad, compiled), strict=True):
        assert torch.equal(one, other)


def test_weights_of_one_are_read_as_those_of_the_other() -> None:
    training = TrainingStep(config(norm="sync-batch"), DATA, torch.device("cpu"))
    training(batch_of([1, 2, 3], [1.0, 1.0, 0.0]))
    other = TrainingStep(config(), DATA, torch.device("cpu"))
    other.averaged.load_state_dict(training.averaged.state_dict())
    x = torch.randn(1, 2, 20, 12)
    assert torch.equal(other.averaged.eval()(x), training.averaged.eval()(x))
