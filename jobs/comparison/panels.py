"""Pictures of predictions: the best, median and worst test image of a category, ours beside the best rival's."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from deepskip.figures import FALSE_ALARM, FOUND, MISSED, comparison
from jobs.comparison.claims import rivals, spread
from jobs.comparison.results import OURS, Results, number, of_category, shown

PLACES = ("best", "median", "worst")
IGNORED = 255
WHITE = (255, 255, 255)
# of a picture on the page, so that all of them are sent in a few seconds
MOST_BYTES = 240_000


def pictures_path(results: Results, category: str, network: str) -> Path | None:
    """Finds the pictures that a network's smallest seed left, None where there are none."""
    for seed in results.seeds:
        path = results.folder / "cells" / category / network / f"{seed}.npz"
        if (category, network, seed) in results.cells and path.exists():
            return path
    return None


def best_rival(results: Results, category: str) -> str | None:
    """Finds the rival with the highest mean test IoU of a category that has pictures."""
    pictured = [name for name in rivals(results) if pictures_path(results, category, name)]
    scores = {name: of_category(results, category, name, "iou").value for name in pictured}
    return max((name for name in pictured if scores[name] == scores[name]), key=scores.__getitem__, default=None)


def panel(results: Results, category: str) -> bytes | None:
    """Draws a category's panel as PNG: three columns, the image above its prediction, ours above the best rival's.

    None where ours has no pictures. Raises ValueError that names a file of pictures that cannot be read.
    """
    rival = best_rival(results, category)
    networks = {name: path for name in (OURS, rival) if name and (path := pictures_path(results, category, name))}
    if OURS not in networks:
        return None
    figure = Figure(figsize=(6.6, 4.75 * len(networks) + 0.25), layout="constrained")
    *parts, below = figure.subfigures(len(networks) + 1, 1, height_ratios=[4.75] * len(networks) + [0.25])  # type: ignore[misc]
    for part, (name, path) in zip(parts, networks.items(), strict=True):
        other = rival if name == OURS else OURS
        iou = spread(of_category(results, category, name, "iou"))
        part.suptitle(
            f"{shown(category)}: {results.label(name)}, IoU {iou} % over seeds; shown: seed {path.stem}", fontsize=9
        )
        draw(part.subplots(2, 3), results, category, name, other, path)
    below.text(0.5, 0.5, "green: found   yellow: missed   red: false alarm", fontsize=8, ha="center", va="center")
    return small_png(figure)


def draw(axes: Any, results: Results, category: str, network: str, other: str | None, path: Path) -> None:
    """Draws the three images of a network above what it made of them, each with its IoU and that of the other network."""
    seed = int(path.stem)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if "best_image" not in arrays:
            # kept small by `pictures: false`
            raise ValueError("the images are not in it; python -m jobs.comparison.pictures puts them in")
        keys = [str(key) for key in arrays["keys"]]
        shots = [[arrays[f"{place}_{what}"] for what in ("image", "mask", "prediction")] for place in PLACES]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    own, others = image_scores(results, category, network, seed), image_scores(results, category, other, seed)
    for column, (place, key, (image, mask, prediction)) in enumerate(zip(PLACES, keys, shots, strict=True)):
        found = comparison(image, (prediction != 0).astype(np.uint8), mask, IGNORED)
        rows, columns = window((prediction != 0) | ((mask != 0) & (mask != IGNORED)))
        axes[0, column].imshow(image)
        axes[1, column].imshow(found[rows, columns], interpolation="nearest")
        if (rows.stop - rows.start, columns.stop - columns.start) != mask.shape:
            corner, side = (columns.start - 0.5, rows.start - 0.5), rows.stop - rows.start
            axes[0, column].add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=0.8))
        title = f"{place}: {100 * own[key]:.1f}" if key in own else place
        if key in others and other:
            title += f"\n{results.label(other)[:32]}: {100 * others[key]:.1f}"
        axes[0, column].set_title(title, fontsize=7.5)
        for row in (0, 1):
            axes[row, column].set_axis_off()


def window(shown_HW: np.ndarray) -> tuple[slice, slice]:
    """Chooses the square to enlarge: what is around all that is foreground, a quarter of the image's side or more."""
    height, width = shown_HW.shape
    ys, xs = np.nonzero(shown_HW)
    whole = slice(0, height), slice(0, width)
    if not len(ys):
        return whole
    side = max(np.ptp(ys) + 17, np.ptp(xs) + 17, min(height, width) // 4)
    # little larger is not worth a frame
    if side > 0.7 * min(height, width):
        return whole
    top = int(np.clip((ys.min() + ys.max() + 1 - side) // 2, 0, height - side))
    left = int(np.clip((xs.min() + xs.max() + 1 - side) // 2, 0, width - side))
    return slice(top, top + int(side)), slice(left, left + int(side))


def image_scores(results: Results, category: str, network: str | None, seed: int) -> dict[str, float]:
    """Gives the test IoU of each image of a cell by its key; empty where there is no such cell."""
    cell = results.cells.get((category, network or "", seed), {})
    scores = {str(image["key"]): number(image["iou"]) for image in cell.get("images", [])}
    return {key: value for key, value in scores.items() if value == value}


def small_png(figure: Figure) -> bytes:
    """Writes a figure as a PNG of few colours, with as many dots an inch as keep it below MOST_BYTES."""
    dpi = 120.0
    while True:
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=dpi)
        picture = Image.open(file).convert("RGB")
        small = io.BytesIO()
        picture.quantize(palette=palette(picture), dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        if small.tell() <= MOST_BYTES or dpi < 40:
            return small.getvalue()
        dpi *= 0.97 * (MOST_BYTES / small.tell()) ** 0.5


def palette(picture: Image.Image) -> Image.Image:
    """Chooses 192 colours for a picture, and 16 shades of each tint: a small object has too few pixels to be given one."""
    # the paper is white, whatever else
    own = picture.quantize(192).getpalette() or []
    grey = np.linspace(0, 0.6, 16)[:, None, None]
    tints = 0.35 * grey + 0.65 * np.array([FOUND, MISSED, FALSE_ALARM])[None]
    chosen = Image.new("P", (1, 1))
    chosen.putpalette([*own[: 3 * 192], *(255 * tints).round().astype(int).ravel().tolist(), *WHITE])
    return chosen
