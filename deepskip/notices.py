"""Warnings of a training: of settings and data with which it runs, but hardly as it was meant."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepskip.config import LossConfig, without_effect
from deepskip.initial_weights import differences
from deepskip.networks import brings_loss
from deepskip.training_step import TrainingStep


def warner(observe: Callable[[str, int, dict[str, Any]], None], rank: int) -> Callable[[str], None]:
    """Return a function that passes a message to `observe` as a warning before the first step, on rank 0 alone."""
    return lambda text: observe("warning", 0, {"text": text}) if rank == 0 else None


def warn_at_start(training: TrainingStep, is_used_up: bool, warn: Callable[[str], None]) -> None:
    """Warn of settings without effect, of a batch that repeats samples, and of a patience that was used up before a resume.

    Args:
        training: training, with its weights and its step.
        is_used_up: whether run.patience ended the training before.
        warn: takes each message.
    """
    config, step = training.config, training.step
    for text in without_effect(config):
        warn(text)
    if brings_loss(training.network) and config.loss != LossConfig():
        warn(f"model.network is {config.model.network}, which has its own loss: the settings of loss change nothing")
    batch, samples = config.optim.global_batch_size, training.data.splits.get("train", {}).get("samples")
    if isinstance(samples, int) and batch > samples and not config.data.follow:
        warn(
            f"optim.global_batch_size is {batch}, but there are {samples} training samples: a step repeats some of them"
        )
    if step < (config.optim.steps or math.inf) and is_used_up:
        warn(
            f"{config.run.patience} validations without a better IoU (run.patience) ended this training at step {step}; to "
            "train on, set run.patience to 0 or to a larger number"
        )


def warn_of_weights(training: TrainingStep, left: Sequence[str], warn: Callable[[str], None]) -> None:
    """Warn if the weights that a training starts from lack some, or are of a model that was trained otherwise.

    Args:
        training: training that starts from run.weights.
        left: names of the tensors that do not fit.
        warn: takes each message.
    """
    config, data, weights = training.config, training.data, str(training.config.run.weights)
    if left:
        warn(f"{weights} has other bands or classes: {', '.join(left)} start from random values")
    for text in differences(weights, config, data.preparation.get("chosen"), data.classes):
        warn(text)


def warn_of_validation(metrics: Mapping[str, float], warn: Callable[[str], None]) -> None:
    """Warn if the first validation can rate no checkpoint.

    Args:
        metrics: metrics of the validation.
        warn: takes the message.
    """
    if math.isnan(metrics["iou"]):
        warn(
            "no pixel of the validation split is foreground, or all are ignored: IoU is undefined, and rates no checkpoint"
        )
