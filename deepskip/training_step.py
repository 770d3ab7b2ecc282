"""One training step: augment, forward, loss, backward, clip, optimizer, moving average; and the state that a checkpoint holds.

Everything that trains runs this one: the trainer, the benchmarks, every comparison.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.swa_utils import AveragedModel

from deepskip import augment, networks
from deepskip.config import Config
from deepskip.inference import normalize, to_labels
from deepskip.loss import BCEDiceLoss, LossParts
from deepskip.network import DeepSkipUNet
from deepskip.optimizer import averaging_decay, build_optimizer, learning_rate, set_learning_rate

# image (N, bands, H, W) raw, mask (N, H, W) uint8, mean and std (N, bands), weight (N,); epoch, sample and key are lists of N;
# draws and noise_seed are those of augment.loader_entries, or left out
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


class StepResult(NamedTuple):
    """What a step leaves beside its weights, all on the device: loss, BCE and Dice loss (scalars), and overlap (3,).

    Of a network that brings its own loss there are no logits while it trains: all but the loss is 0.
    """

    loss: Tensor
    bce: Tensor
    dice: Tensor
    overlap: Tensor


class OwnLoss(nn.Module):
    """A network that brings its own loss, as what a process group wraps: forward gives the loss of this rank's samples."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        return self.network.training_loss(image, mask, weight)  # type: ignore[operator]


