"""One cell of the comparison: trains a network on a category, chooses on validation, and reads the test split once.

It knows neither Ray nor MLflow. On a GPU a step's forward and backward pass are one CUDA graph where the network allows it:
starting their operations one by one takes longer than doing them.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deepskip.config import OptimConfig
from deepskip.loss import BCEDiceLoss
from deepskip.network import HEAD_STD, PRIOR_LOGIT, DeepSkipUNet
from deepskip.networks import training_loss
from deepskip.optimizer import build_optimizer, learning_rate, set_learning_rate
from jobs.comparison import scores
from jobs.comparison.rows import Row, build, in_category
from jobs.comparison.samples import IGNORE_INDEX, Category, batch, draw_plan

CLIP_NORM = 1.0
WARM_UP_SHARE = 0.05
# points of a training curve between validations
CURVE_POINTS = 4
# steps before a graph is recorded: cuDNN chooses, Triton compiles, buffers are made
WARM_UPS = 3


@dataclass(frozen=True)
class Cell:
    """A cell's place in the grid and its budget."""

    category: str
    network: str
    seed: int
    steps: int
    batch_size: int
    validations: int
    bf16: bool = False
    """convolutions in bfloat16, as autocast does it; weights and loss are fp32 all the same"""


class NonFinite(RuntimeError):
    """The loss, or what was predicted, was nan or infinite."""


class Supervised(nn.Module):
    """DeepSkipUNet with heads on the decoder levels below the first, for the loss alone."""

    def __init__(self, network: DeepSkipUNet) -> None:
        super().__init__()
        self.network = network
        lower = [nn.Conv2d(network.head.in_channels * 2**u, 1, 1) for u in range(1, network.levels - 1)]
        for head in lower:
            nn.init.normal_(head.weight, std=HEAD_STD)
            assert head.bias is not None
            nn.init.constant_(head.bias, PRIOR_LOGIT)
        # by this name the optimizer knows them
        self.head = nn.ModuleList([network.head, *lower])

    def forward(self, x: Tensor) -> Tensor:
        """Gives logits (N, 1, H, W); in training more, channel by channel those of the levels from the lowest up."""
        if not self.training:
            return self.network(x)
        maps: list[Tensor] = []
        # not for good: a copy's hooks would still fill this one's list
        hooks = [
            self.network.decoder[u].register_forward_hook(lambda module, inputs, output: maps.append(output))
            for u in range(1, self.network.levels - 1)
        ]
        logits = self.network(x)
        for hook in hooks:
            hook.remove()
        lower = [head(y) for head, y in zip(reversed(self.head[1:]), maps, strict=True)]
        enlarged = [F.interpolate(y.float(), logits.shape[2:], mode="bilinear", align_corners=False) for y in lower]
        return torch.cat([logits.float(), *enlarged], 1)


class Objective:
    """A row's loss of images and masks, with what the training curve shows."""

    def __init__(self, row: Row, network: nn.Module, device: torch.device, bf16: bool) -> None:
        self.row, self.network, self.device, self.bf16 = row, network, device, bf16
        self.criterion = BCEDiceLoss(row.alpha, row.beta, ignore_index=IGNORE_INDEX)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the loss, and (5,): loss, soft Dice, true positives, false positives, false negatives; nothing waits."""
        # a cache of cast weights would outlive a graph's recording
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            if self.row.loss == "own":
                loss = training_loss(self.network, self.criterion, image, mask.long())
                return loss, torch.cat([loss.detach()[None], loss.new_full((4,), math.nan)])
            logits = self.network(image)
        logits = logits.float()
        loss, dice = self.loss(logits[:, :1], mask)
        for i in range(1, logits.shape[1]):
            # each level down counts half of the one above
            weight = self.row.deep_supervision / 2 ** (logits.shape[1] - 1 - i)
            loss = loss + weight * self.loss(logits[:, i : i + 1], mask)[0]
        guess, truth, counted = logits[:, 0] > 0, mask == 1, mask != IGNORE_INDEX
        overlap = [(a & b & counted).sum() for a, b in ((guess, truth), (guess, ~truth), (~guess, truth))]
        return loss, torch.stack([loss.detach().float(), dice.detach().float(), *(n.float() for n in overlap)])

    def loss(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the loss of logits (N, 1, S, S), and the soft Dice."""
        parts = self.criterion.parts(logits.contiguous(), mask)
        # at alpha 0.5 both sides of the cross-entropy are halved
        return (2 * parts.bce if self.row.loss == "cross_entropy" else parts.loss), 1 - parts.dice


