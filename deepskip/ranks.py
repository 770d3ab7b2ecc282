"""What all ranks of a process group must know alike: where the training goes on, and that one of them was asked to stop."""

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepskip import checkpoint
from deepskip.checkpoint import State
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location

# steps between a vote and what comes of it: its result is there by then, and nobody waits
VOTE_STEPS = 2


def agreed_start(
    run: Location, rank: int, world_size: int, device: torch.device, warn: Callable[[str], None]
) -> State | None:
    """Gives every rank the newest whole checkpoint of a run, or None.

    Rank 0 alone looks into the storage, where ranks on other machines may see older files; it removes what killed writers
    left and sets broken checkpoints aside, telling `warn` of each. Raises checkpoint.CheckpointTooNew, OSError.
    """
    data, state = b"", None
    if rank == 0:
        storage.remove_leftovers(storage.join(run, checkpoint.FOLDER))
        found, faults = checkpoint.find_newest(run)
        data, state = found or (data, None)
        for path, fault in faults.items():
            checkpoint.set_aside(path)
            warn(f"passed over a broken checkpoint: {fault}; it is now {storage.name(path)}{checkpoint.BROKEN}")
    if world_size > 1:
        data = broadcast_bytes(data, rank, device)
        if rank != 0 and data:
            state = checkpoint.unpack(data, run)
    return state


def broadcast_bytes(data: bytes, rank: int, device: torch.device) -> bytes:
    """Gives every rank the bytes that rank 0 has."""
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
    """Gives every rank rank 0's buffers: running statistics are of a rank's own batches, and rank 0's are in the checkpoint."""
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)


class StopVote:
    """Tells all ranks at the same step that some rank was asked to stop; called once a step by every rank.

    Alone, a rank decides at once. Among several, every step starts an all-reduce of one number, whose result is looked at
    VOTE_STEPS later, so that no step waits for it.
    """

    def __init__(self, stop_requested: Callable[[], bool] | None, world_size: int, device: torch.device) -> None:
        self.stop_requested, self.world_size, self.device = stop_requested, world_size, device
        self.votes: deque[tuple[Tensor, dist.Work | None, torch.cuda.Event | None]] = deque()

    def __call__(self) -> bool:
        """Votes, and says whether the ranks stop after this step."""
        if self.stop_requested is None:
            return False
        asked = bool(self.stop_requested())
        if self.world_size == 1:
            return asked
        # filled on the device: a copy to it would wait for all that is queued there
        vote = torch.full((), float(asked), device=self.device)
        work = dist.all_reduce(vote, dist.ReduceOp.MAX, async_op=True)
        done = None
        if self.device.type == "cuda":
            # on a GPU this queues, and does not wait
            work.wait()
            vote = torch.empty((), pin_memory=True).copy_(vote, non_blocking=True)
            work, done = None, torch.cuda.Event()
            done.record()
        self.votes.append((vote, work, done))
        if len(self.votes) <= VOTE_STEPS:
            return False
        return self._result()

    def close(self) -> None:
        """Waits for the votes on their way: a rank that ends would cut them off for the others."""
        while self.votes:
            self._result()

    def _result(self) -> bool:
        vote, work, done = self.votes.popleft()
        if work is not None:
            work.wait()
        if done is not None:
            done.synchronize()
        return bool(vote)
