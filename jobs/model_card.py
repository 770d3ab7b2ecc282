"""The model card: what users of a model must know, as JSON for programs and as Markdown for people."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from deepskip import export, weight_files
from deepskip.complexity import convolution_weights
from deepskip.data_shards.bands import shown_bands
from deepskip.inference import Segmenter
from deepskip.jobs.models import Found
from deepskip.jobs.report import METRICS, TARGET_METRICS, number
from deepskip.predictor import Predictor

FLOPS_SIDE = 256
PACKAGES = ("torch", "onnx", "onnxruntime", "numpy")


def threshold(model: Predictor, evaluation: dict[str, Any] | None) -> float | None:
    """Return the probability above which a pixel is foreground.

    Args:
        model: the model.
        evaluation: a report of `deepskip evaluate`, or None.

    Returns:
        The best threshold of the evaluation, 0.5 without one, or None for a model with several classes.
    """
    if model.num_classes > 1:
        return None
    return threshold_of(evaluation) if evaluation else 0.5


def threshold_of(evaluation: dict[str, Any]) -> float:
    """Return the best threshold of the first class of a report of `deepskip evaluate`."""
    return float(evaluation["classes"][0]["best_threshold"])


def properties(found: Found, model: Predictor, evaluation: dict[str, Any] | None) -> dict[str, str]:
    """Return the metadata of an exported ONNX file.

    Args:
        found: the model as it was found.
        model: the same, loaded.
        evaluation: a report of `deepskip evaluate`, or None.

    Returns:
        Strings by name; values that are not text are written as JSON.
    """
    values = {
        "deepskip_model": found.title,
        "bands": model.bands,
        "num_classes": model.num_classes,
        "threshold": threshold(model, evaluation),
        "classes": model.class_names,
        "preparation": model.preparation,
        "normalization": found.state["config"]["data"]["normalize"],
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def make(
    found: Found,
    model: Predictor,
    evaluation: dict[str, Any] | None,
    file_bytes: dict[str, int],
    checks: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Return the card of a model as a dict for model.json.

    Args:
        found: the model as it was found.
        model: the same, loaded.
        evaluation: a report of `deepskip evaluate`, or None.
        file_bytes: size of each exported file, bytes.
        checks: largest difference in probability from PyTorch, by file and image size.
    """
    config, data = found.state["config"], found.state["data"]
    network, settings = model.network, config["model"]
    normalization = config["data"]["normalize"]
    return {
        "name": found.title,
        "model": {"name": found.name, "weights": weight_files.digest_of(found.state["model"])},
        "task": "binary segmentation" if model.num_classes == 1 else f"segmentation into {model.num_classes} classes",
        "input": {
            "name": export.INPUT,
            "layout": ["batch", model.bands, "height", "width"],
            "dtype": "float32",
            "values": "in the units of the training images, not scaled",
            "normalization": normalization,
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "preparation": model.preparation,
        },
        "output": {
            "name": export.OUTPUT,
            "layout": ["batch", model.num_classes, "height", "width"],
            "classes": model.class_names if model.num_classes == 1 else ["background", *model.class_names],
            "dtype": "float32",
            "threshold": threshold(model, evaluation),
        },
        "network": settings | {"in_channels": model.bands, "num_classes": model.num_classes},
        "training": {
            "data": config["data"]["path"],
            "crop": config["data"]["crop"],
            "steps": found.state["step"],
            "global_batch_size": config["optim"]["global_batch_size"],
            "seed": config["run"]["seed"],
            "mlflow_run_id": found.run_id,
        },
        "metrics": {
            "validation": found.state.get("best"),
            "evaluation": evaluation and without_curves(evaluation),
        },
        "sizes": {
            "parameters": sum(p.numel() for p in network.parameters()),
            "conv_weights": convolution_weights(network),
            "gigaflops": {f"{FLOPS_SIDE} x {FLOPS_SIDE}": flops(model.segmenter) / 1e9},
            "file_bytes": file_bytes,
        },
        "difference_from_pytorch": checks,
        "versions": {name: found_version for name in PACKAGES if (found_version := version_of(name))},
        "limits": limits(model, normalization, file_bytes),
    }


