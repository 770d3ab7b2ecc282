"""Run the training loop.

It is given its rank, its world size and its batches, and does not depend on Ray or on how batches are read.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepskip import kernels
from deepskip.checkpoint import RecordState, State
from deepskip.checkpoint_writer import CheckpointWriter
from deepskip.complexity import convolution_weights
from deepskip.config import Config, RunConfig
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location
from deepskip.device import on_device, prepared
from deepskip.evaluation import evaluate
from deepskip.following import Outcome, Stream, StreamReader
from deepskip.notices import warn_at_start, warn_of_validation, warn_of_weights, warner
from deepskip.optimizer import learning_rate
from deepskip.precision import agreed_precision
from deepskip.prequential import image_counts
from deepskip.publishing import publisher
from deepskip.ranks import StopVote, agreed_start, share_buffers
from deepskip.training_step import Batch, DataInfo, StepResult, TrainingStep


class NonFiniteLoss(RuntimeError):
    """The loss or a weight was nan or infinite; the message has the step and the samples."""


class Preempted(RuntimeError):
    """The training stopped because it was asked to, and its checkpoint is written.

    Attributes:
        step: step of the checkpoint.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step} as requested; its checkpoint is written")
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return Preempted, (self.step,)


@dataclass
class Record:
    """What the loop adds to a checkpoint: the best validation and the time spent.

    Attributes:
        best: metrics and step of the best validation, or None.
        validations_since_best: number of validations after the best one.
        seconds: spent before this process started.
        started: time of the start, of time.perf_counter.
    """

    best: dict[str, Any] | None = None
    validations_since_best: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def take(self, metrics: dict[str, Any], step: int) -> bool:
        """Record the metrics of a validation.

        Args:
            metrics: metrics of the validation.
            step: step after which it ran.

        Returns:
            Whether they are the best so far.
        """
        better = self.best is None or _rank(metrics) > _rank(self.best)
        self.best = metrics | {"step": step} if better else self.best
        self.validations_since_best = 0 if better else self.validations_since_best + 1
        return better

    def out_of_patience(self, patience: int) -> bool:
        """Return whether the training ends here; a patience of 0 never runs out."""
        return 0 < patience <= self.validations_since_best

    def total_seconds(self) -> float:
        """Return the time of the whole training, including that before it was resumed."""
        return self.seconds + time.perf_counter() - self.started

    def state_dict(self) -> RecordState:
        """Return the record's part of a checkpoint."""
        return {"best": self.best, "stale": self.validations_since_best, "seconds": self.total_seconds()}


def _rank(metrics: dict[str, Any]) -> tuple[float, float]:
    """Return what the best validation has most of: IoU, and of equal ones the lower loss."""
    # nan: the split has no foreground, and none was predicted. No other outcome on that split is as good.
    return math.inf if math.isnan(metrics["iou"]) else metrics["iou"], -metrics.get("loss", math.inf)


class Summary(TypedDict):
    """The result of a training.

    Attributes:
        val: metrics and step of the best validation.
        parameters: number of the network's parameters.
        conv_weights: number of its convolution weights.
        steps: number of steps done.
        stopped_early: whether that is fewer than config.optim.steps.
        images_per_second: mean rate since the training was last resumed.
        seconds: time of the whole training.
    """

    val: dict[str, float] | None
    parameters: int
    conv_weights: int
    steps: int
    stopped_early: bool
    images_per_second: float
    seconds: float


