"""Draw predictions over images, and curves of trainings and evaluations."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deepskip.threshold_curve import Curve

# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart too (tests/deepskip/test_figures.py).
BLUE, YELLOW, VERMILION = (0.0, 0.45, 0.7), (0.94, 0.89, 0.26), (0.84, 0.37, 0.0)
SKY, GREEN, PURPLE, ORANGE = (0.34, 0.71, 0.91), (0.0, 0.62, 0.45), (0.8, 0.47, 0.65), (0.9, 0.62, 0.0)
FOUND, MISSED, FALSE_ALARM = BLUE, YELLOW, VERMILION
# The colours of classes 1, 2, ...; they repeat for more classes.
CLASS_COLOURS = (VERMILION, SKY, YELLOW, GREEN, BLUE, PURPLE, ORANGE)

# Labels of a confusion matrix up to which its shares are written in numbers, and its largest side, inches.
MOST_NUMBERED, LARGEST_MATRIX = 25, 16.0


def to_rgb(image_HWC: np.ndarray) -> np.ndarray:
    """Convert an image of any number of bands to a picture: the first, middle and last band, each stretched to its range.

    Args:
        image_HWC: image (H, W, bands). Three bands of uint8 are taken as RGB and only scaled.

    Returns:
        The picture (H, W, 3), fp32, 0 to 1. The range of a band is from its 1st to its 99th percentile. Pixels without a
        value (nan) do not count for it, and are black.
    """
    bands = image_HWC.shape[2]
    if bands == 3 and image_HWC.dtype == np.uint8:
        return image_HWC.astype(np.float32) / 255
    shown = image_HWC[..., [0, bands // 2, bands - 1]].astype(np.float32)
    # In fp32 and in place: a picture of 2000 pixels a side takes 48 MB already.
    missing = np.isnan(shown)
    if missing.any():
        low, high = np.transpose([seen_range(shown[..., band]) for band in range(3)])
    else:
        low, high = np.percentile(shown, (1, 99), axis=(0, 1)).astype(np.float32)
    shown -= low
    shown /= np.maximum(high - low, 1e-12)
    shown[missing] = 0
    return np.clip(shown, 0, 1, out=shown)


def seen_range(band_HW: np.ndarray) -> np.ndarray:
    """Return the 1st and the 99th percentile of the values of a band (H, W) that are not nan, (2,) fp32; 0 without any."""
    seen = band_HW[~np.isnan(band_HW)]
    return np.percentile(seen, (1, 99)).astype(np.float32) if len(seen) else np.zeros(2, np.float32)


def outline(mask_HW: np.ndarray) -> np.ndarray:
    """Return the pixels of a boolean mask that share an edge with a pixel outside it.

    Args:
        mask_HW: mask (H, W), bool. The image's border does not count as outside.

    Returns:
        A boolean mask (H, W).
    """
    padded = np.pad(mask_HW, 1, mode="edge")
    inside = padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    border: np.ndarray = mask_HW & ~inside
    return border


def overlay(image_HWC: np.ndarray, labels_HW: np.ndarray, opacity: float = 0.35) -> np.ndarray:
    """Draw labels over an image: each class is tinted and outlined in a colour.

    Args:
        image_HWC: image (H, W, bands).
        labels_HW: labels (H, W); 0 is background.
        opacity: opacity of the tint, 0 to 1.

    Returns:
        The picture (H, W, 3), uint8.
    """
    picture = to_rgb(image_HWC)
    for label in np.unique(labels_HW):
        if label == 0:
            continue
        colour = np.array(CLASS_COLOURS[(int(label) - 1) % len(CLASS_COLOURS)])
        here = labels_HW == label
        picture[here] = (1 - opacity) * picture[here] + opacity * colour
        picture[outline(here)] = colour
    picture *= 255
    return picture.round(out=picture).astype(np.uint8)


def comparison(
    image_HWC: np.ndarray, prediction_HW: np.ndarray, target_HW: np.ndarray, ignore_index: int
) -> np.ndarray:
    """Tint an image by comparing prediction and target: found is blue, missed is yellow, a false alarm is orange.

    Args:
        image_HWC: image (H, W, bands).
        prediction_HW: predicted labels (H, W).
        target_HW: true labels (H, W).
        ignore_index: true label of pixels that are not tinted.

    Returns:
        The picture (H, W, 3), 0 to 1.
    """
    picture = to_rgb(image_HWC) * 0.6
    counted = target_HW != ignore_index
    for here, colour in (
        (counted & (target_HW != 0) & (prediction_HW == target_HW), FOUND),
        (counted & (target_HW != 0) & (prediction_HW != target_HW), MISSED),
        (counted & (target_HW == 0) & (prediction_HW != 0), FALSE_ALARM),
    ):
        picture[here] = 0.35 * picture[here] + 0.65 * np.array(colour)
    return picture


def panel(images: Sequence[Mapping[str, Any]], ignore_index: int, columns: int | None = None) -> Figure:
    """Draw images side by side, and below each one the same image with its prediction compared with the target.

    Args:
        images: dicts of "image" (H, W, bands), "labels" (predicted) and "mask" (true), both (H, W), "key", and an
            optional "note" for the title.
        ignore_index: true label of pixels that are not tinted.
        columns: number of images side by side, with the others below; None puts all into one row.
    """
    columns = min(columns or len(images), len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.1 * columns, 4.6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, item in enumerate(images):
        row, column = divmod(place, columns)
        pictures = (
            to_rgb(item["image"]),
            comparison(item["image"], item["labels"], item["mask"], ignore_index),
        )
        for below, picture in enumerate(pictures):
            axes[2 * row + below, column].imshow(picture)
        axes[2 * row, column].set_title(
            "\n".join([literal(item["key"][:24]), *filter(None, [item.get("note")])]), fontsize=7
        )
    figure.supxlabel("blue: found   yellow: missed   orange: false alarm", x=0.01, ha="left", fontsize=8)
    return figure


def curves(history: dict[str, list[tuple[int, float]]]) -> Figure:
    """Draw loss, Dice and IoU over the steps, training and validation in one plot each.

    Args:
        history: (step, value) pairs under "train/loss", "val/loss", "train/dice", "val/soft_dice", "train/iou",
            "val/iou"; any may be missing.
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


