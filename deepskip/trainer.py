"""The training loop. It is told its rank and world size; who started it, and where batches come from, it does not know."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kernels
from deepskip import augment, checkpoint, files
from deepskip.allocator import keep_freed_memory
from deepskip.checkpoint_writer import CheckpointWriter
from deepskip.complexity import conv_weights
from deepskip.config import Config
from deepskip.evaluation import evaluate
from deepskip.files import Location
from deepskip.inference import normalize, to_labels
from deepskip.loss import BCEDiceLoss
from deepskip.network import DeepSkipUNet
from deepskip.optimizer import build_optimizer, learning_rate, set_learning_rate
from deepskip.ranks import StopVote, agreed_start, share_buffers

# image (N, bands, H, W) raw, mask (N, H, W) uint8, mean and std (N, bands), weight (N,); epoch, sample and key are lists of N
Batch = dict[str, Any]


@dataclass(frozen=True)
class DataInfo:
    """What the network must know of its data; stored in every checkpoint."""

    in_channels: int
    num_classes: int
    ignore_index: int
    mean: list[float]
    std: list[float]
    preparation: dict[str, Any]


class NonFiniteLoss(RuntimeError):
    """The loss, or a weight, was nan or infinite; the message has the step and the samples."""


class Preempted(RuntimeError):
    """The training stopped because it was asked to; `step` is that of its checkpoint, which is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}, as it was asked to; its checkpoint is written")
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return Preempted, (self.step,)


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
    device, run = torch.device(device), files.locate(run)
    optim = config.optim
    started = time.perf_counter()
    kernels.backend.choose(config.run.kernels)
    if device.type == "cpu":
        keep_freed_memory()

    # every rank draws the same weights
    torch.manual_seed(config.run.seed)
    settings = asdict(config.model) | {"in_channels": data.in_channels, "num_classes": data.num_classes}
    network = DeepSkipUNet(**settings).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(optim, network)
    ema = (
        AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(optim.ema_decay), use_buffers=True)
        if optim.ema_decay
        else None
    )
    loss_of = BCEDiceLoss(
        config.loss.alpha, config.loss.beta, config.loss.class_weights, data.ignore_index, config.loss.eps
    )

    # stale: validations since the best one
    step, best, stale, trained_seconds = 0, None, 0, 0.0
    state = agreed_start(run, rank, world_size, device, lambda text: observe("warning", 0, {"text": text}))
    if state is not None:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.module.load_state_dict(state["ema"])
            ema.n_averaged.fill_(state["step"])
        step, best, stale, trained_seconds = (state[name] for name in ("step", "best", "stale", "seconds"))
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    if config.run.compile != "none":
        # in place: the state keeps its names, and the moving average stays as it is
        network.compile(mode=config.run.compile)
    writer = CheckpointWriter(run, config.run.keep_checkpoints, step if state else None)
    stop_vote = StopVote(stop_requested, world_size, device)
    model: nn.Module = network
    if world_size > 1:
        model = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    def snapshot() -> checkpoint.State:
        # bfloat16 needs no gradient scaler, the learning rate and the augmentation are functions of the step
        return {
            "config": asdict(config),
            "data": asdict(data),
            "model": network.state_dict(),
            "ema": ema.module.state_dict() if ema is not None else None,
            "optimizer": optimizer.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
            "step": step,
            "best": best,
            "stale": stale,
            "seconds": trained_seconds + time.perf_counter() - started,
            "mlflow_run_id": mlflow_run_id,
        }

    def validate() -> dict[str, Any]:
        evaluated = ema.module if ema is not None else network
        if world_size > 1:
            share_buffers(evaluated)
        metrics, panel = evaluate(
            evaluated, loss_of, data.num_classes, data.ignore_index, validation_images(), device, config.run.panels
        )
        if rank == 0:
            observe("validation", step, metrics)
            observe("panel", step, {"images": panel})
        return metrics

    def out_of_patience() -> bool:
        return 0 < config.run.patience <= stale

    window: list[tuple[Tensor, ...]] = []
    keys: list[list[str]] = []
    images, busy, clock = 0, 0.0, time.perf_counter()
    total_images, total_busy = 0, 0.0
    batches = on_device(train_batches(step), device)
    model.train()
    with writer:
        while step < optim.steps and not out_of_patience():
            batch = next(batches)
            image = normalize(batch["image"], batch["mean"], batch["std"])
            mask, weight = batch["mask"].long(), batch["weight"]
            draws = augment.draw(config.augment, config.run.seed, batch["epoch"], batch["sample"], data.in_channels)
            image, mask = augment.augment(config.augment, draws, image, mask, data.ignore_index)
            set_learning_rate(optimizer, learning_rate(optim, step))

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(image.contiguous(memory_format=torch.channels_last))
            parts = loss_of.parts(logits, mask, weight)
            # the loss is of the global batch, so gradients must be summed over ranks where ddp averages them
            (parts.loss * world_size).backward()
            if optim.clip_norm:
                nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update_parameters(network)
            step += 1
            images += optim.global_batch_size
            window.append((*(part.detach() for part in parts), overlap_counts(logits.detach(), mask, weight, data)))
            keys.append(batch["key"])
            writer.check()

            stopping = stop_vote() and step < optim.steps
            log, validation, save = (
                step % every == 0 or step == optim.steps
                for every in (config.run.log_every, config.run.validate_every, config.run.checkpoint_every)
            )
            if not (log or validation or save or stopping):
                continue
            # one wait for the device a window
            losses = torch.stack([torch.stack(entry[:3]) for entry in window]).double().cpu()
            counts = torch.stack([*torch.stack([entry[3] for entry in window]).sum(0), broken_weights(network)])
            if world_size > 1:
                dist.all_reduce(counts)
            tp, fp, fn, broken = counts.tolist()
            # before anything is written
            stop_if_not_finite(losses[:, 0], broken > 0, step, keys, world_size, writer)
            busy += time.perf_counter() - clock
            loss, bce, dice_loss = losses.mean(0).tolist()
            total_images, total_busy = total_images + images, total_busy + busy
            if rank == 0:
                values = {
                    "loss": loss,
                    "bce": bce,
                    "dice": 1 - dice_loss,
                    "iou": tp / max(tp + fp + fn, 1),
                    "learning_rate": learning_rate(optim, step - 1),
                    "images_per_second": images / busy,
                    "seconds_left": (optim.steps - step) * optim.global_batch_size * total_busy / total_images,
                }
                observe("train", step, values)
            window, keys, images, busy = [], [], 0, 0.0
            better = False
            if validation:
                metrics = validate()
                better = best is None or not metrics["iou"] <= best["iou"]
                best, stale = (metrics | {"step": step}, 0) if better else (best, stale + 1)
                model.train()
            save = save or stopping or out_of_patience()
            if rank == 0 and (save or better):
                writer.save(snapshot(), step=save, best=better)
            if stopping:
                writer.wait()
                stop_vote.close()
                if world_size > 1:
                    # a rank that ends is the end of the others: not before rank 0 has written
                    dist.barrier()
                raise Preempted(step)
            clock = time.perf_counter()

    stop_vote.close()
    if best is None:
        best = validate() | {"step": step}
    return {
        "val": best,
        "parameters": sum(p.numel() for p in network.parameters()),
        "conv_weights": conv_weights(
            data.in_channels, data.num_classes, config.model.base_channels, config.model.levels, config.model.encoder
        ),
        "steps": step,
        "stopped_early": step < optim.steps,
        "images_per_second": total_images / total_busy if total_busy else 0.0,
        "seconds": trained_seconds + time.perf_counter() - started,
    }


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


def overlap_counts(logits: Tensor, mask: Tensor, weight: Tensor, data: DataInfo) -> Tensor:
    """Counts true positive, false positive and false negative foreground pixels, without waiting for the device."""
    labels = to_labels(logits)
    counted = (mask != data.ignore_index) & (weight != 0)[:, None, None]
    right, guessed, true = labels == mask, labels != 0, mask != 0
    return torch.stack([(a & b & counted).sum() for a, b in ((right, true), (~right, guessed), (~right, true))])


def broken_weights(network: nn.Module) -> Tensor:
    """Gives 1 where a weight or a running statistic is nan or infinite, else 0, without waiting for the device."""
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
