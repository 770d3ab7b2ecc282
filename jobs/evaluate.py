"""Evaluate a trained model on any shards: metrics, scores by object size, thresholds, classes and the worst samples."""

import csv
import heapq
import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from deepskip import figures, weight_files
from deepskip.data_shards import storage, trouble
from deepskip.data_shards.bands import BandError
from deepskip.data_shards.dataset import Shards, SkipReport
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.index import BrokenIndex, MissingIndex
from deepskip.data_shards.origin import class_conflict
from deepskip.data_shards.sample import BadSample
from deepskip.data_shards.scan import BrokenShard
from deepskip.data_shards.stream import whole_images
from deepskip.evaluation import thumbnail
from deepskip.inference import to_labels
from deepskip.jobs import earlier, models, report, runs
from deepskip.jobs.options import EvaluateConfig
from deepskip.jobs.prediction.memory import device_of
from deepskip.jobs.settings import NotHere, parse_settings, stop
from deepskip.metrics import SegmentationMetrics
from deepskip.predictor import Predictor
from deepskip.size_scores import SizeScores
from deepskip.threshold_curve import Curve, ThresholdCurve

REPORT, WORST = "report.json", "worst.png"
# longest side of the worst samples' pictures, pixels
PICTURE_SIDE = 512


@dataclass
class Scores:
    """Running totals of an evaluation.

    Attributes:
        metrics: pixel and object metrics.
        sizes: scores by object size.
        curve: precision and recall by threshold.
        worst: heap of (-IoU, pixels of foreground in mask or prediction, minus the image's number, row and picture).
        bad: reports of the skipped samples.
        images: number of images that were scored.
    """

    metrics: SegmentationMetrics
    sizes: SizeScores
    curve: ThresholdCurve
    worst: list[tuple[float, int, int, dict[str, Any]]] = field(default_factory=list)
    bad: list[SkipReport] = field(default_factory=list)
    images: int = 0


def check(argv: list[str]) -> None:
    """Validate the settings, and that the model and the data exist and fit each other.

    Args:
        argv: command-line arguments.

    Raises:
        SystemExit: status 2 after `error:` lines, if something is wrong; NotHere if the model or the data is missing.
    """
    config = read_settings(argv)
    open_data(config, Predictor(find(config).state))


@trouble.told()
def main(argv: list[str] | None = None) -> None:
    """Evaluate a model on a split and write the report into a folder.

    The file report.json is written last. If it exists, the folder is complete.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: status 2 for invalid settings, a missing model or data, bad samples, and a folder that cannot be
            written.
    """
    config = read_settings(sys.argv[1:] if argv is None else argv)
    found = find(config)
    model = Predictor(found.state, flips=config.flips)
    try:
        model.to(device_of(config.device))
    except (ValueError, RuntimeError, AssertionError) as error:
        stop(str(error).splitlines()[0])
    shards = open_data(config, model)
    # a report with flips does not replace one without
    split = Path(shards.folder.rstrip("/")).name + ("-flips" if config.flips else "")
    folder = storage.local(config.out) if config.out else Path("evaluations") / found.title / split
    earlier.check_folder(folder)
    earlier.check_report(folder / REPORT, shards.folder, found)
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with table(folder / "samples.csv") as add_row:
            scores = evaluate(config, model, shards, add_row)
            result = describe(config, found, model, shards, scores, time.perf_counter() - started)
            pictures = draw(scores, model.class_names, shards.index.ignore_index)
            # an earlier report stays until all is measured
            for name in (REPORT, WORST):
                (folder / name).unlink(missing_ok=True)
        # report.json is written last: if it exists, the folder is complete
        for name, figure in pictures.items():
            save_figure(figure, folder / name)
        runs.write_json(folder / REPORT, runs.without_nan(result))
    except (BadSample, BrokenShard, storage.StorageError) as error:
        stop(f"{error}\nwith on_bad_sample: skip, such samples are skipped and listed in the report")
    except OSError as error:
        stop(f"out is {folder}: {trouble.in_words(error) or error}")
    print_result(result)
    print(f"report: {folder}/{REPORT}, with samples.csv, {', '.join(pictures)}")
    if config.track != "none":
        track(config, found, split, result, folder)


