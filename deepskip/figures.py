"""Pictures of predictions and curves of trainings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

FOUND, MISSED, FALSE_ALARM = (0.1, 0.75, 0.3), (1.0, 0.75, 0.0), (0.95, 0.15, 0.15)
# shown one after another for the classes 1, 2, ...
CLASS_COLOURS = (
    (0.95, 0.15, 0.15),
    (0.1, 0.6, 0.95),
    (1.0, 0.75, 0.0),
    (0.1, 0.75, 0.3),
    (0.7, 0.3, 0.9),
    (0.0, 0.8, 0.8),
)


def to_rgb(image_HWC: np.ndarray) -> np.ndarray:
    """Makes a picture (H, W, 3), 0 to 1, of any number of bands: the first, middle and last, each stretched to its range.

    Three bands of 8 bits are taken as RGB and left as they are.
    """
    bands = image_HWC.shape[2]
    if bands == 3 and image_HWC.dtype == np.uint8:
        return image_HWC.astype(np.float32) / 255
    shown = image_HWC[..., [0, bands // 2, bands - 1]].astype(np.float32)
    low, high = np.percentile(shown, (1, 99), axis=(0, 1))
    return np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1)


def outline(mask_HW: np.ndarray) -> np.ndarray:
    """Gives the pixels (H, W) of a boolean mask that touch its outside by an edge; the image's border is no edge."""
    padded = np.pad(mask_HW, 1, mode="edge")
    inside = padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask_HW & ~inside


def overlay(image_HWC: np.ndarray, labels_HW: np.ndarray, opacity: float = 0.35) -> np.ndarray:
    """Lays labels over an image: each class tinted and outlined in a colour; (H, W, 3) uint8."""
    picture = to_rgb(image_HWC).copy()
    for label in np.unique(labels_HW):
        if label == 0:
            continue
        colour = np.array(CLASS_COLOURS[(int(label) - 1) % len(CLASS_COLOURS)])
        here = labels_HW == label
        picture[here] = (1 - opacity) * picture[here] + opacity * colour
        picture[outline(here)] = colour
    return (picture * 255).round().astype(np.uint8)


def comparison(
    image_HWC: np.ndarray, prediction_HW: np.ndarray, target_HW: np.ndarray, ignore_index: int
) -> np.ndarray:
    """Tints an image by what was found (green), missed (yellow) and seen where nothing is (red); (H, W, 3), 0 to 1."""
    picture = to_rgb(image_HWC) * 0.6
    counted = target_HW != ignore_index
    for here, colour in (
        (counted & (target_HW != 0) & (prediction_HW == target_HW), FOUND),
        (counted & (target_HW != 0) & (prediction_HW != target_HW), MISSED),
        (counted & (target_HW == 0) & (prediction_HW != 0), FALSE_ALARM),
    ):
        picture[here] = 0.35 * picture[here] + 0.65 * np.array(colour)
    return picture


def panel(images: Sequence[dict[str, Any]], ignore_index: int) -> Figure:
    """Draws validation images in columns: the image, and the same with its prediction against the truth.

    images: dicts of "image" (H, W, bands), "labels" (predicted) and "mask" (true), both (H, W), and "key".
    """
    columns = len(images)
    figure = Figure(figsize=(2.1 * columns, 4.6), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for column, item in enumerate(images):
        pictures = (
            to_rgb(item["image"]),
            comparison(item["image"], item["labels"], item["mask"], ignore_index),
        )
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set_axis_off()
        axes[0, column].set_title(item["key"][:24], fontsize=7)
    figure.text(0.01, 0.005, "green: found   yellow: missed   red: false alarm", fontsize=8)
    return figure


def curves(history: dict[str, list[tuple[int, float]]]) -> Figure:
    """Draws loss, Dice and IoU over the steps, training and validation in one plot each.

    history: (step, value) pairs under "train/loss", "val/loss", "train/dice", "val/soft_dice", "train/iou", "val/iou".
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    plots = (
        ("loss", "train/loss", "val/loss"),
        ("soft Dice", "train/dice", "val/soft_dice"),
        ("IoU", "train/iou", "val/iou"),
    )
    for axis, (title, train, validation) in zip(figure.subplots(1, 3), plots, strict=True):
        for name, label, style in ((train, "training", "-"), (validation, "validation", "o-")):
            if points := history.get(name):
                axis.plot(*zip(*points, strict=True), style, markersize=4, label=label)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
        if title != "loss":
            axis.set_ylim(0, 1)
    return figure