@dataclass
class Window:
    """The steps since the last synchronisation with the device, and the rates of all windows.

    Attributes:
        steps: results of the window's steps.
        keys: keys of the samples of each step.
        taken: sum of the fingerprints of the steps' samples on this rank.
        clock: start of the window, of time.perf_counter.
        images: number of images in all windows closed so far.
        seconds: duration of all windows closed so far.
    """

    steps: list[StepResult] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)
    taken: int = 0
    clock: float = field(default_factory=time.perf_counter)
    images: int = 0
    seconds: float = 0.0

    def rate(self) -> float:
        """Return images/s over all windows."""
        return self.images / self.seconds if self.seconds else 0.0

    def close(self, training: TrainingStep, writer: CheckpointWriter) -> dict[str, float]:
        """Wait for the device, and return the means of the window's steps; this happens once a window.

        Args:
            training: training whose steps they are.
            writer: writer of checkpoints, which finishes before an error is raised.

        Returns:
            "loss" and "images_per_second", and unless the network has its own loss, "bce", "dice" and "iou". `taken` is
            then the sum over all ranks.

        Raises:
            NonFiniteLoss: on every rank, if a loss or a weight is nan or infinite.
        """
        losses = torch.stack([torch.stack(one[:3]) for one in self.steps])
        counts = torch.stack(
            [
                *torch.stack([one.overlap for one in self.steps]).sum(0),
                broken_weights(training.network),
                torch.tensor(self.taken, device=training.device),
            ]
        )
        if training.world_size > 1:
            dist.all_reduce(counts)
        # One copy to the host. fp64 holds counts exactly up to 2^53.
        numbers = torch.cat([losses.double().flatten(), counts.double()]).cpu()
        losses, (tp, fp, fn, broken, taken) = numbers[: -len(counts)].view(-1, 3), numbers[-len(counts) :].tolist()
        # Check before anything is written.
        stop_if_not_finite(losses[:, 0], broken > 0, training.step, self.keys, training.world_size, writer)
        images, took = len(self.steps) * training.config.optim.global_batch_size, time.perf_counter() - self.clock
        self.images, self.seconds = self.images + images, self.seconds + took
        self.steps, self.keys, self.taken = [], [], int(taken)
        loss, bce, dice_loss = losses.mean(0).tolist()
        if training.own_loss:
            return {"loss": loss, "images_per_second": images / took}
        iou = tp / max(tp + fp + fn, 1)
        return {"loss": loss, "bce": bce, "dice": 1 - dice_loss, "iou": iou, "images_per_second": images / took}


@dataclass
class Loop:
    """What a training does between its steps: it logs, validates, saves and stops.

    Attributes:
        training: the training.
        record: its best validation.
        writer: writer of its checkpoints.
        validation_images: as for `train`, like all that follow.
        window: the steps since the last synchronisation.
    """

    training: TrainingStep
    record: Record
    writer: CheckpointWriter
    validation_images: Callable[[], Iterable[Batch]]
    rank: int
    observe: Callable[[str, int, dict[str, Any]], None]
    validated: Callable[[int], None]
    mlflow_run_id: str | None
    stream: Stream | None = None
    window: Window = field(default_factory=Window)

    def finish(self, validation: bool, save: bool, stopping: bool) -> None:
        """Synchronise with the device after a step, log the steps since the last call, and do what is due.

        Args:
            validation: whether to validate.
            save: whether to write a checkpoint.
            stopping: whether to stop, with a checkpoint.

        Raises:
            NonFiniteLoss: as `Window.close`.
            Preempted: if `stopping`.
        """
        training, optim, better = self.training, self.training.config.optim, False
        # A stream that waits may be left before a step is done.
        if self.window.steps:
            means = self.window.close(training, self.writer)
            if self.stream is not None:
                self.stream.took(self.window.taken)
            self.window.taken = 0
            if self.rank == 0:
                means["learning_rate"] = learning_rate(optim, training.step - 1)
                if optim.steps is not None:
                    left = (optim.steps - training.step) * optim.global_batch_size / self.window.rate()
                    means["seconds_left"] = left
                if self.stream is not None:
                    self.observe("stream", training.step, self.stream.progress(training.step))
                self.observe("train", training.step, means)
        if validation:
            better = self.validate()
        settings = training.config.run
        save = save or stopping or self.record.out_of_patience(settings.patience)
        if self.rank == 0 and (save or better):
            snapshot: dict[str, Any] = {
                **training.state_dict(), **self.record.state_dict(), "mlflow_run_id": self.mlflow_run_id,
            }  # fmt: skip
            if self.stream is not None:
                snapshot["stream"] = self.stream.state_dict()
            self.writer.save(cast(State, snapshot), step=save, best=better)
        if stopping:
            self.writer.wait()
            if training.world_size > 1:
                # A rank that exits ends the others, so all wait until rank 0 has written.
                dist.barrier()
            raise Preempted(training.step)
        self.window.clock = time.perf_counter()

    def reader(self, stream: Stream, stop_requested: Callable[[], bool] | None) -> StreamReader:
        """Return a reader of the stream, which measures the network on each generation before it is trained on it.

        Args:
            stream: the stream.
            stop_requested: as for `train`.
        """
        training = self.training

        def begun(step: int) -> None:
            for generation, samples in stream.begun(step):
                # The first segment would measure weights that were never trained.
                if step and training.config.run.prequential:
                    counts = image_counts(training, stream.images(samples), samples)
                    if self.rank == 0:
                        self.observe("generation", step, stream.scored(step, generation, counts))

        to_device = partial(on_device, device=training.device)
        every = training.config.run.log_every
        return StreamReader(
            stream, self.rank, training.world_size, training.device, every, to_device, stop_requested, begun
        )

    def validate(self) -> bool:
        """Validate, and return whether that was the best so far."""
        metrics = validate(self.training, self.validation_images(), self.rank, self.observe, self.validated)
        self.training.network.train()
        if self.record.best is None:
            warn_of_validation(metrics, warner(self.observe, self.rank))
        return self.record.take(metrics, self.training.step)


