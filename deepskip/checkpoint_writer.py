"""Write checkpoints in the background while the training continues.

A step waits only for the copy of its state; a thread does the rest.
"""

import contextlib
import errno
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from deepskip import checkpoint
from deepskip.checkpoint import CheckpointNotWritten, StepState
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location
from deepskip.publishing import Publisher

_ADVICE = {
    errno.ENOSPC: "Free space there, or lower run.keep_checkpoints",
    errno.EDQUOT: "Free space there or raise the quota, or lower run.keep_checkpoints",
    errno.EACCES: "Give the user of the training write permission there",
    errno.EROFS: "Make it writable",
}


class CheckpointWriter:
    """Write a run's checkpoints one after the other in one thread.

    As a context manager it ends once the last one is written. A save waits while the one before is still being written.
    So none is skipped, and memory holds one copy. An error in the thread is raised as CheckpointNotWritten by the next
    call, or at the end of the block.

    Args:
        run: folder or URL of the run.
        keep: number of step checkpoints to keep, the newest.
        last_step: step of the checkpoint that the training resumed from, for error messages.
        publisher: publishes the best checkpoint once it is written; None does not.
    """

    def __init__(
        self,
        run: Location,
        keep: int,
        last_step: int | None = None,
        publisher: Publisher | None = None,
    ) -> None:
        self.run, self.keep, self.last_step = run, keep, last_step
        self.publisher = publisher
        # Why the last publication failed, until it is reported.
        self.unpublished = ""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.written: Future[None] | None = None
        self.buffers: Any = None

    def __enter__(self) -> "CheckpointWriter":
        if self.publisher is not None and self.last_step is not None:
            self.written = self.thread.submit(self._publish, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointNotWritten:
            # The error that ended the block is raised, not one that it caused.
            if error is None:
                raise
        finally:
            self.thread.shutdown()

    def save(self, state: StepState, *, step: bool = True, best: bool = False) -> None:
        """Copy the state, and have it written as the checkpoint of its step, as the best one, or both.

        On a GPU the copies are made to pinned memory and the call does not wait for them. Work queued on the device
        afterwards may change the state.

        Args:
            state: state of the training, `checkpoint.State`; its "step" is the step's number.
            step: write it as the checkpoint of its step.
            best: write it, without the optimizer's state, as the best checkpoint.

        Raises:
            CheckpointNotWritten: if the save before this one failed.
        """
        self.wait()
        self.buffers = state = copied(state, self.buffers)
        done = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if done is not None:
            done.record()
        self.written = self.thread.submit(self._write, state, done, step, best)

    def check(self) -> None:
        """Raise the error of the last save if it has failed, without waiting for it.

        Raises:
            CheckpointNotWritten: if the last save failed.
        """
        if self.written is not None and self.written.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is written.

        Raises:
            CheckpointNotWritten: if the last save failed.
        """
        written, self.written = self.written, None
        if written is not None:
            written.result()
        text, self.unpublished = self.unpublished, ""
        if text and self.publisher is not None:
            self.publisher.warn(text)

    def _write(self, state: StepState, done: torch.cuda.Event | None, step: bool, best: bool) -> None:
        if done is not None:
            done.synchronize()
        # The best is written first: a step's checkpoint refers to a best one, which must exist.
        if best:
            self._put({**state, "optimizer": None}, storage.join(self.run, checkpoint.FOLDER, checkpoint.BEST))
            self._publish(state)
        if step:
            self._put(state, checkpoint.step_path(self.run, state["step"]))
            self.last_step = state["step"]
            # An old checkpoint that cannot be removed does no harm.
            with contextlib.suppress(OSError):
                checkpoint.prune(self.run, self.keep)

    def _publish(self, state: StepState | None) -> None:
        """Publish a state, or the run's best checkpoint; the training does not end if that fails."""
        if self.publisher is None:
            return
        try:
            if state is None:
                self.publisher.publish_best(self.run)
            else:
                self.publisher.publish(state)
        except OSError as error:
            self.unpublished = f"the best model is not published: {error}. The next better one is tried"

    def _put(self, state: Mapping[str, Any], location: Location) -> None:
        try:
            checkpoint.save(state, location)
        except OSError as error:
            reason = error.strerror or str(error).removeprefix(f"{location} ")
            advice = _ADVICE.get(error.errno or 0, "Check that storage")
            last = "starts from the beginning, because there is no earlier checkpoint"
            if self.last_step is not None:
                last = f"resumes from {checkpoint.step_path(self.run, self.last_step)}, which is complete"
            raise CheckpointNotWritten(
                f"{location} could not be written: {reason}. {advice}; the same command then {last}."
            ) from error


@torch.no_grad()
def copied(value: Any, buffer: Any) -> Any:
    """Copy tensors in nested dicts and lists to the CPU, into the tensors of an earlier copy where they fit.

    Args:
        value: a tensor of any shape (*,), a dict or list of such values, or anything else, which is returned as it is.
        buffer: the earlier copy, or None.

    Returns:
        The copy. On a GPU it is complete once the work queued on the device is done.
    """
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
    """Return whether two tensors of any shape (*,) have the same shape, dtype and strides."""
    return (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
