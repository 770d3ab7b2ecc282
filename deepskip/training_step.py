"""Run one training step: augment, forward, loss, backward, clip, optimizer, moving average.

The trainer, the benchmarks and every comparison run this step. A checkpoint holds its state.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.swa_utils import AveragedModel

from deepskip import augment, initial_weights, micro_batches, networks
from deepskip.checkpoint import DataState, StepState
from deepskip.config import Config, changed_settings, part_size
from deepskip.device import to_device
from deepskip.inference import normalize, to_labels
from deepskip.instance_batch_norm import InstanceBatchNorm
from deepskip.loss import BCEDiceLoss, LossParts, total_over_ranks
from deepskip.network import DeepSkipUNet
from deepskip.optimizer import averaging_decay, build_optimizer, learning_rate, set_learning_rate
from deepskip.precision import NAMES, autocast
from deepskip.sync_batch_norm import SyncBatchNorm2d


class OtherSettings(RuntimeError):
    """A checkpoint is of a training with other settings; the message names them."""


class Batch(TypedDict):
    """N samples, as a loader makes them; other keys are ignored.

    Attributes:
        image: raw images (N, bands, H, W), uint8 or fp32.
        mask: labels (N, H, W) uint8.
        mean: what is subtracted from each band of each image, (N, bands) fp32.
        std: what each band is then divided by, (N, bands) fp32.
        weight: weights of the samples, (N,) fp32; 0 for repeats.
        padded: whether any weight is 0; without it, some may be.
        epoch: epoch of each sample, N numbers.
        sample: number of each sample, N numbers.
        key: key of each sample, N names.
        draws: those of `augment.LoaderEntries`, (N, 7 + bands) fp32; without them the step draws.
        noise_seed: those of `augment.LoaderEntries`, N integers; there if `draws` are.
    """

    image: Tensor
    mask: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor
    padded: NotRequired[bool]
    epoch: list[int]
    sample: list[int]
    key: list[str]
    draws: NotRequired[Tensor]
    noise_seed: NotRequired[list[int]]


@dataclass(frozen=True)
class DataInfo:
    """What the network must know of its data; stored in every checkpoint.

    Attributes:
        in_channels: bands.
        num_classes: 1 for binary, else exclusive classes with background 0.
        ignore_index: label of pixels that are not counted.
        mean: mean of each band over the training set.
        std: standard deviation of each band over the training set.
        preparation: how the images were prepared when they were packed: "bands", "longest_side", "nodata".
        classes: names of the classes 1, 2, ...; [] for a binary task, or if they are not known.
        splits: identity of each split, as `deepskip.identity` compares it; empty if it is not known.
    """

    in_channels: int
    num_classes: int
    ignore_index: int
    mean: list[float]
    std: list[float]
    preparation: dict[str, Any]
    splits: dict[str, dict[str, str | int]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)


class StepResult(NamedTuple):
    """The result of a step besides its weights, all on the device.

    A network with its own loss has no logits while it trains: all but the loss is 0.

    Attributes:
        loss: loss of the global batch, a scalar.
        bce: BCE of the global batch, a scalar.
        dice: Dice loss of the global batch, a scalar.
        overlap: true positive, false positive and false negative foreground pixels of this rank, (3,) int64.
    """

    loss: Tensor
    bce: Tensor
    dice: Tensor
    overlap: Tensor


class OwnLoss(nn.Module):
    """A module around a network with its own loss, for the process group to wrap.

    Args:
        network: network that has a method `training_loss`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Compute the loss of this rank's samples, a scalar.

        Args:
            image: images (N, bands, H, W).
            mask: labels (N, H, W).
            weight: weights of the samples, (N,).
        """
        loss: Tensor = self.network.training_loss(image, mask, weight)  # type: ignore[operator]
        return loss


class TrainingStep:
    """A network, its loss, optimizer and moving average during a training.

    The weights are drawn from config.run.seed, so every rank has the same. Call `distribute` before the first step.

    Args:
        config: settings of the training.
        data: description of the training data.
        device: device on which to train.
        world_size: number of ranks.

    Raises:
        ValueError: if optim.micro_batch is set and the network has its own loss.

    Attributes:
        precision: torch.float32, or torch.bfloat16 for autocast.
        network: the network, in channels-last memory on the device.
        averaged: its moving average, or the network itself if config.optim.ema_decay is 0.
        criterion: the loss.
        part_size: largest number of samples that pass through the network together, or None for all of the rank's.
        step: number of steps done.
        votes: number of ranks that were asked to stop before the last step, a scalar on the device.
    """

    def __init__(self, config: Config, data: DataInfo, device: torch.device, world_size: int = 1) -> None:
        self.config, self.data, self.device, self.world_size = config, data, device, world_size
        self.precision = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(config.run.seed)
        network = networks.build(asdict(config.model), data.in_channels, data.num_classes)
        # Only 2-D convolutions: others have no such memory format.
        self.network: nn.Module = convert_conv2d_weight_memory_format(network.to(device), torch.channels_last)
        self.own_loss = networks.brings_loss(network)
        self.part_size = part_size(config)
        if self.own_loss and self.part_size is not None:
            raise ValueError(
                f"optim.micro_batch is {config.optim.micro_batch}; {config.model.network} has its own loss, which is not a "
                "function of sums, so its batches cannot be computed in parts: set optim.micro_batch to null"
            )
        self.optimizer = build_optimizer(config.optim, self.network)
        self.ema: AveragedModel | None = None
        if config.optim.ema_decay:
            self.ema = AveragedModel(self.network, use_buffers=True)
        # walked through once, not with every step
        self._parameters = list(self.network.parameters())
        self._averages = _pairs(self.averaged, self.network)
        self._synchronised = [module for module in self.network.modules() if isinstance(module, SyncBatchNorm2d)]
        loss = config.loss
        self.criterion = BCEDiceLoss(
            loss.alpha, loss.beta, loss.class_weights, data.ignore_index, loss.eps, loss.overlap
        )
        self.step = 0
        self.votes = torch.zeros((), device=device)
        self._model: nn.Module = OwnLoss(self.network) if self.own_loss else self.network

    @property
    def averaged(self) -> nn.Module:
        """The network that is validated and kept."""
        return self.network if self.ema is None else self.ema.module

    def state_dict(self) -> StepState:
        """Return the state that a resumed training needs, except what the loop around the steps adds.

        bfloat16 needs no gradient scaler. The learning rate and the augmentation are functions of the step.
        """
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        config = asdict(self.config)
        config["run"]["precision"] = NAMES[self.precision]
        return {
            "config": config, "data": cast(DataState, asdict(self.data)), "model": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(), "optimizer": self.optimizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda}, "step": self.step,
        }  # fmt: skip

    def load_state_dict(self, state: StepState) -> None:
        """Load the state that `state_dict` returned.

        Raises:
            OtherSettings: if it is of a training with other settings.
        """
        if changed := changed_settings(state["config"], self.config):
            raise OtherSettings(
                f"the checkpoint of step {state['step']} is of a training with other settings ({', '.join(changed)}); "
                "train with those, or in another folder"
            )
        # Only the best checkpoint is without, and no training resumes from that.
        assert state["optimizer"] is not None
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self.ema is not None:
            assert state["ema"] is not None
            self.ema.module.load_state_dict(state["ema"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def start_from(self, weights: str) -> list[str]:
        """Take over the weights of another model before the first step, and return the names of those that do not fit.

        Args:
            weights: the model, as `initial_weights.fitting` takes it.

        Raises:
            initial_weights.OtherNetwork: if it is the model of another network.
            checkpoint.CheckpointError, OSError: if it cannot be read.
        """
        found, left = initial_weights.fitting(self.network, weights, self.data.in_channels, self.data.num_classes)
        self.network.load_state_dict(found, strict=False)
        if self.ema is not None:
            self.ema.module.load_state_dict(self.network.state_dict())
        return left

    def distribute(self) -> None:
        """Compile the network if the config says so, and wrap it for the process group if there are several ranks."""
        if self.config.run.compile != "none":
            # Compile in place: the state keeps its names, and the moving average is not affected.
            self.network.compile(mode=self.config.run.compile)
        if self.world_size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            # Other networks may have weights that get no gradient from a batch.
            reached = isinstance(self.network, DeepSkipUNet)
            self._model = DistributedDataParallel(
                self._model, device_ids=devices, find_unused_parameters=not reached, gradient_as_bucket_view=True,
                broadcast_buffers=not has_own_statistics(self.network),
            )  # fmt: skip

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalise and augment a batch.

        Args:
            batch: batch with its tensors on the device.

        Returns:
            Images (N, bands, H, W) in channels-last memory, and labels (N, H, W) of the batch's type.
        """
        image, mask = normalize(batch["image"], batch["mean"], batch["std"]), batch["mask"]
        settings = self.config.augment
        drawn: Batch | augment.LoaderEntries = batch
        if "draws" not in batch:
            # a loader draws them beforehand
            drawn = augment.loader_entries(
                settings, self.config.run.seed, self.data.in_channels, batch["epoch"], batch["sample"]
            )
        draws = augment.unpack(to_device(drawn["draws"], self.device), drawn["noise_seed"])
        image, mask = augment.augment(settings, draws, image, mask, self.data.ignore_index)
        return image.contiguous(memory_format=torch.channels_last), mask

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits (N, V, H, W).

        Args:
            image: normalised images (N, bands, H, W).
        """
        with autocast(self.device, self.precision):
            logits: Tensor = self._model(image)
        return logits

    def backward(self, parts: LossParts) -> None:
        """Compute the gradient of the global batch and accumulate it in the weights.

        The gradient is the sum over ranks, but DDP averages, so the loss is multiplied by the number of ranks.

        Args:
            parts: the loss and its parts.
        """
        (parts.loss * self.world_size).backward()

    def clip(self) -> None:
        """Clip the gradient's norm to config.optim.clip_norm."""
        if self.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, self.config.optim.clip_norm)

    def update(self) -> None:
        """Update the weights with the learning rate of this step, and clear the gradient."""
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, self.step))
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def average(self) -> None:
        """Update the moving average of the weights, which begins as those of the first step, with the decay of this step.

        Counters are copied. The update of torch reads a counter on the device in every step, and waits for it.
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

    def __call__(self, batch: Batch, stop_asked: bool = False) -> StepResult:
        """Train on a batch; in a process group every rank calls with its share.

        Args:
            batch: batch with its tensors on the device.
            stop_asked: whether this rank was asked to stop; `votes` is then how many ranks were.
        """
        # Filled on the device: a copy to it might wait.
        votes = torch.full((1,), float(stop_asked), device=self.device)
        self.votes = votes[0]
        image, mask = self.prepare(batch)
        for norm in self._synchronised:
            # Without repeats, a lone rank keeps the fast forms of batch norm.
            norm.weights = batch["weight"] if self.world_size > 1 or batch.get("padded", True) else None
        self.seed()
        result = self.gradients_of_own_loss(image, mask, batch["weight"], votes) if self.own_loss else None
        if result is None:
            result = self.gradients(image, mask, batch["weight"], votes)
        self.clip()
        self.update()
        self.average()
        self.step += 1
        return result

    def gradients(self, image: Tensor, mask: Tensor, weight: Tensor, votes: Tensor) -> StepResult:
        """Compute the gradient of the global batch, a part at a time if this rank's share has more samples than a part.

        Args:
            image: normalised images (N, bands, H, W).
            mask: labels (N, H, W).
            weight: weights of the samples, (N,).
            votes: added up over all ranks, in place, (1,).
        """
        if self.part_size is not None and len(image) > self.part_size:
            parts, overlap = micro_batches.gradients(self, image, mask, weight, votes)
        else:
            logits = self.forward(image)
            parts = self.criterion.parts(logits, mask, weight, carried=votes)
            self.backward(parts)
            overlap = self.overlap(logits, mask, weight)
        return StepResult(parts.loss.detach(), parts.bce.detach(), parts.dice.detach(), overlap)

    def overlap(self, logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        """Count this rank's foreground pixels (3,), as `overlap_counts` does."""
        return overlap_counts(logits.detach(), mask, weight, self.data.ignore_index)

    def seed(self) -> None:
        """Make a network's random numbers (dropout, sampled boxes) depend on the step alone: a resumed run draws the same."""
        if not isinstance(self.network, DeepSkipUNet):
            torch.manual_seed(self.config.run.seed + self.step)

    def without_reduction(self) -> AbstractContextManager[None]:
        """Return a context in which gradients are accumulated on this rank and not yet added up over all ranks."""
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()

    def gradients_of_own_loss(self, image: Tensor, mask: Tensor, weight: Tensor, votes: Tensor) -> StepResult:
        """Compute the gradient of the network's own loss; over several ranks it is the mean of the ranks' gradients.

        Args:
            image: normalised images (N, bands, H, W).
            mask: labels (N, H, W).
            weight: weights of the samples, (N,).
            votes: added up over all ranks, in place, (1,).

        Returns:
            The mean loss over the ranks; all else is 0.
        """
        with autocast(self.device, self.precision):
            # torch's own losses take labels of 64 bits
            loss = self._model(image, mask.long(), weight)
        loss.backward()
        mean = total_over_ranks(loss.detach().float()[None] / self.world_size, votes)[0]
        zero = torch.zeros_like(mean)
        return StepResult(mean, zero, zero, torch.zeros(3, dtype=torch.long, device=self.device))