def read_settings(argv: list[str]) -> EvaluateConfig:
    """Read and validate the settings.

    Args:
        argv: command-line arguments.

    Returns:
        The settings of the evaluation.

    Raises:
        SystemExit: status 2 if they are invalid; 0 after --help.
    """
    config = parse_settings("evaluate", EvaluateConfig, argv)
    faults = []
    edges = config.size_edges
    if any(edge < 1 for edge in edges) or edges != sorted(set(edges)):
        faults.append(f"size_edges is {edges}; it must be areas of 1 pixel or more in ascending order")
    if faults:
        stop("\n".join(faults))
    return config


def find(config: EvaluateConfig) -> models.Found:
    """Find the model that the settings name.

    Args:
        config: the settings of the evaluation.

    Returns:
        The model.

    Raises:
        NotHere: there is no such model.
    """
    try:
        return models.find(config.model, config.tracking_uri)
    except models.ModelNotFound as error:
        stop(f"model: {error}", NotHere)


def open_data(config: EvaluateConfig, model: Predictor) -> Shards:
    """Open the shards, and warn if they were prepared differently from the training data.

    Args:
        config: the settings of the evaluation.
        model: the model to evaluate; its validation split is used if the settings name no data.

    Returns:
        The shards of one split, with samples that are not normalized.

    Raises:
        NotHere: there are no shards.
        SystemExit: status 2 if the shards cannot be read, hold no samples, or do not fit the bands and classes of the
            model.
    """
    path = config.data or storage.join(model.state["config"]["data"]["path"], "val")
    cache = storage.Cache(Path(config.cache_dir), int(config.cache_gb * 1e9))
    try:
        # the model normalizes its input itself, without pixels that have no value
        shards = Shards(
            path, "none", num_classes=model.num_classes, on_bad_sample=config.on_bad_sample, cache=cache,
            bands=model.chosen, fill=False,
        )  # fmt: skip
    except (MissingIndex, BrokenIndex, BandError, storage.StorageError) as error:
        stop(f"data is {path}: {error}", NotHere if isinstance(error, MissingIndex) else SystemExit)
    index = shards.index
    if (index.stored_bands, index.num_classes) != (model.image_bands, model.num_classes):
        stop(
            f"data is {path}, with {index.stored_bands} bands and num_classes {index.num_classes}; "
            f"the model takes {model.image_bands} bands and has num_classes {model.num_classes}"
        )
    if reason := class_conflict(index.classes, model.classes, "the model"):
        stop(f"data is {path}: {reason}")
    if index.num_samples == 0:
        stop(f"data is {path}: it holds no samples")
    if model.preparation and index.preparation != model.preparation:
        print(
            f"warning: {path} was packed with {index.preparation}, the training data with {model.preparation}: "
            "object sizes in pixels, or the meaning of bands, may differ",
            file=sys.stderr,
        )
    return shards


def evaluate(config: EvaluateConfig, model: Predictor, shards: Shards, add_row: Any) -> Scores:
    """Score each image of the shards once, one image at a time.

    Args:
        config: the settings of the evaluation.
        model: the model to evaluate.
        shards: the split.
        add_row: called with the scores of each image, as `add` returns them.

    Returns:
        The totals over all images.

    Raises:
        SystemExit: status 2 if no sample can be used.
        BadSample: a sample cannot be used, and config.on_bad_sample is "error".
    """
    index = shards.index
    scores = Scores(
        SegmentationMetrics(model.num_classes, index.ignore_index),
        SizeScores(config.size_edges),
        ThresholdCurve(model.num_classes, index.ignore_index),
    )
    nodata = math.nan if index.reading.missing else None
    with tqdm(total=len(shards), unit="image", desc=shards.folder[-40:], dynamic_ncols=True, disable=None) as bar:

        def left_out(report: SkipReport) -> None:
            scores.bad.append(report)
            bar.update()

        for batch in whole_images(shards, 0, 1, left_out):
            image = batch["image"][0]
            p_VHW = model.predict_proba(image, nodata=nodata, chosen=True).numpy()
            labels = to_labels(p_VHW, config.threshold).astype(np.uint8)
            add_row(add(scores, batch["key"][0], image, batch["mask"][0].numpy(), p_VHW, labels, config.worst))
            bar.update()
    if scores.images == 0:
        stop(f"data is {shards.folder}: none of its {len(shards)} samples can be used")
    return scores