def precision_recall(classes: Sequence[tuple[str, Curve]]) -> Figure:
    """Draw precision over recall, and F1 over the threshold, of named classes; the best threshold is marked.

    Args:
        classes: name and curve of each foreground class.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, curve), colour in zip(classes, cycle(CLASS_COLOURS), strict=False):
        best = curve.best
        left.plot(
            curve.recall, curve.precision, color=colour, label=f"{literal(name)}, AP {curve.average_precision:.3f}"
        )
        left.plot(curve.recall[best], curve.precision[best], "o", color=colour)
        right.plot(
            curve.thresholds, curve.f1, color=colour, label=f"{literal(name)}, best at {curve.thresholds[best]:.3f}"
        )
        right.plot(curve.thresholds[best], curve.f1[best], "o", color=colour)
    for axis, below, beside in ((left, "recall", "precision"), (right, "threshold", "F1 of pixels (Dice)")):
        axis.set(xlabel=below, ylabel=beside, xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left" if axis is left else "lower center")
    return figure


def literal(text: str) -> str:
    """Return a text that matplotlib shows as it is: it typesets what stands between $, and hides labels that begin with _."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def by_size(sizes: Sequence[dict[str, Any]]) -> Figure:
    """Draw object recall, IoU and false alarms over the size of objects.

    Args:
        sizes: scores that `SizeScores.compute` returned.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.arange(len(sizes))
    names = [f"under {size['to']}" if not size["from"] else f"{size['from']} up" for size in sizes]
    for shift, key, label, colour in ((-0.2, "recall", "found", FOUND), (0.2, "iou", "mean IoU", CLASS_COLOURS[1])):
        left.bar(places + shift, [np.nan_to_num(size[key]) for size in sizes], 0.4, color=colour, label=label)
    left.set(ylim=(0, 1), ylabel="share")
    if sizes:
        left.legend(fontsize=8)
    right.bar(places, [np.nan_to_num(size["false_alarms_per_image"]) for size in sizes], 0.5, color=FALSE_ALARM)
    right.set(ylabel="false alarms an image")
    counts = [f"{name}\n{size['objects']} objects" for name, size in zip(names, sizes, strict=True)]
    for axis, ticks in ((left, counts), (right, names)):
        axis.set_xticks(places, ticks, fontsize=7)
        axis.set_xlabel("area, pixels")
        axis.grid(alpha=0.3, axis="y")
    return figure


def confusion(counts_VV: np.ndarray) -> Figure:
    """Draw a confusion matrix of pixels as shares of the true class.

    Args:
        counts_VV: pixels by true and predicted label, (V, V).
    """
    V = len(counts_VV)
    shares = counts_VV / np.maximum(counts_VV.sum(1, keepdims=True), 1)
    side = min(max(3.5, 0.55 * V + 1.5), LARGEST_MATRIX)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for true, guessed in np.ndindex(V, V) if V <= MOST_NUMBERED else ():
        share = shares[true, guessed]
        axis.text(
            guessed, true, f"{share:.1%}", ha="center", va="center", fontsize=7, color="w" if share > 0.5 else "k"
        )
    ticks = range(0, V, -(-V // MOST_NUMBERED))
    axis.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="true")
    return figure