def read_report(path: Path) -> dict[str, Any]:
    """Read a report of `deepskip evaluate` for a card.

    Args:
        path: its report.json.

    Raises:
        ValueError: the file is no such report, or one of predictions that exported files do not make.
        OSError: the file cannot be read.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
        # What the card takes of it is there, and is of the right kind.
        metrics_lines(None, without_curves(report))
        threshold_of(report)
        flips, told = report.get("flips"), dict(report["model"])
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError("it is not a report of deepskip evaluate; name the report.json that it wrote") from error
    if flips:
        raise ValueError(
            "it was made with --flips true, but exported files predict without flips; evaluate again without --flips"
        )
    return report | {"model": told}


def without_curves(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of an evaluation's report that tell how good the model is, without its curves."""
    kept = {name: evaluation[name] for name in ("data", "threshold", "metrics", "by_size")}
    classes = [{name: value for name, value in one.items() if name != "curve"} for one in evaluation["classes"]]
    return kept | {"classes": classes}


def flops(segmenter: Segmenter) -> int:
    """Count the floating-point operations for one image of FLOPS_SIDE x FLOPS_SIDE pixels.

    A multiply-add counts as two operations. The network runs in its reference form, without fused kernels.

    Args:
        segmenter: the model, from raw images to probabilities.
    """
    image = torch.zeros(1, segmenter.bands, FLOPS_SIDE, FLOPS_SIDE)
    with FlopCounterMode(display=False) as counter, export.plain_operators():
        segmenter(image)
    operations: int = counter.get_total_flops()
    return operations


def limits(model: Predictor, normalization: str, names: dict[str, int]) -> list[str]:
    """Return the known limits of a model, a sentence or two each.

    Args:
        model: the model.
        normalization: data.normalize of its training.
        names: sizes of the exported files by name.
    """
    bands, longest_side = (model.preparation.get(name) for name in ("bands", "longest_side"))
    found = [
        f"It takes {model.bands} bands, in the order and the units of its training images; it cannot detect a wrong order."
    ]
    if model.chosen is not None:
        found.append(
            f"They are bands {shown_bands(model.chosen)} of the {model.image_bands} of an image, counted from 0. The exported "
            "files take these alone; deepskip predict, deepskip serve and deepskip.load take whole images."
        )
    nodata = model.preparation.get("nodata")
    marked = f", such as the training images' {nodata}," if nodata is not None else ""
    found.append(
        "The exported files take no missing values: a nan makes all probabilities of its image nan, and a marked value"
        f"{marked} counts as a number. deepskip predict, deepskip serve and deepskip.load exclude both."
    )
    if bands is not None:
        found.append(
            f"The training images were converted to {bands} bands (deepskip pack --bands), and new ones must be too; "
            "the exported files do not do it."
        )
    if longest_side is not None:
        found.append(
            f"The training images were downsized to at most {longest_side} pixels a side, and new ones must be too; "
            "the exported files do not do it (deepskip predict and deepskip.load do)."
        )
    if normalization == "image":
        found.append(
            "Each image is normalized by its own mean and standard deviation. So a tile on its own gives other "
            "probabilities than within its image, and an image full of objects gives others than one with few objects."
        )
    if "model.pt2" in names:
        side = export.smallest_side(model.segmenter)
        found.append(
            f"model.pt2 takes images of {side} pixels a side or more; model.onnx and deepskip.load take any size."
        )
    found.append("Memory grows with the number of pixels; deepskip predict splits large images into tiles.")
    found.append("The validation split chose this checkpoint, so its metrics there are optimistic.")
    found.append("The metrics hold for images similar to those that they were measured on.")
    return found


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def to_markdown(card: dict[str, Any]) -> str:
    """Return a card as Markdown."""
    given, gives, sizes, training = (card[name] for name in ("input", "output", "sizes", "training"))
    layout, out_layout = (" x ".join(map(str, side["layout"])) for side in (given, gives))
    rule = "the most probable class" if gives["threshold"] is None else f"foreground above {gives['threshold']:g}"
    lines = [
        f"# {card['name']}",
        "",
        f"DeepSkip, {card['task']}.",
        "",
        "| | |",
        "|---|---|",
        f"| input | `{given['name']}`, {layout}, {given['dtype']}, {given['values']} |",
        f"| normalisation | {given['normalization']} (part of the files, as are padding and cropping) |",
        f"| preparation | bands: {given['preparation'].get('bands') or 'not changed'}, "
        f"longest side: {given['preparation'].get('longest_side') or 'not changed'} |",
        f"| output | `{gives['name']}`, {out_layout}, {gives['dtype']}; {rule} |",
        f"| trained on | {training['data']}, {training['steps']} steps of {training['global_batch_size']} crops of "
        f"{training['crop']} pixels, seed {training['seed']} |",
        f"| network | {', '.join(f'{name} {value}' for name, value in card['network'].items())} |",
        f"| parameters | {sizes['parameters']:,} ({sizes['conv_weights']:,} in convolutions) |",
        *(f"| GFLOPs, {size} | {value:.2f} |" for size, value in sizes["gigaflops"].items()),
        *(f"| {name} | {size / 1e6:.1f} MB |" for name, size in sizes["file_bytes"].items()),
        f"| versions | {', '.join(f'{name} {value}' for name, value in card['versions'].items())} |",
        "",
        "## Metrics",
        "",
    ]
    lines += metrics_lines(card["metrics"]["validation"], card["metrics"]["evaluation"])
    lines += ["", "## Limits", "", *(f"* {limit}" for limit in card["limits"])]
    lines += [
        "",
        "## Difference from PyTorch",
        "",
        "Largest difference in probability, on random images.",
        "",
        "| file | size | difference |",
        "|---|---|---|",
    ]
    for name, differences in card["difference_from_pytorch"].items():
        lines += [f"| {name} | {size} | {value:.1g} |" for size, value in differences.items()]
    return "\n".join(lines) + "\n"