def add(
    scores: Scores,
    key: str,
    image: torch.Tensor,
    mask_HW: np.ndarray,
    p_VHW: np.ndarray,
    labels_HW: np.ndarray,
    worst: int,
) -> dict[str, Any]:
    """Add one image to the totals and return its own scores.

    Args:
        scores: totals, updated in place.
        key: key of the sample.
        image: the image as it is stored, (bands, height, width).
        mask_HW: true labels, (H, W) uint8.
        p_VHW: probabilities, (V, H, W) float32.
        labels_HW: predicted labels, (H, W) uint8.
        worst: number of worst samples to keep with a picture.

    Returns:
        A row of samples.csv: key, size and pixel counts of the image, and its IoU, nan without any foreground.
    """
    ignore_index = scores.curve.ignore_index
    scores.metrics.update(torch.from_numpy(labels_HW).long(), torch.from_numpy(mask_HW).long())
    scores.sizes.update(labels_HW, mask_HW, ignore_index)
    scores.curve.update(p_VHW, mask_HW)
    counted = mask_HW != ignore_index
    right = int((counted & (mask_HW != 0) & (labels_HW == mask_HW)).sum())
    either = int((counted & ((mask_HW != 0) | (labels_HW != 0))).sum())
    iou = right / either if either else math.nan
    row = {
        "key": key,
        "height": mask_HW.shape[0],
        "width": mask_HW.shape[1],
        "iou": iou,
        "true_pixels": int((counted & (mask_HW != 0)).sum()),
        "predicted_pixels": int((counted & (labels_HW != 0)).sum()),
        "right_pixels": right,
    }
    # an image without foreground in mask and prediction has nothing to show
    if either and worst:
        entry = (-iou, either, -scores.images)
        if len(scores.worst) < worst or entry > scores.worst[0][:3]:
            shown = {"row": row, **thumbnail(image, {"mask": mask_HW, "labels": labels_HW}, PICTURE_SIDE)}
            (heapq.heappush if len(scores.worst) < worst else heapq.heapreplace)(scores.worst, (*entry, shown))
    scores.images += 1
    return row


def describe(
    config: EvaluateConfig, found: models.Found, model: Predictor, shards: Shards, scores: Scores, seconds: float
) -> dict[str, Any]:
    """Return the report of an evaluation, for report.json.

    Args:
        config: the settings of the evaluation.
        found: the model as it was found.
        model: the model as it was evaluated.
        shards: the split.
        scores: the totals over all images.
        seconds: duration of the evaluation, seconds.
    """
    curves = scores.curve.compute()
    metrics = scores.metrics.compute()
    confusion = scores.metrics.confusion.double()
    right = confusion.diag()
    class_iou = (right / (confusion.sum(0) + confusion.sum(1) - right)).tolist()
    return {
        "model": {
            "name": config.model,
            "title": found.title,
            "step": model.state["step"],
            "mlflow_run_id": found.run_id,
            "weights": weight_files.digest_of(found.state["model"]),
            "parameters": sum(p.numel() for p in model.network.parameters()),
        },
        "data": {
            "path": shards.folder,
            "images": scores.images,
            "bands": model.bands,
            "num_classes": model.num_classes,
            "bad_samples": scores.bad,
            "identity": identity_of(shards.index),
        },
        "flips": config.flips,
        "threshold": config.threshold if model.num_classes == 1 else None,
        "metrics": metrics,
        "classes": [
            {"class": place + 1, "name": name, "iou": class_iou[place + 1], **threshold_scores(curve)}
            for place, (name, curve) in enumerate(zip(model.class_names, curves, strict=True))
        ],
        "by_size": scores.sizes.compute(),
        "confusion": scores.metrics.confusion.tolist(),
        "worst": [item["row"] for item in worst_first(scores)],
        "seconds": seconds,
        "images_per_second": scores.images / seconds,
        "device": str(model.device),
    }


def threshold_scores(curve: Curve) -> dict[str, Any]:
    """Return a class's average precision, its best threshold with the scores there, and its curve.

    The curve has every eighth of the 1024 thresholds.

    Args:
        curve: scores of one foreground class by threshold.
    """
    best = curve.best
    names = ("precision", "recall", "f1", "iou")
    return {
        "average_precision": curve.average_precision,
        "best_threshold": float(curve.thresholds[best]),
        "at_best_threshold": {name: float(getattr(curve, name)[best]) for name in names},
        "curve": {name: getattr(curve, name)[::8].tolist() for name in ("thresholds", *names)},
    }


def worst_first(scores: Scores) -> list[dict[str, Any]]:
    """Return rows and pictures of the worst samples, the lowest IoU first."""
    return [entry[3] for entry in sorted(scores.worst, key=lambda entry: entry[:3], reverse=True)]


