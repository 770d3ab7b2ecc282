"""The training loop. It is told its rank and world size; who started it, and where batches come from, it does not know."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kernels
from deepskip import augment, checkpoint
from deepskip.allocator import keep_freed_memory
from deepskip.complexity import conv_weights
from deepskip.config import Config, OptimConfig
from deepskip.inference import normalize, predict_logits, to_labels
from deepskip.loss import BCEDiceLoss
from deepskip.metrics import SegmentationMetrics
from deepskip.network import DeepSkipUNet
from deepskip.optimizer import build_optimizer, set_learning_rate

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
    """The loss was nan or infinite; the message has the step and the samples."""


def learning_rate(config: OptimConfig, step: int) -> float:
    """Gives the learning rate of a step, 0 first: linear warm-up, then a cosine down to its final share."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def train(
    config: Config,
    data: DataInfo,
    *,
    run: Path,
    train_batches: Callable[[int], Iterator[Batch]],
    validation_images: Callable[[], Iterable[Batch]],
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    observe: Callable[[str, int, dict[str, Any]], None] = lambda kind, step, values: None,
    mlflow_run_id: str | None = None,
) -> dict[str, Any]:
    """Trains from the run's newest checkpoint, or from scratch, to config.optim.steps.

    train_batches: called with the first step, yields this rank's share of every global batch. validation_images: yields
    this rank's share of the validation split, one image a batch. observe: called on rank 0 with
    ("train" | "validation" | "panel" | "warning", steps done, values).
    In a process group every rank must call. Returns a summary: metrics of the best validation, sizes and times.
    Raises NonFiniteLoss.
    """
    device = torch.device(device)
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

    step, best, trained_seconds = 0, None, 0.0
    state, faults = checkpoint.newest(run)
    for fault in faults if rank == 0 else []:
        observe("warning", 0, {"text": f"passed over a broken checkpoint: {fault}"})
    if state is not None:
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.module.load_state_dict(state["ema"])
            ema.n_averaged.fill_(state["step"])
        step, best, trained_seconds = state["step"], state["best"], state["seconds"]
        torch.set_rng_state(state["rng"])
    model: nn.Module = network
    if world_size > 1:
        model = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    def snapshot() -> checkpoint.State:
        return {
            "config": asdict(config),
            "data": asdict(data),
            "model": network.state_dict(),
            "ema": ema.module.state_dict() if ema is not None else None,
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": step,
            "best": best,
            "seconds": trained_seconds + time.perf_counter() - started,
            "mlflow_run_id": mlflow_run_id,
        }

    def validate() -> dict[str, Any]:
        metrics, panel = evaluate(
            ema.module if ema is not None else network, loss_of, data, validation_images(), device, config.run.panels
        )
        if rank == 0:
            observe("validation", step, metrics)
            observe("panel", step, {"images": panel})
        return metrics

    metrics: dict[str, Any] | None = None
    window: list[tuple[Tensor, ...]] = []
    keys: list[list[str]] = []
    images, busy, clock = 0, 0.0, time.perf_counter()
    total_images, total_busy = 0, 0.0
    batches = on_device(train_batches(step), device)
    model.train()
    while step < optim.steps:
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

        due = [step % every == 0 or step == optim.steps for every in
               (config.run.log_every, config.run.validate_every, config.run.checkpoint_every)]  # fmt: skip
        if any(due):
            # one wait for the device a window
            losses = torch.stack([torch.stack(entry[:3]) for entry in window]).double().cpu()
            stop_if_not_finite(losses[:, 0], step, keys, world_size)
            counts = torch.stack([entry[3] for entry in window]).sum(0)
            if world_size > 1:
                dist.all_reduce(counts)
            busy += time.perf_counter() - clock
            loss, bce, dice_loss = losses.mean(0).tolist()
            tp, fp, fn = counts.tolist()
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
            if due[1]:
                metrics = validate()
                if best is None or not metrics["iou"] <= best["iou"]:
                    best = metrics | {"step": step}
                    if rank == 0:
                        inference_state = snapshot() | {"optimizer": None}
                        checkpoint.save(inference_state, run / checkpoint.FOLDER / checkpoint.BEST)
                model.train()
            if due[2] and rank == 0:
                checkpoint.save(snapshot(), checkpoint.step_path(run, step))
                checkpoint.prune(run)
            clock = time.perf_counter()

    if best is None:
        best = validate() | {"step": step}
    return {
        "val": best,
        "parameters": sum(p.numel() for p in network.parameters()),
        "conv_weights": conv_weights(
            data.in_channels, data.num_classes, config.model.base_channels, config.model.levels, config.model.encoder
        ),
        "steps": step,
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


def stop_if_not_finite(losses: Tensor, step: int, keys: list[list[str]], world_size: int) -> None:
    """Raises NonFiniteLoss for the first bad loss of a window that ends with `step`; every rank sees the same losses."""
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if not bad:
        return
    batch_keys = keys[bad[0]]
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, batch_keys)
        batch_keys = [key for part in gathered for key in part]
    raise NonFiniteLoss(
        f"the loss of step {step - len(losses) + bad[0] + 1} is {losses[bad[0]].item()}; its samples: "
        f"{', '.join(batch_keys)}. The last checkpoint is from before it. Lower optim.learning_rate or look at these samples."
    )


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    loss_of: BCEDiceLoss,
    data: DataInfo,
    images: Iterable[Batch],
    device: torch.device,
    panels: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Tensor | str]]]:
    """Measures the network on whole images and returns the metrics (over all ranks) and this rank's first `panels` images.

    "loss" and "soft_dice" are of the whole split, from sums over it (eq. 5). "images" is the number of images.
    """
    network.eval()
    metrics = SegmentationMetrics(data.num_classes, data.ignore_index, device)
    sums = torch.zeros(2 + 3 * data.num_classes, dtype=torch.float64, device=device)
    panel: list[dict[str, Tensor | str]] = []
    count = torch.zeros((), device=device)
    for batch in images:
        image = normalize(*(batch[name].to(device) for name in ("image", "mean", "std")))
        mask = batch["mask"].to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = predict_logits(network, image.contiguous(memory_format=torch.channels_last)).float()
        labels = to_labels(logits)
        sums += loss_of.sums(logits, mask).double()
        metrics.update(labels[0], mask[0])
        count += 1
        if len(panel) < panels:
            shown = {name: batch[name][0] for name in ("image", "mask", "key")}
            panel.append(shown | {"labels": labels[0].cpu()})
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(count)
    if count == 0:
        raise ValueError("the validation split is empty")
    parts = loss_of.from_sums(sums)
    result = metrics.compute()
    return result | {"loss": parts.loss.item(), "soft_dice": 1 - parts.dice.item(), "images": int(count)}, panel