def train(
    config: Config,
    data: DataInfo,
    *,
    run: Location,
    train_batches: Callable[[int], Iterator[Batch]],
    validation_images: Callable[[], Iterable[Batch]],
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    observe: Callable[[str, int, dict[str, Any]], None] = lambda kind, step, values: None,
    mlflow_run_id: str | None = None,
    stop_requested: Callable[[], bool] | None = None,
    validated: Callable[[int], None] = lambda step: None,
    stream: Stream | None = None,
) -> Summary:
    """Train from the run's newest checkpoint, or from scratch, to config.optim.steps or until run.patience is used up.

    Args:
        config: settings of the training.
        data: description of the training data.
        run: folder or URL of its checkpoints.
        train_batches: function of the first step that yields this rank's share of every global batch.
        validation_images: function that yields this rank's block of the validation split, one image a batch.
        rank: rank of this process; every rank of a process group calls this function.
        world_size: number of ranks.
        device: device on which to train.
        observe: called on rank 0 with ("train" | "validation" | "stream" | "generation" | "panel" | "warning", steps done,
            values).
        mlflow_run_id: MLflow's run, stored in the checkpoints.
        stop_requested: called after every step; true on any rank, it ends all within ranks.VOTE_STEPS steps.
        validated: called on every rank after a validation, with the number of steps done.
        stream: a stream that grows, which is then read in the place of train_batches.

    Returns:
        A summary: metrics of the best validation, sizes and times.

    Raises:
        NonFiniteLoss, Preempted: if a loss or a weight is nan or infinite; if a stop was requested.
        checkpoint.CheckpointNotWritten, checkpoint.CheckpointTooNew, identity.OtherData, OtherSettings: see there.
        OSError: if the storage cannot be read.
    """
    device, run = prepared(device), storage.locate(run)
    optim, settings, record = config.optim, config.run, Record()
    kernels.backend.choose(settings.kernels)
    training = TrainingStep(config, data, device, world_size)
    warn = warner(observe, rank)
    state = agreed_start(run, rank, world_size, device, warn, data.splits, config.data.accept)
    if state is not None:
        training.load_state_dict(state)
        record = Record(state["best"], state["stale"], state["seconds"], record.started)
    elif settings.weights is not None:
        warn_of_weights(training, training.start_from(settings.weights), warn)
    warn_at_start(training, record.out_of_patience(settings.patience), warn)
    training.precision = agreed_precision(settings.precision, state, device, world_size, warn)
    training.distribute()
    publish = publisher(config, rank, warn)
    stop_vote = StopVote(stop_requested, world_size)
    loop = Loop(
        training, record, CheckpointWriter(run, settings.keep_checkpoints, training.step if state else None, publish),
        validation_images, rank, observe, validated, mlflow_run_id, stream,
    )  # fmt: skip
    reader: StreamReader | None = None
    if stream is not None:
        stream.load_state_dict(state.get("stream") if state else None, training.step)
        reader = loop.reader(stream, stop_requested)
    batches = on_device(train_batches(training.step), device)
    last = math.inf if optim.steps is None else optim.steps
    training.network.train()
    with loop.writer:
        while training.step < last and not record.out_of_patience(settings.patience):
            if stream is None or reader is None:
                batch = next(batches)
            elif (found := reader.next(training.step)) is not None:
                batch = found
                loop.window.clock += reader.waited
                loop.window.taken += stream.fingerprint(training.step, batch)
            else:
                stopping = reader.outcome is Outcome.STOPPED
                loop.finish(not stopping, True, stopping)
                break
            loop.window.steps.append(training(batch, stop_vote.asked))
            loop.window.keys.append(batch["key"])
            loop.writer.check()
            stopping = stop_vote(training.votes) and training.step < last
            log, validation, save = due(settings, training.step, last)
            if log or validation or save or stopping:
                loop.finish(validation, save, stopping)

    if record.best is None:
        loop.validate()
    return {
        "val": record.best,
        "parameters": sum(p.numel() for p in training.network.parameters()),
        "conv_weights": convolution_weights(training.network),
        "steps": training.step,
        "stopped_early": optim.steps is not None and training.step < optim.steps,
        "images_per_second": loop.window.rate(),
        "seconds": record.total_seconds(),
    }