def draw(scores: Scores, names: list[str], ignore_index: int) -> dict[str, Figure]:
    """Draw the figures of the report.

    Args:
        scores: the totals over all images.
        names: a name for each class but background.
        ignore_index: label of pixels that do not count.

    Returns:
        Figures by the names of their files.
    """
    curves = scores.curve.compute()
    pictures = {
        "precision-recall.png": figures.precision_recall(list(zip(names, curves, strict=True))),
        "by-size.png": figures.by_size(scores.sizes.compute()),
        "confusion.png": figures.confusion(scores.metrics.confusion.numpy()),
    }
    if scores.worst:
        shown = [
            item | {"key": item["row"]["key"], "note": f"IoU {item['row']['iou']:.3f}"} for item in worst_first(scores)
        ]
        pictures[WORST] = figures.panel(shown, ignore_index, columns=5)
    return pictures


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, completely or not at all."""
    with storage.written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


@contextmanager
def table(path: Path) -> Iterator[Any]:
    """Open a CSV file for writing, which gets its name only if the block succeeds.

    Args:
        path: the file; the folders above it are created.

    Yields:
        A function that writes one row, a dict; the keys of the first row are the header.
    """
    with storage.written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer: Any = None

        def add_row(row: dict[str, Any]) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)

        yield add_row


def print_result(result: dict[str, Any]) -> None:
    """Print the numbers of a report."""
    data, threshold = result["data"], result["threshold"]
    at = f", threshold {threshold:g}" if threshold is not None else ""
    at += ", flips" if result["flips"] else ""
    print(f"\n{result['model']['title']} on {data['path']}, {data['images']} images{at}")
    report.print_metrics(result["metrics"])
    print(f"  {'images/s':<{report.WIDTH}}  {result['images_per_second']:.1f}")
    for scores in result["classes"]:
        name = "" if len(result["classes"]) == 1 else f"{scores['name']}: IoU {report.number(scores['iou'])}, "
        best = scores["at_best_threshold"]
        print(
            f"  {name}average precision {report.number(scores['average_precision'])}; best threshold "
            f"{scores['best_threshold']:.3f}: IoU {report.number(best['iou'])}, Dice {report.number(best['f1'])}"
        )
    print("\n  area, pixels    objects   found     IoU  false alarms")
    for size in result["by_size"]:
        bounds = f"{size['from']} to {size['to'] - 1}" if size["to"] else f"{size['from']} and more"
        print(
            f"  {bounds:<14}  {size['objects']:>7}  {report.number(size['recall'], '.1%'):>6}  "
            f"{report.number(size['iou'], '.3f'):>6}  {size['false_alarms']:>12}".replace("undefined", "     -")
        )
    if data["bad_samples"]:
        print(f"\nwarning: {len(data['bad_samples'])} samples were skipped; the report lists them", file=sys.stderr)
    print()


def track(config: EvaluateConfig, found: models.Found, split: str, result: dict[str, Any], folder: Path) -> None:
    """Log the report to MLflow if it is installed, or print a warning if MLflow does not accept it.

    Args:
        config: the settings of the evaluation.
        found: the model, which knows the MLflow run of its training.
        split: name of the split, with "-flips" for an evaluation with flips.
        result: the report.
        folder: folder of the report, whose files are logged as artifacts.
    """
    if find_spec("mlflow") is None:
        print("MLflow: not installed, the report is not logged")
        return
    from deepskip.jobs import tracking

    name = re.sub(r"[^\w.-]", "-", split)
    values = {f"eval-{name}/{key}": value for key, value in result["metrics"].items()}
    for scores in result["classes"]:
        which = "" if len(result["classes"]) == 1 else f"class-{scores['class']}/"
        for key in ("average_precision", "best_threshold"):
            values[f"eval-{name}/{which}{key}"] = scores[key]
    run_id = found.run_id if config.track == "same" else None
    if config.track == "same" and run_id is None:
        print("the model has no MLflow run of its training; the report is logged to a new run")
    try:
        run_id = tracking.log_report(
            found.tracking_uri, run_id, config.experiment, f"{found.title}-on-{name}", asdict(config), values,
            result["model"]["step"] or 0, folder, f"evaluations/{name}",
        )  # fmt: skip
        print(f"MLflow: run {run_id} at {found.tracking_uri}")
    # requests, sqlalchemy and mlflow raise different errors
    except Exception as error:
        print(
            f"warning: MLflow at {found.tracking_uri} did not accept the report: {tracking.in_short(error)}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
