"""A small grid of the comparison whose every number is known by hand, as files, and what reads tables back."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jobs.comparison import tables

SEEDS = (0, 1, 2)
# IoU by category and seed; None has not run, text has failed
IOU: dict[str, dict[str, list[Any]]] = {
    "deepskip": {"coins": [0.60, 0.62, 0.64], "small_targets": [0.40, 0.40, 0.40]},
    "ablation-none": {"coins": [0.30] * 3, "small_targets": [0.30] * 3},
    "ablation-skips": {"coins": [0.31, 0.29, 0.30], "small_targets": [0.31, 0.29, 0.30]},
    "ablation-loss": {"coins": [0.40] * 3, "small_targets": [0.40] * 3},
    "ablation-both": {"coins": [0.20] * 3, "small_targets": [0.20] * 3},
    "unet": {"coins": [0.50] * 3, "small_targets": [0.30] * 3},
    "fcn": {"coins": [0.70] * 3, "small_targets": [None] * 3},
    "fcn-paper": {"coins": [0.61] * 3, "small_targets": [0.41, "Traceback\nRuntimeError: out | of memory", 0.41]},
    "pspnet": {"coins": [None] * 3, "small_targets": [None] * 3},
    "tuned-flips": {"coins": [0.66, 0.66, 0.66], "small_targets": [0.46, 0.46, 0.46]},
}
PARAMETERS = {"deepskip": 645_665, "fcn-paper": 6_332_385, "fcn": 32_946_753, "unet": 1_979_009}


def write_grid(folder: Path, seeds: tuple[int, ...] = SEEDS) -> Path:
    groups = {"deepskip": "ours", "ablation": "ablation", "tuned": "tuning"}
    networks = {}
    for name in IOU:
        group = groups.get(name.split("-")[0], "rival")
        networks[name] = {
            "label": name.upper(),
            "group": group,
            "form": None if group != "rival" else "paper" if name.endswith("-paper") else "default",
            "loss": "bce_dice",
            "prior": True,
            "parameters": PARAMETERS.get(name, 645_665),
            "paper_parameters": 6.32e6 if name == "fcn-paper" else None,
            "gflops": 2.34,
            "seconds_per_image": 0.00321,
            "peak_memory_bytes": 3 * 2**29,
            "hardware": "a GPU",
        }
    folder.mkdir()
    (folder / "networks.json").write_text(json.dumps(networks))
    for name, categories in IOU.items():
        for category, values in categories.items():
            for seed in seeds:
                if values[seed] is not None:
                    write_cell(folder / "cells" / category / name / f"{seed}.json", values[seed], category, seed)
    return folder


def write_cell(path: Path, iou: float | str, category: str, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(iou, str):
        path.write_text(json.dumps({"error": iou}))
        return
    metrics = dict.fromkeys(tables.METRICS, iou) | {"false_alarms_per_image": 2 - iou}
    # nothing was predicted
    metrics["precision"] = None if path.parts[-2] == "ablation-both" else 0.9
    curve = [{"step": step, "loss": 1 / step, "dice": 1 - 1 / step, "iou": iou} for step in (10, 20)]
    small, found = (10, 5) if category == "coins" else (30, 9)
    cell = {
        "steps": 20,
        "batch_size": 8,
        "image_size": 256,
        "train_samples_seen": 6400,
        "hardware": "a GPU",
        "torch": "2.11.0",
        "command": "python -m jobs.compare --config <mine>",
        "seconds": 1800.0,
        "best_step": 10 + 10 * (seed == 0),
        "threshold": 0.45,
        "curves": {"train": curve, "validation": curve},
        "validation": metrics,
        "test": metrics,
        "by_size": [
            {"from": 0, "to": 64, "objects": small, "found": found, "iou": found / small},
            {"from": 64, "to": None, "objects": 0, "found": 0, "iou": None},
        ],
        "images": [{"key": key, "iou": value} for key, value in (("a", 0.9), ("b", 0.5), ("c", 0.123))],
    }
    path.write_text(json.dumps(cell))
    if seed == 0 and path.parts[-2] in ("deepskip", "fcn"):
        rng = np.random.default_rng(0)
        arrays = {"keys": np.array(["a", "b", "c"])}
        for place in ("best", "median", "worst"):
            # noise: the hardest picture to make small
            arrays[f"{place}_image"] = rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)
            arrays[f"{place}_mask"] = arrays[f"{place}_prediction"] = np.eye(256, dtype=np.uint8)
        np.savez_compressed(path.with_suffix(".npz"), **arrays)


def rows_of(markdown: str) -> dict[str, dict[str, str]]:
    """Reads a Markdown table: the cells of each row by its first cell and the columns' headings."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}


def table(results: Any, name: str) -> dict[str, dict[str, str]]:
    return rows_of(tables.to_markdown(next(t for t in tables.all_tables(results) if t.name == name)))
