"""Finds the checkpoint behind any name of a model: a folder, a file, a URL, an MLflow run, a registered model."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepskip import checkpoint
from deepskip.predictor import Predictor

# where a logged model keeps the checkpoint that it was made from
CHECKPOINT = "extra_files/checkpoint.pt"
STORAGE = Path("runs")
RUN_ID = re.compile(r"[0-9a-f]{32}")
LOGGED_MODEL = re.compile(r"models:/(m-[0-9a-f]+)/?")


class ModelNotFound(RuntimeError):
    """There is no such model, or none that is whole; says where it was looked for."""


@dataclass(frozen=True)
class Found:
    """A model: the name it was asked for by, its checkpoint's state, and the MLflow run that trained it, where that is known.

    run_folder: None where the model was not named by its folder. asked_uri: the tracking server that was asked for, if any.
    """

    name: str
    state: checkpoint.State
    run_folder: Path | None
    run_id: str | None
    asked_uri: str | None

    @property
    def tracking_uri(self) -> str:
        """Where the run is tracked."""
        # for who asks: mlflow takes a second and 125 MB to import
        from deepskip.jobs import tracking

        storage = self.run_folder.parent if self.run_folder else STORAGE.absolute()
        return tracking.tracking_uri(storage, self.asked_uri or self.state["config"]["run"].get("tracking_uri"))

    @property
    def title(self) -> str:
        """A short name for headings and files."""
        if self.run_folder is not None:
            return self.run_folder.name
        return self.state["config"]["run"].get("name") or re.sub(r"\W+", "-", self.name).strip("-")


def load(name: str | Path, device: str | torch.device = "cpu", tracking_uri: str | None = None) -> Predictor:
    """Loads a model by any of its names, as `deepskip.load` does by its path; raises ModelNotFound."""
    return Predictor(find(name, tracking_uri).state, device)


def find(name: str | Path, tracking_uri: str | None = None) -> Found:
    """Finds a model by the folder or URL of its run, a checkpoint file, or a name of MLflow's; raises ModelNotFound.

    MLflow's names: a run's id or runs:/ID, models:/NAME/VERSION, models:/NAME@ALIAS, models:/m-ID. tracking_uri: by default
    MLFLOW_TRACKING_URI, else the database in runs/.
    """
    try:
        return _found(name, tracking_uri)
    except ImportError as error:
        raise ModelNotFound(f"{name} cannot be built here: {error}") from error


def _found(name: str | Path, tracking_uri: str | None) -> Found:
    text = str(name)
    if RUN_ID.fullmatch(text) or text.startswith(("runs:/", "models:/")):
        return _find_tracked(text, tracking_uri)
    try:
        state = checkpoint.load_for_inference(name)
    except (checkpoint.CheckpointError, OSError) as error:
        raise ModelNotFound(str(error)) from error
    folder = None
    if "://" not in text:
        path = Path(text).absolute()
        # runs/NAME/checkpoints/best.pt, or runs/NAME itself
        folder = path.parent.parent if path.parent.name == checkpoint.FOLDER else path if path.is_dir() else None
    return Found(text, state, folder, state.get("mlflow_run_id"), tracking_uri)


def _find_tracked(name: str, asked: str | None) -> Found:
    from deepskip.jobs import tracking

    uri = tracking.tracking_uri(STORAGE.absolute(), asked)
    database = Path(uri.removeprefix("sqlite:///"))
    # mlflow would make an empty one
    if uri.startswith("sqlite:///") and not database.is_file():
        raise ModelNotFound(
            f"{name} is a name of MLflow's, and there is no MLflow database at {database}; "
            "set tracking_uri or MLFLOW_TRACKING_URI, or name the run's folder (runs/NAME)"
        )
    with tempfile.TemporaryDirectory(prefix="deepskip-model-") as folder:
        try:
            path = tracking.download(uri, _checkpoint_uri(uri, name), folder)
        # requests, sqlalchemy, mlflow and the artifact stores each have their own errors
        except Exception as error:
            raise ModelNotFound(
                f"MLflow at {uri} has no DeepSkip model {name}, that is, none with {CHECKPOINT} among its files: "
                f"{tracking.in_short(error)}"
            ) from error
        try:
            state = checkpoint.read_model(path)
        except checkpoint.CheckpointError as error:
            raise ModelNotFound(f"MLflow at {uri}: {error}") from error
    return Found(name, state, None, state.get("mlflow_run_id"), uri)


def _checkpoint_uri(uri: str, name: str) -> str:
    from deepskip.jobs import tracking

    if found := LOGGED_MODEL.fullmatch(name):
        return f"{tracking.model_location(uri, found[1])}/{CHECKPOINT}"
    if RUN_ID.fullmatch(name):
        name = f"runs:/{name}"
    # a run's id alone, and nothing behind it
    if name.startswith("runs:/") and "/" not in name.removeprefix("runs:/").rstrip("/"):
        name = f"{name.rstrip('/')}/{tracking.MODEL}"
    return f"{name.rstrip('/')}/{CHECKPOINT}"


def for_inference(state: checkpoint.State) -> dict[str, Any]:
    """Gives a state without what only a training needs."""
    return {key: value for key, value in state.items() if key not in ("format", "version", "optimizer", "rng")}
