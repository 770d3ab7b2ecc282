"""The settings of the jobs that take a trained model; without torch, so that --help is quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deepskip.config import setting
from deepskip.data_shards import storage
from deepskip.jobs.prediction.options import Options


@dataclass(kw_only=True)
class EvaluateConfig:
    """Measures a trained model on shards: metrics, by object size, best threshold, classes, worst samples."""

    model: str
    """a run's folder (runs/NAME) or URL, a checkpoint file, an MLflow run's id, models:/NAME/VERSION or models:/NAME@ALIAS"""
    data: str | None = None
    """one split of shards, such as data/coins/test: folder or URL; null takes the validation split of the model's training"""
    out: Path | None = None
    """folder for the report; null takes evaluations/MODEL/SPLIT, with flips SPLIT-flips"""
    threshold: float = setting(0.5, 0, 1)
    """probability above which a pixel is foreground, where there are no classes"""
    flips: bool = False
    """average the probabilities of each image and its mirrorings, which takes four times as long"""
    size_edges: list[int] = field(default_factory=lambda: [16, 64, 256, 1024])
    """areas in pixels that part the sizes that objects are scored by"""
    worst: int = setting(20, 0)
    """samples of the lowest IoU that are shown"""
    track: Literal["same", "new", "none"] = "same"
    """MLflow: into the run that trained the model, a new run, or not at all"""
    tracking_uri: str | None = None
    """MLflow server; null takes MLFLOW_TRACKING_URI, else the training's"""
    experiment: str = "deepskip"
    """MLflow experiment of a new run"""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null takes a GPU where there is one"""
    on_bad_sample: Literal["error", "skip"] = "error"
    """a sample that cannot be used ends the evaluation, or is left out and listed in the report"""
    cache_dir: str = storage.DEFAULT_CACHE
    """folder for copies of remote shards"""
    cache_gb: float = setting(50.0, 0)
    """size of all copies together, gigabytes"""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Options):
    """Segments images with a trained model; the same command goes on where it was stopped."""

    model: str
    """a run's folder (runs/NAME) or URL, a checkpoint file, or a name of MLflow's: a run's id, models:/NAME/VERSION"""
    images: list[str]
    """files, folders of them, Zarr arrays, folders of shards, and URLs of each"""
    out: str
    """folder of the outputs, which every machine sees"""


@dataclass(kw_only=True)
class ExportConfig:
    """Exports a trained model to ONNX and torch.export, checks the files against PyTorch, and writes a model card."""

    model: str
    """a run's folder (runs/NAME) or URL, a checkpoint file, an MLflow run's id, models:/NAME/VERSION or models:/NAME@ALIAS"""
    out: Path | None = None
    """folder for the files; null takes exports/MODEL"""
    formats: list[Literal["onnx", "pt2"]] = field(default_factory=lambda: ["onnx", "pt2"])
    """files to make: onnx for ONNX runtimes, pt2 for torch.export.load"""
    evaluation: Path | None = None
    """report.json of jobs.evaluate, whose numbers and best threshold go into the card"""
    tracking_uri: str | None = None
    """MLflow server; null takes MLFLOW_TRACKING_URI, else the database in runs/"""