class TrainingStep:
    """A network, its loss, optimizer and moving average, on their way through a training.

    The weights are drawn from config.run.seed, so every rank has the same. Call `distribute` before the first step.

    Attributes:
        network: in channels-last memory, on the device.
        averaged: its moving average, or the network itself where config.optim.ema_decay is 0.
        criterion: the loss.
        step: steps done.
    """

    def __init__(self, config: Config, data: DataInfo, device: torch.device, world_size: int = 1) -> None:
        self.config, self.data, self.device, self.world_size = config, data, device, world_size
        torch.manual_seed(config.run.seed)
        network = networks.build(asdict(config.model), data.in_channels, data.num_classes)
        # 2-D ones alone: others have no such format
        self.network: nn.Module = convert_conv2d_weight_memory_format(network.to(device), torch.channels_last)
        self.own_loss = networks.brings_loss(network)
        self.optimizer = build_optimizer(config.optim, self.network)
        self.ema: AveragedModel | None = None
        if config.optim.ema_decay:
            self.ema = AveragedModel(self.network, use_buffers=True)
        # walked through once, not with every step
        self._parameters = list(self.network.parameters())
        self._averages = _pairs(self.averaged, self.network)
        loss = config.loss
        self.criterion = BCEDiceLoss(loss.alpha, loss.beta, loss.class_weights, data.ignore_index, loss.eps)
        self.step = 0
        self._model: nn.Module = OwnLoss(self.network) if self.own_loss else self.network

    @property
    def averaged(self) -> nn.Module:
        """The network that is validated and kept."""
        return self.network if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, apart from what the loop around the steps knows.

        bfloat16 needs no gradient scaler; the learning rate and the augmentation are functions of the step.
        """
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "config": asdict(self.config), "data": asdict(self.data), "model": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(), "optimizer": self.optimizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda}, "step": self.step,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def distribute(self) -> None:
        """Compile the network where the config asks for it, and join the process group where there are several ranks."""
        if self.config.run.compile != "none":
            # in place: the state keeps its names, and the moving average stays as it is
            self.network.compile(mode=self.config.run.compile)
        if self.world_size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            # other networks may have weights that a batch does not reach
            reached = isinstance(self.network, DeepSkipUNet)
            self._model = DistributedDataParallel(self._model, device_ids=devices, find_unused_parameters=not reached)

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalise and augment a batch on the device: image (N, bands, H, W), channels last, and labels (N, H, W)."""
        image, mask = normalize(batch["image"], batch["mean"], batch["std"]), batch["mask"]
        settings = self.config.augment
        drawn = batch
        if "draws" not in batch:
            # a loader draws them beforehand
            drawn = augment.loader_entries(
                settings, self.config.run.seed, self.data.in_channels, batch["epoch"], batch["sample"]
            )
        draws = augment.unpack(drawn["draws"].to(self.device, non_blocking=True), drawn["noise_seed"])
        image, mask = augment.augment(settings, draws, image, mask, self.data.ignore_index)
        return image.contiguous(memory_format=torch.channels_last), mask

    def forward(self, image: Tensor) -> Tensor:
        """Run the network, in bf16 autocast on a GPU; logits (N, V, H, W)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self._model(image)

    def backward(self, parts: LossParts) -> None:
        """Leave the gradient of the global batch in the weights: the loss is its sum over ranks, where DDP averages."""
        (parts.loss * self.world_size).backward()

    def clip(self) -> None:
        """Bound the gradient's norm."""
        if self.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, self.config.optim.clip_norm)

    def update(self) -> None:
        """Move the weights by the learning rate of this step."""
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, self.step))
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def average(self) -> None:
        """Move the average of the weights, which begins as those of the first step, by the decay of this step.

        Counters are copied as they are. torch's own update looks at a counter on the device in every step, and waits for it.
        """
        if self.ema is None:
            return
        (averages, weights), (counters, counted) = self._averages
        if self.step == 0:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - averaging_decay(self.config.optim, self.step))
        if counters:
            torch._foreach_copy_(counters, counted)

    def __call__(self, batch: Batch) -> StepResult:
        """Train on a batch that lies on the device; in a process group every rank calls with its share."""
        image, mask = self.prepare(batch)
        if not isinstance(self.network, DeepSkipUNet):
            # what a network draws (dropout, samples of boxes) is a function of the step, as all else is: resumed it is the same
            torch.manual_seed(self.config.run.seed + self.step)
        result = self.gradients_of_own_loss(image, mask, batch["weight"]) if self.own_loss else None
        if result is None:
            logits = self.forward(image)
            parts = self.criterion.parts(logits, mask, batch["weight"])
            self.backward(parts)
            overlap = overlap_counts(logits.detach(), mask, batch["weight"], self.data.ignore_index)
            result = StepResult(parts.loss.detach(), parts.bce.detach(), parts.dice.detach(), overlap)
        self.clip()
        self.update()
        self.average()
        self.step += 1
        return result

    def gradients_of_own_loss(self, image: Tensor, mask: Tensor, weight: Tensor) -> StepResult:
        """Leave the gradient of the network's own loss in the weights; over several ranks it is the mean of theirs."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            # torch's own losses take labels of 64 bits
            loss = self._model(image, mask.long(), weight)
        loss.backward()
        mean = loss.detach().float()
        if self.world_size > 1:
            mean = mean / self.world_size
            dist.all_reduce(mean)
        zero = torch.zeros_like(mean)
        return StepResult(mean, zero, zero, torch.zeros(3, dtype=torch.long, device=self.device))


def _pairs(averaged: nn.Module, network: nn.Module) -> tuple[tuple[list[Tensor], list[Tensor]], ...]:
    # averages and weights, then counters, each beside its own
    ours, theirs = ([*one.parameters(), *one.buffers()] for one in (averaged, network))
    both = list(zip(ours, theirs, strict=True))
    floats = [pair for pair in both if pair[1].is_floating_point()]
    others = [pair for pair in both if not pair[1].is_floating_point()]
    return tuple(
        ([one.detach() for one, _ in some], [other.detach() for _, other in some]) for some in (floats, others)
    )


def overlap_counts(logits: Tensor, mask: Tensor, weight: Tensor, ignore_index: int) -> Tensor:
    """Count true positive, false positive and false negative foreground pixels (3,), without waiting for the device."""
    # of one class a bool, which compares with labels as 0 and 1 do
    labels = to_labels(logits, 0)
    counted = (mask != ignore_index) & (weight != 0)[:, None, None]
    right, guessed, true = labels == mask, labels != 0, mask != 0
    return torch.stack([(a & b & counted).sum() for a, b in ((right, true), (~right, guessed), (~right, true))])
