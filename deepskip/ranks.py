"""Agree among all ranks of a process group on the checkpoint to resume from, and on when to stop."""

from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepskip import checkpoint, identity
from deepskip.checkpoint import State
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location
from deepskip.identity import Identity

# Steps between a request to stop and the stop: one that carries it to all ranks, and one more, so that no rank waits for it.
VOTE_STEPS = 2


def agreed_start(
    run: Location,
    rank: int,
    world_size: int,
    device: torch.device,
    warn: Callable[[str], None],
    splits: Mapping[str, Identity] = MappingProxyType({}),
    accepted: str | None = None,
) -> State | None:
    """Return the newest complete checkpoint of a run, the same on every rank, or None, and check the data of all ranks.

    Rank 0 alone reads the storage, because ranks on other machines may see older files. It removes the leftovers of
    killed writers and renames broken checkpoints.

    Args:
        run: folder or URL of the run.
        rank: rank of this process.
        world_size: number of ranks.
        device: device for the broadcast.
        warn: function that is called on rank 0 with a message for each broken checkpoint, and about changed data.
        splits: identity of each split, as this rank has loaded it.
        accepted: name of changed data on which the training may resume.

    Raises:
        checkpoint.CheckpointTooNew: if a later DeepSkip wrote a checkpoint.
        identity.OtherData: on every rank, if two ranks have other data, or the checkpoint has and that is not accepted.
        OSError: if the storage cannot be read.
    """
    data, state = b"", None
    if rank == 0:
        storage.remove_leftovers(storage.join(run, checkpoint.FOLDER))
        found, faults = checkpoint.find_newest(run)
        data, state = found or (data, None)
        for path, fault in faults.items():
            checkpoint.set_aside(path)
            warn(f"skipped a broken checkpoint: {fault}; renamed it to {storage.name(path)}{checkpoint.BROKEN}")
    if world_size > 1:
        data = broadcast_bytes(data, rank, device)
        if rank != 0 and data:
            state = checkpoint.unpack(data, run)
    if state is not None and state.get("best") is not None:
        lost = rank == 0 and best_is_lost(run, warn)
        if world_size > 1:
            lost = bool(broadcast_bytes(b"lost" if lost else b"", rank, device))
        if lost:
            state["best"], state["stale"] = None, 0
    if (text := check_data(state, splits, accepted, world_size)) and rank == 0:
        warn(text)
    return state


def best_is_lost(run: Location, warn: Callable[[str], None]) -> bool:
    """Return whether a run's best checkpoint is missing or broken; a broken one is renamed.

    Args:
        run: folder or URL of the run.
        warn: function that is called with what is wrong, and with what follows.
    """
    path = storage.join(run, checkpoint.FOLDER, checkpoint.BEST)
    try:
        checkpoint.read_model(path)
        return False
    except FileNotFoundError:
        fault = f"{path} is missing"
    except checkpoint.CheckpointTooNew:
        raise
    except checkpoint.CheckpointError as error:
        checkpoint.set_aside(path)
        fault = f"{error}; renamed it to {storage.name(path)}{checkpoint.BROKEN}"
    warn(f"the best checkpoint is lost: {fault}. The best of the validations from now on takes its place")
    return True


def check_data(
    state: State | None, splits: Mapping[str, Identity], accepted: str | None, world_size: int
) -> str | None:
    """Check that all ranks have loaded the same data, and that it is the data of the checkpoint.

    Args:
        state: the checkpoint to resume from, or None. One of an earlier version does not know its data.
        splits: identity of each split, as this rank has loaded it.
        accepted: name of changed data on which the training may resume.
        world_size: number of ranks.

    Returns:
        A warning if the training resumes on changed data.

    Raises:
        identity.OtherData: see `agreed_start`.
    """
    if world_size > 1:
        found: list[Any] = [None] * world_size
        dist.all_gather_object(found, dict(splits))
        for number, other in enumerate(found):
            if changes := identity.changes(found[0], other):
                raise identity.OtherData(
                    f"the data was changed while the ranks started: on rank {number} {changes}. Run the same command again"
                )
    if state is None or not splits:
        return None
    before, step = state["data"].get("splits", {}), state["step"]
    if refusal := identity.refusal(before, splits, accepted):
        raise identity.OtherData(f"the checkpoint of step {step} {refusal}")
    changes = identity.changes(before, splits)
    return f"resuming at step {step} on changed data: {changes}" if changes else None


def add_up(counts: list[Tensor], device: torch.device) -> None:
    """Replace each of some tensors by its sum over all ranks, in one collective; every rank must call this.

    Args:
        counts: tensors (*,) of int64, on any device, of the same shapes on every rank; changed in place.
        device: device for the collective.
    """
    sums = torch.cat([each.flatten().to(device) for each in counts])
    dist.all_reduce(sums)
    for each, total in zip(counts, sums.split([each.numel() for each in counts]), strict=True):
        each.copy_(total.view_as(each))


def broadcast_bytes(data: bytes, rank: int, device: torch.device) -> bytes:
    """Return the bytes that rank 0 has, on every rank.

    Args:
        data: bytes on rank 0; ignored on others.
        rank: rank of this process.
        device: device for the broadcast.
    """
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, 0)
    if not size:
        return b""
    if rank == 0:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    else:
        content = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(content, 0)
    return content.cpu().numpy().tobytes()


def share_buffers(network: nn.Module) -> None:
    """Copy rank 0's buffers to every rank.

    Running statistics are of a rank's own batches, and rank 0's are in the checkpoint.
    """
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)


class Vote(NamedTuple):
    """The outcome of a vote on its way to the host.

    Attributes:
        ranks: number of ranks that were asked to stop, a scalar; valid once it is copied.
        copied: end of the copy to the host, or None on a CPU.
    """

    ranks: Tensor
    copied: torch.cuda.Event | None


class StopVote:
    """Let all ranks learn at the same step that some rank was asked to stop; every rank calls it once a step.

    With one rank the decision is immediate. With several, each step's sums carry what its rank was asked before it, and the
    outcome is read a step later: the ranks stop VOTE_STEPS after the request, and no step has a collective for it or waits.

    Args:
        stop_requested: returns whether this rank was asked to stop; None, on all ranks, never stops.
        world_size: number of ranks.

    Attributes:
        asked: whether this rank was asked to stop, for the next step to carry.
    """

    def __init__(self, stop_requested: Callable[[], bool] | None, world_size: int) -> None:
        self.stop_requested, self.world_size, self.asked = stop_requested, world_size, False
        self.votes: deque[Vote] = deque()

    def __call__(self, ranks: Tensor) -> bool:
        """Vote, and return whether the ranks stop after this step.

        Args:
            ranks: number of ranks that were asked to stop before this step, a scalar.
        """
        if self.stop_requested is None:
            return False
        self.asked = bool(self.stop_requested())
        if self.world_size == 1:
            return self.asked
        copied = None
        if ranks.is_cuda:
            ranks = torch.empty_like(ranks, device="cpu", pin_memory=True).copy_(ranks, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.votes.append(Vote(ranks, copied))
        if len(self.votes) < VOTE_STEPS:
            return False
        vote = self.votes.popleft()
        if vote.copied is not None:
            vote.copied.synchronize()
        return bool(vote.ranks)