def metrics_lines(validation: dict[str, Any] | None, evaluation: dict[str, Any] | None) -> list[str]:
    """Return a card's metrics as lines of Markdown.

    Args:
        validation: metrics of the checkpoint on the validation split; None if there are none.
        evaluation: a report of `deepskip evaluate`, or None.
    """
    columns = {"validation": validation} if validation else {}
    if evaluation:
        columns[f"{evaluation['data']['path']}, {evaluation['data']['images']} images"] = evaluation["metrics"]
    if not columns:
        return ["Not known: the checkpoint was written before the first validation."]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for key, name in METRICS.items():
        lines.append(f"| {name} | {' | '.join(number(values[key]) for values in columns.values())} |")
    for key, (name, form) in TARGET_METRICS.items():
        if all(key in values for values in columns.values()):
            lines.append(f"| {name} | {' | '.join(number(values[key], form) for values in columns.values())} |")
    if not evaluation:
        return lines
    if evaluation["threshold"] is not None:
        (foreground,) = evaluation["classes"]
        best = foreground["at_best_threshold"]
        lines += [
            "",
            f"These metrics use a threshold of {evaluation['threshold']:g}. "
            f"At {foreground['best_threshold']:g}, the best on these images: IoU {number(best['iou'])}, "
            f"Dice {number(best['f1'])}, precision {number(best['precision'])}, recall {number(best['recall'])}.",
        ]
    else:
        lines += ["", "| class | IoU | average precision |", "|---|---|---|"]
        for one in evaluation["classes"]:
            lines.append(
                f"| {one.get('name', one['class'])} | {number(one['iou'])} | {number(one['average_precision'])} |"
            )
    lines += [
        "",
        "| area of objects, pixels | objects | found | mean IoU | false alarms per image |",
        "|---|---|---|---|---|",
    ]
    for size in evaluation["by_size"]:
        bounds = f"{size['from']} to {size['to'] - 1}" if size["to"] else f"{size['from']} and more"
        ratios = " | ".join(number(size[name], ".3f") for name in ("recall", "iou", "false_alarms_per_image"))
        lines.append(f"| {bounds} | {size['objects']} | {ratios} |")
    return lines