def due(settings: RunConfig, step: int, last: float) -> tuple[bool, ...]:
    """Return whether a step is logged, validated and saved; the last one is all three."""
    every = (settings.log_every, settings.validate_every, settings.checkpoint_every)
    return tuple(step % one == 0 or step == last for one in every)


def validate(
    training: TrainingStep,
    images: Iterable[Batch],
    rank: int,
    observe: Callable[[str, int, dict[str, Any]], None],
    validated: Callable[[int], None],
) -> dict[str, float]:
    """Measure the moving average on the validation split and pass the results to `observe`.

    Args:
        training: training whose averaged network is measured.
        images: this rank's block of the split, in its order; every rank must call with its own.
        rank: rank of this process.
        observe: called on rank 0 with the metrics and the panel.
        validated: called on every rank at the end, with the number of steps done.
    """
    if training.world_size > 1:
        share_buffers(training.averaged)
    data, panels = training.data, training.config.run.panels
    metrics, panel = evaluate(
        training.averaged, training.criterion, data.num_classes, data.ignore_index, images, training.device, panels,
        training.precision,
    )  # fmt: skip
    if rank == 0:
        observe("validation", training.step, metrics)
        observe("panel", training.step, {"images": panel})
    validated(training.step)
    return metrics


def broken_weights(network: nn.Module) -> Tensor:
    """Return 1 if a weight or a running statistic is nan or infinite, else 0, without waiting for the device.

    Returns:
        A scalar int64.
    """
    tensors = [x for x in network.state_dict().values() if x.is_floating_point()]
    return (~torch.isfinite(nn.utils.get_total_norm(tensors, math.inf))).long()


def stop_if_not_finite(
    losses: Tensor, broken: bool, step: int, keys: list[list[str]], world_size: int, writer: CheckpointWriter
) -> None:
    """Raise an error for the first bad loss of a window, or for broken weights after it.

    Every rank sees the same losses. It raises only after the previous checkpoint is written.

    Args:
        losses: losses of the window's steps, (steps,).
        broken: whether a weight is nan or infinite after the window.
        step: last step of the window.
        keys: keys of the samples of each step.
        world_size: number of ranks.
        writer: writer of checkpoints.

    Raises:
        NonFiniteLoss: with the step and its samples.
    """
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if not bad and not broken:
        return
    writer.wait()
    # Weights that break before the last step of a window make the next loss non-finite.
    place = bad[0] if bad else len(losses) - 1
    batch_keys = keys[place]
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, batch_keys)
        batch_keys = [key for part in gathered for key in part]
    number, value = step - len(losses) + place + 1, losses[place].item()
    what = (
        f"the loss of step {number} is {value}"
        if bad
        else f"step {number}, of loss {value}, made the weights nan or infinite"
    )
    raise NonFiniteLoss(
        f"{what}; its samples: {', '.join(batch_keys)}. "
        "The last checkpoint is from before this step. Lower optim.learning_rate or check these samples."
    )
