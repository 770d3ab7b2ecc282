"""Checkpoints written while the training goes on: a step waits for the copy of its state, a thread does the rest."""

import contextlib
import errno
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from deepskip import checkpoint
from deepskip.checkpoint import CheckpointNotWritten, State
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location

_ADVICE = {
    errno.ENOSPC: "Free space there, or lower run.keep_checkpoints",
    errno.EDQUOT: "Free space there or raise the quota, or lower run.keep_checkpoints",
    errno.EACCES: "Give the user of the training the right to write there",
    errno.EROFS: "Make it writable",
}


class CheckpointWriter:
    """Writes a run's checkpoints in one thread, one after the other; a context manager that ends with the last one written.

    keep: checkpoints of steps that stay, the newest. last_step: of the one that the training goes on from.
    A save waits where the one before is still being written, so none is left out and memory holds one copy. What goes wrong
    in the thread is raised as CheckpointNotWritten by the next call, or at the end of the block.
    """

    def __init__(self, run: Location, keep: int, last_step: int | None = None) -> None:
        self.run, self.keep, self.last_step = run, keep, last_step
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.written: Future[None] | None = None
        self.buffers: Any = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointNotWritten:
            # what ended the block is told, not what it brought about
            if error is None:
                raise
        finally:
            self.thread.shutdown()

    def save(self, state: State, *, step: bool = True, best: bool = False) -> None:
        """Copies the state, whose "step" it is of, and has it written: as the checkpoint of its step, as the best one, or both.

        On a GPU the copies go to pinned memory and the call does not wait for them; what is queued on the device afterwards
        may change the state.
        """
        self.wait()
        self.buffers = state = copied(state, self.buffers)
        done = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if done is not None:
            done.record()
        self.written = self.thread.submit(self._write, state, done, step, best)

    def check(self) -> None:
        """Raises what went wrong, if it did; waits for nothing."""
        if self.written is not None and self.written.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is written; raises CheckpointNotWritten."""
        written, self.written = self.written, None
        if written is not None:
            written.result()

    def _write(self, state: State, done: torch.cuda.Event | None, step: bool, best: bool) -> None:
        if done is not None:
            done.synchronize()
        # the best first: a checkpoint of a step tells of a best one that must be there
        if best:
            self._put(state | {"optimizer": None}, storage.join(self.run, checkpoint.FOLDER, checkpoint.BEST))
        if step:
            self._put(state, checkpoint.step_path(self.run, state["step"]))
            self.last_step = state["step"]
            # one that cannot be removed is in nobody's way
            with contextlib.suppress(OSError):
                checkpoint.prune(self.run, self.keep)

    def _put(self, state: State, location: Location) -> None:
        try:
            checkpoint.save(state, location)
        except OSError as error:
            reason = error.strerror or str(error).removeprefix(f"{location} ")
            advice = _ADVICE.get(error.errno or 0, "Look at that storage")
            last = "starts over, for there is no earlier one"
            if self.last_step is not None:
                last = f"goes on from {checkpoint.step_path(self.run, self.last_step)}, which is whole"
            raise CheckpointNotWritten(
                f"{location} could not be written: {reason}. {advice}; the same command then {last}."
            ) from error


@torch.no_grad()
def copied(value: Any, buffer: Any) -> Any:
    """Copies tensors in nested dicts and lists to the CPU, into the tensors of an earlier copy where they fit."""
    if isinstance(value, Tensor):
        if not (isinstance(buffer, Tensor) and alike(buffer, value)):
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffer.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        earlier = buffer if isinstance(buffer, dict) else {}
        return {key: copied(item, earlier.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        several = buffer if isinstance(buffer, list) and len(buffer) == len(value) else [None] * len(value)
        return [copied(item, one) for item, one in zip(value, several, strict=True)]
    return value


def alike(one: Tensor, other: Tensor) -> bool:
    """Says whether two tensors are of one shape, type and layout."""
    return (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
