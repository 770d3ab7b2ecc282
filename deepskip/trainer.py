"""The training loop. It is told its rank and world size; who started it, and where batches come from, it does not know."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepskip import kernels
from deepskip.allocator import keep_freed_memory
from deepskip.checkpoint_writer import CheckpointWriter
from deepskip.complexity import convolution_weights
from deepskip.config import Config, RunConfig
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location
from deepskip.evaluation import evaluate
from deepskip.optimizer import learning_rate
from deepskip.ranks import StopVote, agreed_start, share_buffers
from deepskip.training_step import Batch, DataInfo, StepResult, TrainingStep


class NonFiniteLoss(RuntimeError):
    """The loss, or a weight, was nan or infinite; the message has the step and the samples."""


class Preempted(RuntimeError):
    """The training stopped because it was asked to; `step` is that of its checkpoint, which is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}, as it was asked to; its checkpoint is written")
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return Preempted, (self.step,)


@dataclass
class Record:
    """What the loop knows beyond its steps, and a checkpoint holds: the best validation and the time spent before."""

    best: dict[str, Any] | None = None
    validations_since_best: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def take(self, metrics: dict[str, Any], step: int) -> bool:
        """Take a validation's metrics; returns whether they are the best so far."""
        # not (a > b): nan beats nothing, and anything beats nan
        better = self.best is None or not metrics["iou"] <= self.best["iou"]
        self.best = metrics | {"step": step} if better else self.best
        self.validations_since_best = 0 if better else self.validations_since_best + 1
        return better

    def out_of_patience(self, patience: int) -> bool:
        """Tell whether the training ends here; a patience of 0 never runs out."""
        return 0 < patience <= self.validations_since_best

    def total_seconds(self) -> float:
        """Return the time of all parts of the training."""
        return self.seconds + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {"best": self.best, "stale": self.validations_since_best, "seconds": self.total_seconds()}


@dataclass
class Window:
    """The steps since the last look at the device, and the rates of all windows."""

    steps: list[StepResult] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)
    clock: float = field(default_factory=time.perf_counter)
    images: int = 0
    seconds: float = 0.0

    def rate(self) -> float:
        """Return images/s over all windows."""
        return self.images / self.seconds if self.seconds else 0.0

    def close(self, training: TrainingStep, writer: CheckpointWriter) -> dict[str, float]:
        """Wait for the device, once a window, and return its means; raises NonFiniteLoss on every rank."""
        losses = torch.stack([torch.stack(one[:3]) for one in self.steps]).double().cpu()
        counts = torch.stack(
            [*torch.stack([one.overlap for one in self.steps]).sum(0), broken_weights(training.network)]
        )
        if training.world_size > 1:
            dist.all_reduce(counts)
        tp, fp, fn, broken = counts.tolist()
        # before anything is written
        stop_if_not_finite(losses[:, 0], broken > 0, training.step, self.keys, training.world_size, writer)
        images, took = len(self.steps) * training.config.optim.global_batch_size, time.perf_counter() - self.clock
        self.images, self.seconds = self.images + images, self.seconds + took
        self.steps, self.keys = [], []
        loss, bce, dice_loss = losses.mean(0).tolist()
        if training.own_loss:
            return {"loss": loss, "images_per_second": images / took}
        iou = tp / max(tp + fp + fn, 1)
        return {"loss": loss, "bce": bce, "dice": 1 - dice_loss, "iou": iou, "images_per_second": images / took}


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
) -> dict[str, Any]:
    """Trains from the run's newest checkpoint, or from scratch, to config.optim.steps or until run.patience is used up.

    run: folder or URL of its checkpoints. train_batches: called with the first step, yields this rank's share of every global
    batch. validation_images: yields this rank's share of the validation split, one image a batch. observe: called on rank 0
    with ("train" | "validation" | "panel" | "warning", steps done, values). stop_requested: asked after every step, on every
    rank or on none; where it is true on any, a checkpoint is written and all raise Preempted within ranks.VOTE_STEPS steps.
    In a process group every rank must call. Returns a summary: metrics of the best validation, sizes and times.
    Raises NonFiniteLoss, Preempted, checkpoint.CheckpointNotWritten, checkpoint.CheckpointTooNew, OSError.
    """
    device, run = torch.device(device), storage.locate(run)
    optim, settings = config.optim, config.run
    record = Record()
    kernels.backend.choose(settings.kernels)
    if device.type == "cpu":
        keep_freed_memory()

    training = TrainingStep(config, data, device, world_size)
    state = agreed_start(run, rank, world_size, device, lambda text: observe("warning", 0, {"text": text}))
    if state is not None:
        training.load_state_dict(state)
        record = Record(state["best"], state["stale"], state["seconds"], record.started)
    training.distribute()
    writer = CheckpointWriter(run, settings.keep_checkpoints, training.step if state else None)
    stop_vote = StopVote(stop_requested, world_size, device)
    window = Window()
    batches = on_device(train_batches(training.step), device)
    training.network.train()
    with writer:
        while training.step < optim.steps and not record.out_of_patience(settings.patience):
            batch = next(batches)
            window.steps.append(training(batch))
            window.keys.append(batch["key"])
            writer.check()
            stopping = stop_vote() and training.step < optim.steps
            log, validation, save = due(settings, training.step, optim.steps)
            if not (log or validation or save or stopping):
                continue
            means = window.close(training, writer)
            if rank == 0:
                left = (optim.steps - training.step) * optim.global_batch_size / window.rate()
                means |= {"learning_rate": learning_rate(optim, training.step - 1), "seconds_left": left}
                observe("train", training.step, means)
            better = False
            if validation:
                metrics = validate(training, validation_images(), rank, observe)
                better = record.take(metrics, training.step)
                training.network.train()
            save = save or stopping or record.out_of_patience(settings.patience)
            if rank == 0 and (save or better):
                snapshot = training.state_dict() | record.state_dict() | {"mlflow_run_id": mlflow_run_id}
                writer.save(snapshot, step=save, best=better)
            if stopping:
                writer.wait()
                stop_vote.close()
                if world_size > 1:
                    # a rank that ends is the end of the others: not before rank 0 has written
                    dist.barrier()
                raise Preempted(training.step)
            window.clock = time.perf_counter()

    stop_vote.close()
    if record.best is None:
        record.take(validate(training, validation_images(), rank, observe), training.step)
    return {
        "val": record.best,
        "parameters": sum(p.numel() for p in training.network.parameters()),
        "conv_weights": convolution_weights(training.network),
        "steps": training.step,
        "stopped_early": training.step < optim.steps,
        "images_per_second": window.rate(),
        "seconds": record.total_seconds(),
    }


