"""What a training prints: its progress line, its table of metrics, and the next steps."""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepskip.config import Config
from deepskip.jobs import runs

METRICS = {
    "iou": "IoU",
    "dice": "Dice",
    "pixel_accuracy": "pixel accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "object_recall": "object recall",
    "false_alarms_per_image": "false alarms per image",
}
# of binary tasks, with how they are printed; earlier versions did not compute them
TARGET_METRICS = {"niou": ("nIoU", ".4f"), "pd": ("Pd", ".4f"), "fa": ("Fa", ".2e")}
WIDTH = max(len(name) for name in METRICS.values())
# bounds of `disagreement`: an IoU below the first is near 0, one of the second or more is good
IOU_NEAR_0, IOU_GOOD = 0.1, 0.5


def steps_in_words(config: Config) -> str:
    """Return the length of a training."""
    steps = config.optim.steps
    return "until it is stopped" if steps is None else f"{steps} steps"


def progress_line(step: int, steps: int | None, values: dict[str, float]) -> str:
    """Return the progress line of a training.

    `deepskip submit` shows lines that begin with "step " in one place.

    Args:
        step: steps done.
        steps: steps of the whole training; None if it has no end.
        values: "loss", "images_per_second" and, if there is an end, "seconds_left"; "dice" too, unless the network has its own
            loss. Of a stream also "stream/iou", "stream/lag_seconds" and "stream/samples_behind", as far as they are known.
    """
    left, of = "", f"step {step}"
    if steps is not None:
        minutes, seconds = divmod(round(values["seconds_left"]), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"  {hours}:{minutes:02d}:{seconds:02d} left" if hours else f"  {minutes}:{seconds:02d} left"
        of = f"step {step}/{steps}"
    # a network with its own loss has no Dice while it trains
    dice = f"Dice {values['dice']:.3f}  " if "dice" in values else ""
    forms = {
        "stream/iou": "  IoU of new {:.3f}", "stream/lag_seconds": "  lag {:.1f} s", "stream/samples_behind": "  {:.0f} behind",
    }  # fmt: skip
    stream = "".join(form.format(values[name]) for name, form in forms.items() if name in values)
    return f"{of}  loss {values['loss']:.4f}  {dice}{values['images_per_second']:.1f} images/s{stream}{left}"


def print_table(summary: dict[str, Any]) -> None:
    """Print the metrics of a finished training.

    Args:
        summary: content of its summary.json.
    """
    values = summary["val"]
    early = f", stopped early after {summary['steps']}" if summary.get("stopped_early") else ""
    print(f"\n{summary['name']}, validation after {values.get('step', summary['steps'])} steps{early}")
    print_metrics(values)
    print(f"  {'parameters':<{WIDTH}}  {summary['parameters']:,} ({summary['conv_weights']:,} in convolutions)")
    # a training that was resumed at its last step did no steps
    speed = format(summary["images_per_second"], ".1f") if summary["images_per_second"] else "-"
    print(f"  {'images/s':<{WIDTH}}  {speed}")
    print(f"  {'seconds':<{WIDTH}}  {summary['seconds']:.0f}\n")


def print_metrics(values: dict[str, float | None]) -> None:
    """Print a line for each metric of METRICS, and what is known of TARGET_METRICS and of the IoU at the best threshold.

    Args:
        values: metrics by name; None and nan are undefined.
    """
    for key, name in METRICS.items():
        print(f"  {name:<{WIDTH}}  {number(values[key])}")
        if key == "iou" and (best := values.get("iou_best_threshold")) is not None and not math.isnan(best):
            print(f"  {'IoU, best threshold':<{WIDTH}}  {number(best)} at {values['best_threshold']:.2f}")
    for key, (name, form) in TARGET_METRICS.items():
        if key in values:
            print(f"  {name:<{WIDTH}}  {number(values[key], form)}")


def disagreement(step: int, training: dict[str, float], validation: dict[str, float]) -> str | None:
    """Return a warning that the validation's IoU at a threshold of 0.5 misleads, or None if it does not.

    It misleads if it is near 0 while the IoU is good at another threshold and in training.

    Args:
        step: step of the validation.
        training: the latest metrics of the training, as the trainer reports them.
        validation: metrics of the validation, as the trainer reports them.

    Returns:
        One line of text, or None.
    """
    trained, best = training.get("iou", 0.0), validation.get("iou_best_threshold", 0.0)
    # comparisons with nan are false, so nan gives no warning
    if not (validation["iou"] < IOU_NEAR_0 and best >= IOU_GOOD and trained >= IOU_GOOD):
        return None
    return (
        f"validation after step {step} has IoU {validation['iou']:.3f} at threshold 0.5, but {best:.3f} at "
        f"{validation['best_threshold']:.2f}, and training has {trained:.3f}: the network finds the objects, and "
        "its probabilities are too low or too high. Train longer, or predict with that --threshold"
    )


def number(value: float | None, form: str = ".4f") -> str:
    """Return a ratio as text.

    Args:
        value: the ratio. None and nan, such as the precision without any prediction, give "undefined".
        form: format specification.
    """
    return "undefined" if value is None or math.isnan(value) else format(value, form)


def print_next_steps(config: Config, run: runs.Run, uri: str | None, argv: list[str]) -> None:
    """Print how to look at a run in MLflow, resume or extend its training, and predict with its model.

    Args:
        config: settings of the training.
        run: the run.
        uri: tracking URI; None if the run is not tracked.
        argv: command-line arguments of the training.
    """
    python = shlex.quote(shown(Path(sys.executable)))
    command = shlex.quote(shown(Path(sys.executable).with_name("deepskip")))
    folder = shlex.quote(shown(run.folder))
    more = {"--run.name": run.name} | ({"--optim.steps": str(2 * config.optim.steps)} if config.optim.steps else {})
    again = shlex.join(with_options(argv, more))
    if uri is None:
        print("MLflow page:  none, the run is not tracked")
    elif uri.startswith("sqlite:"):
        print(f"MLflow page:  {python} -m mlflow server --backend-store-uri {shlex.quote(uri)} --port 5000")
    else:
        print(f"MLflow page:  {uri}")
    print(
        f"resume:       run the same command to resume an interrupted training; to train longer: {command} train {again}"
    )
    print(f"predict:      {command} predict --model {folder} --images DIR --out DIR")


def with_options(argv: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """Return command-line arguments in which some options have new values.

    Args:
        argv: arguments, in which an option is written as `--name value` or `--name=value`.
        options: new values by option; these options come last.
    """
    kept, words = [], iter(argv)
    for word in words:
        if word in options:
            next(words, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return [*kept, *(word for pair in options.items() for word in pair)]


def shown(path: Path) -> str:
    """Return a path relative to the current folder if it lies in it, else the path unchanged."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
