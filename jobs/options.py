"""Settings of the jobs that use a trained model; without torch, so that --help is fast."""

from dataclasses import dataclass, field
from typing import Literal

from deepskip.config import setting
from deepskip.data_shards import storage
from deepskip.jobs.prediction.options import Options


@dataclass(kw_only=True)
class EvaluateConfig:
    """Measure a trained model on shards: metrics, scores by object size, best threshold, classes and worst samples."""

    model: str
    """coins or microorganisms (they come with DeepSkip), a run's folder (runs/NAME) or URL, a file of weights, an MLflow run's
    id, models:/NAME/VERSION or models:/NAME@ALIAS"""
    data: str | None = None
    """folder or URL of one split of shards, such as data/coins/test; null takes the validation split of the model's training"""
    out: str | None = None
    """folder for the report; null takes evaluations/MODEL/SPLIT, or SPLIT-flips with flips"""
    threshold: float = setting(0.5, 0, 1)
    """probability above which a pixel is foreground, for models of one class"""
    flips: bool = False
    """average the probabilities of each image and its mirrorings, which takes four times as long"""
    size_edges: list[int] = field(default_factory=lambda: [16, 64, 256, 1024])
    """bounds between the size groups in which objects are scored, areas in pixels"""
    worst: int = setting(20, 0)
    """number of samples with the lowest IoU to show"""
    track: Literal["same", "new", "none"] = "same"
    """MLflow run for the report: same is the run that trained the model, new a new run, none logs nothing"""
    tracking_uri: str | None = None
    """MLflow server; null takes MLFLOW_TRACKING_URI, else the training's"""
    experiment: str = "deepskip"
    """MLflow experiment of a new run"""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null takes a GPU if there is any, else the CPU"""
    on_bad_sample: Literal["error", "skip"] = "error"
    """what to do with a sample that cannot be used: error ends the evaluation, skip lists it in the report and continues"""
    cache_dir: str = storage.DEFAULT_CACHE
    """folder for copies of remote shards"""
    cache_gb: float = setting(50.0, 0)
    """largest size of all copies together, gigabytes"""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Options):
    """Segment images with a trained model; running the same command again resumes an interrupted job."""

    model: str
    """coins or microorganisms (they come with DeepSkip), a run's folder (runs/NAME) or URL, a file of weights, an MLflow run's
    id, or models:/NAME/VERSION"""
    images: list[str]
    """files, folders of them, Zarr arrays, folders of shards, and URLs of each"""
    out: str
    """folder for the outputs; every machine must see it"""


@dataclass(kw_only=True)
class ExportConfig:
    """Export a trained model to ONNX and torch.export, compare the files with PyTorch, and write a model card."""

    model: str
    """coins or microorganisms (they come with DeepSkip), a run's folder (runs/NAME) or URL, a file of weights, an MLflow run's
    id, models:/NAME/VERSION or models:/NAME@ALIAS"""
    out: str | None = None
    """folder for the files; null takes exports/MODEL"""
    formats: list[Literal["onnx", "pt2", "safetensors"]] = field(default_factory=lambda: ["onnx", "pt2"])
    """files to write: onnx for ONNX runtimes, pt2 for torch.export.load, safetensors for DeepSkip: the weights without code"""
    evaluation: str | None = None
    """report.json of deepskip evaluate; its metrics and best threshold are copied into the card"""
    tracking_uri: str | None = None
    """MLflow server; null takes MLFLOW_TRACKING_URI, else the database in runs/"""


@dataclass(kw_only=True)
class AuditConfig:
    """Check that a run which followed a stream has trained on each sample exactly once."""

    run: str
    """the run's folder (runs/NAME); deepskip audit runs/NAME is short for it"""
    out: str | None = None
    """CSV file to write, with a line for each sample of each step: step, generation, sample, key, replayed"""