class Step:
    """Forward and backward pass of a batch: leaves the gradients, and gives what Objective gives beside the loss."""

    def __init__(self, objective: Objective, image: Tensor, mask: Tensor) -> None:
        self.objective = objective
        self.graph: torch.cuda.CUDAGraph | None = None
        if image.is_cuda and objective.row.loss != "own":
            try:
                self.record(image, mask)
            except RuntimeError as error:
                if "out of memory" in str(error):
                    raise
                self.graph = None
                warnings.warn(f"{objective.row.label} goes without a CUDA graph: {str(error)[:300]}", stacklevel=2)

    def record(self, image: Tensor, mask: Tensor) -> None:
        """Records the graph; weights and running statistics are as before after it."""
        network = self.objective.network
        before = {name: value.clone() for name, value in network.state_dict().items()}
        self.image, self.mask = image.clone(), mask.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                network.zero_grad(set_to_none=True)
                self.objective(self.image, self.mask)[0].backward()
        torch.cuda.current_stream().wait_stream(side)
        # gradients are made anew inside the graph, and every replay writes them
        network.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # other threads' calls are none of the graph's business
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss, self.shown = self.objective(self.image, self.mask)
            loss.backward()
        self.graph = graph
        with torch.no_grad():
            for name, value in network.state_dict().items():
                value.copy_(before[name])

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Runs the step."""
        if self.graph is None:
            self.objective.network.zero_grad(set_to_none=True)
            loss, shown = self.objective(image, mask)
            loss.backward()
            return shown
        self.image.copy_(image)
        self.mask.copy_(mask)
        self.graph.replay()
        return self.shown.clone()


def prepare(row: Row, category: Category, cell: Cell) -> tuple[nn.Module, torch.optim.Optimizer, OptimConfig]:
    """Builds a cell's network, on the category's device, and its optimizer."""
    device = category.splits["train"].images.device
    network = build(row, category.bands, cell.seed)
    if row.deep_supervision:
        assert isinstance(network, DeepSkipUNet)
        network = Supervised(network)
    # not .to(memory_format=...), which some versions refuse a network of 2-d and 3-d convolutions
    network = convert_conv2d_weight_memory_format(network.to(device), torch.channels_last)
    optim = OptimConfig(
        optimizer=row.optimizer,
        steps=cell.steps,
        global_batch_size=cell.batch_size,
        learning_rate=row.learning_rate,
        momentum=row.momentum,
        warmup_steps=math.ceil(cell.steps * WARM_UP_SHARE),
        weight_decay=row.weight_decay,
        clip_norm=CLIP_NORM,
        ema_decay=row.ema_decay,
    )
    return network, build_optimizer(optim, network), optim


@dataclass
class Trained:
    """A network with the weights that validation chose, and what was seen while it trained."""

    network: nn.Module
    best_step: int
    curves: dict[str, list[dict[str, Any]]]


def train(
    row: Row, category: Category, cell: Cell, observe: Callable[[int, float], None] = lambda step, iou: None
) -> Trained:
    """Trains a cell's network on train and chooses its weights on validation; the test split is not read.

    observe: called after each validation with the step and the best IoU so far. Raises NonFinite.
    """
    data, validation = category.splits["train"], category.splits["val"]
    network, optimizer, optim = prepare(row, category, cell)
    device = data.images.device
    ema = (
        AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(row.ema_decay), use_buffers=True)
        if row.ema_decay
        else None
    )
    judged = network if ema is None else ema.module
    plan = draw_plan(data, cell.steps, cell.batch_size, cell.seed, row.foreground_crops, row.copy_paste)
    # dropout and Mask R-CNN's sampling
    torch.manual_seed(cell.seed)
    network.train()
    step_of = Step(Objective(row, network, device, cell.bf16), *batch(data, plan, 0, row.copy_paste > 0))
    parameters = list(network.parameters())

    every = max(1, cell.steps // cell.validations)
    log_every = max(1, every // CURVE_POINTS)
    curves: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    window: list[Tensor] = []
    best: dict[str, Any] = {"iou": -1.0}
    for step in range(1, cell.steps + 1):
        set_learning_rate(optimizer, learning_rate(optim, step - 1))
        window.append(step_of(*batch(data, plan, step - 1, row.copy_paste > 0)))
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        if ema is not None:
            ema.update_parameters(network)
        if step % log_every == 0 or step == cell.steps:
            curves["train"].append({"step": step} | shown(window))
            if not math.isfinite(curves["train"][-1]["loss"]):
                raise NonFinite(f"the loss is {curves['train'][-1]['loss']} by step {step}; lower the learning rate")
            window.clear()
        if step % every == 0 or step == cell.steps:
            probability, sums = scores.probabilities(judged, validation, cell.batch_size, bf16=cell.bf16)
            if not torch.isfinite(probability).all():
                raise NonFinite(f"predictions are nan at step {step}; lower the learning rate")
            _, iou = scores.choose_threshold(probability, validation.masks, row.threshold)
            network.train()
            # of equal ones the later
            if iou >= best["iou"]:
                state = {name: value.clone() for name, value in judged.state_dict().items()}
                best = {"iou": iou, "step": step, "state": state}
            curves["validation"].append({"step": step, "iou": iou} | loss_of_sums(row, sums))
            observe(step, best["iou"])
    judged.load_state_dict(best["state"])
    return Trained(judged, best["step"], curves)


def run_cell(
    row: Row, category: Category, cell: Cell, with_panel: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains and tests; gives the cell's record, without its place's hardware and command, and its panel's arrays."""
    started = time.perf_counter()
    row = in_category(row, cell.category)
    trained = train(row, category, cell)
    validation, test = category.splits["val"], category.splits["test"]
    probability, _ = scores.probabilities(trained.network, validation, cell.batch_size, row.test_flips, cell.bf16)
    threshold, _ = scores.choose_threshold(probability, validation.masks, row.threshold)
    record: dict[str, Any] = {
        "category": cell.category,
        "network": cell.network,
        "seed": cell.seed,
        "error": None,
        "steps": cell.steps,
        "batch_size": cell.batch_size,
        "validations": cell.validations,
        "image_size": category.size,
        "precision": "bf16" if cell.bf16 else "fp32",
        "train_samples_seen": cell.steps * cell.batch_size,
        "parameters": sum(p.numel() for p in tested(trained.network).parameters()),
        "best_step": trained.best_step,
        "threshold": threshold,
        "thresholds": [scores.threshold_of(1), scores.threshold_of(scores.BINS - 1)],
        "curves": trained.curves,
        "validation": scores.metrics_of(scores.predict(probability, threshold), validation.masks),
    }
    # the test split, once
    probability, _ = scores.probabilities(trained.network, test, cell.batch_size, row.test_flips, cell.bf16)
    prediction = scores.predict(probability, threshold)
    record["test"] = scores.metrics_of(prediction, test.masks)
    record["by_size"] = scores.by_size(prediction, test.masks)
    record["images"] = scores.image_scores(prediction, test)
    record["seconds"] = round(time.perf_counter() - started, 2)
    return record, scores.panel(prediction, test, record["images"]) if with_panel else {}


def tested(network: nn.Module) -> nn.Module:
    """Gives the part of a network that is there after training."""
    return network.network if isinstance(network, Supervised) else network


def shown(window: list[Tensor]) -> dict[str, float | None]:
    """Averages a window of steps for the training curve; None for what a network does not give while it trains."""
    loss, dice, tp, fp, fn = torch.stack(window).double().cpu().T
    if torch.isnan(tp).all():
        return {"loss": loss.mean().item(), "dice": None, "iou": None}
    iou = tp.sum() / (tp + fp + fn).sum().clamp(min=1)
    return {"loss": loss.mean().item(), "dice": dice.mean().item(), "iou": iou.item()}


def loss_of_sums(row: Row, sums: Tensor) -> dict[str, float]:
    """Makes the validation curve's loss and soft Dice of a split's sums; Mask R-CNN's is the cross-entropy of its masks."""
    parts = BCEDiceLoss(row.alpha, row.beta).from_sums(sums.float())
    loss = parts.loss if row.loss == "bce_dice" else 2 * parts.bce
    return {"loss": loss.item(), "dice": 1 - parts.dice.item()}
