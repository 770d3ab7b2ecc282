"""Loss and gradient over gloo processes with uneven shares of a batch equal those of one process in float64."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deepskip import BCEDiceLoss

# Number of samples of each rank.
SHARES = {1: [7], 2: [5, 2], 4: [3, 2, 2, 0]}
FORMS = ("auto", "triton", "reference")


def batch(V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(V)
    logits = 3 * torch.randn(7, V, 9, 10, generator=generator)
    target = torch.randint(0, max(V, 2), (7, 9, 10), generator=generator)
    target[torch.rand(7, 9, 10, generator=generator) < 0.2] = 255
    return logits, target, torch.tensor([1.0, 1, 0, 1, 1, 1, 1])


def criterion(V: int) -> BCEDiceLoss:
    return BCEDiceLoss(alpha=0.7, beta=1.3, class_weights=[v + 1.0 for v in range(V)])


def one_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    from deepskip import kernels

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    shares = SHARES[world_size]
    mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    found = {}
    for form in FORMS:
        kernels.backend.choose(form)
        for V in (1, 3):
            logits, target, weight = (x[mine] for x in batch(V))
            logits.requires_grad_()
            loss = criterion(V)(logits, target, weight)
            loss.backward()
            found[form, V] = (loss.detach(), logits.grad)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    # gloo's threads sometimes abort an interpreter that shuts down. By now, all is done.
    os._exit(0)


@pytest.mark.slow
def test_uneven_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of these ranks one has no sample.
    world_size = 4
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (world_size, port, str(tmp_path)), nprocs=world_size)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for V in (1, 3):
        logits, target, weight = batch(V)
        exact = logits.double().requires_grad_()
        expected = criterion(V)(exact, target, weight)
        expected.backward()
        for form in FORMS:
            assert all(rank[form, V][0].item() == pytest.approx(expected.item(), rel=1e-6) for rank in ranks)
            gradient = torch.cat([rank[form, V][1] for rank in ranks]).double()
            assert exact.grad is not None
            assert (gradient - exact.grad).norm() <= 1e-6 * exact.grad.norm()