def due(settings: RunConfig, step: int, last: int) -> tuple[bool, ...]:
    """Tell whether a step is logged, validated and saved; the last one is all three."""
    every = (settings.log_every, settings.validate_every, settings.checkpoint_every)
    return tuple(step % one == 0 or step == last for one in every)


def validate(
    training: TrainingStep, images: Iterable[Batch], rank: int, observe: Callable[[str, int, dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure the moving average on the validation split and observe it; every rank calls with its share."""
    if training.world_size > 1:
        share_buffers(training.averaged)
    data, panels = training.data, training.config.run.panels
    metrics, panel = evaluate(
        training.averaged, training.criterion, data.num_classes, data.ignore_index, images, training.device, panels
    )
    if rank == 0:
        observe("validation", training.step, metrics)
        observe("panel", training.step, {"images": panel})
    return metrics


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields batches with their tensors on the device; a batch in pinned memory is copied while the last one is computed on."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        # a stream of None leaves all as it is
        with torch.cuda.stream(stream):
            moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if stream is not None:
            now = torch.cuda.current_stream(device)
            now.wait_stream(stream)
            for value in moved.values():
                if isinstance(value, Tensor):
                    # its memory is not given to the next copy while this stream still reads it
                    value.record_stream(now)
        yield moved


def broken_weights(network: nn.Module) -> Tensor:
    """Return 1 where a weight or a running statistic is nan or infinite, else 0, without waiting for the device."""
    tensors = [x for x in network.state_dict().values() if x.is_floating_point()]
    return (~torch.isfinite(nn.utils.get_total_norm(tensors, math.inf))).long()


def stop_if_not_finite(
    losses: Tensor, broken: bool, step: int, keys: list[list[str]], world_size: int, writer: CheckpointWriter
) -> None:
    """Raises NonFiniteLoss for the first bad loss of a window that ends with `step`, or for broken weights after it.

    Every rank sees the same losses, and raises only when the checkpoint before is written.
    """
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if not bad and not broken:
        return
    writer.wait()
    # weights that break before the last step of a window make the next loss bad
    place = bad[0] if bad else len(losses) - 1
    batch_keys = keys[place]
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, batch_keys)
        batch_keys = [key for part in gathered for key in part]
    number, value = step - len(losses) + place + 1, losses[place].item()
    what = f"the loss of step {number} is {value}" if bad else f"step {number}, of loss {value}, broke the weights"
    raise NonFiniteLoss(
        f"{what}; its samples: {', '.join(batch_keys)}. "
        "The last checkpoint is from before it. Lower optim.learning_rate or look at these samples."
    )