def has_own_statistics(network: nn.Module) -> bool:
    """Return whether a network's only buffers are running statistics of norms, which no training step reads.

    Each rank may then keep its own: those of rank 0 are shared before a validation, and saved.

    Args:
        network: the network.
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, InstanceBatchNorm)
    return all(isinstance(module, norms) or not [*module.buffers(False)] for module in network.modules())


def _pairs(averaged: nn.Module, network: nn.Module) -> tuple[tuple[list[Tensor], list[Tensor]], ...]:
    # averages and weights, then counters, each with its counterpart
    ours, theirs = ([*one.parameters(), *one.buffers()] for one in (averaged, network))
    both = list(zip(ours, theirs, strict=True))
    floats = [pair for pair in both if pair[1].is_floating_point()]
    others = [pair for pair in both if not pair[1].is_floating_point()]
    return tuple(
        ([one.detach() for one, _ in some], [other.detach() for _, other in some]) for some in (floats, others)
    )


def overlap_counts(logits: Tensor, mask: Tensor, weight: Tensor, ignore_index: int) -> Tensor:
    """Count true positive, false positive and false negative foreground pixels, without waiting for the device.

    Args:
        logits: tensor (N, V, H, W).
        mask: labels (N, H, W).
        weight: weights of the samples, (N,); those of weight 0 are not counted.
        ignore_index: label of pixels that are not counted.

    Returns:
        The three counts, (3,) int64.
    """
    # For one class this is bool, which compares with labels as 0 and 1 do.
    labels = to_labels(logits, 0)
    counted = (mask != ignore_index) & (weight != 0)[:, None, None]
    right, guessed, true = labels == mask, labels != 0, mask != 0
    return torch.stack([(a & b & counted).sum() for a, b in ((right, true), (~right, guessed), (~right, true))])
