"""Find the checkpoint of a model by any of its names: a folder, a file, a URL, an MLflow run or a registered model."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepskip import checkpoint, publishing
from deepskip.data_shards import storage
from deepskip.predictor import Predictor

# place in a logged model of the checkpoint that it was made from
CHECKPOINT = "extra_files/checkpoint.pt"
STORAGE = Path("runs")
RUN_ID = re.compile(r"[0-9a-f]{32}")
LOGGED_MODEL = re.compile(r"models:/(m-[0-9a-f]+)/?")


class ModelNotFound(RuntimeError):
    """A model does not exist, or no complete one does; the message says where it was searched for."""


@dataclass(frozen=True)
class Found:
    """A model that was found.

    Attributes:
        name: the name that was asked for.
        state: state of its checkpoint.
        run_folder: folder of the run on this machine; None if the name does not lead to it.
        run_id: MLflow run of its training; None if that is not known.
        asked_uri: the tracking server that was asked for; None if none was.
    """

    name: str
    state: checkpoint.ModelState
    run_folder: Path | None
    run_id: str | None
    asked_uri: str | None

    @property
    def tracking_uri(self) -> str:
        """Return the tracking URI of the model's run."""
        # imported on demand: mlflow takes a second and 125 MB to import
        from deepskip.jobs import tracking

        storage = self.run_folder.parent if self.run_folder else STORAGE.absolute()
        return tracking.tracking_uri(storage, self.asked_uri or self.state["config"]["run"].get("tracking_uri"))

    @property
    def title(self) -> str:
        """Return a short name for headings and files."""
        if self.run_folder is not None:
            return self.run_folder.name
        return self.state["config"]["run"].get("name") or re.sub(r"\W+", "-", self.name).strip("-")


def load(name: str | Path, device: str | torch.device = "cpu", tracking_uri: str | None = None) -> Predictor:
    """Load a model by any of its names, as `deepskip.load` does by its path.

    Args:
        name: as in `find`.
        device: where the model computes.
        tracking_uri: as in `find`.

    Returns:
        The model.

    Raises:
        ModelNotFound: there is no such model, or it cannot be built here.
    """
    return Predictor(find(name, tracking_uri).state, device)


def find(name: str | Path, tracking_uri: str | None = None) -> Found:
    """Find a model by any of its names.

    Args:
        name: folder or URL of a run or of a training's publish.path, a checkpoint file, or an MLflow name: a run's ID or
            runs:/ID, models:/NAME/VERSION, models:/NAME@ALIAS, models:/m-ID.
        tracking_uri: MLflow server; None takes MLFLOW_TRACKING_URI, else the database in runs/.

    Returns:
        The model's checkpoint and origin.

    Raises:
        ModelNotFound: there is no such model, or it cannot be built here.
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
        sha256 = published(text)
        state = publishing.load(name, sha256) if sha256 else checkpoint.load_for_inference(name)
    except (checkpoint.CheckpointError, publishing.BrokenPublication, OSError) as error:
        raise ModelNotFound(str(error)) from error
    folder = None
    if "://" not in text:
        path = Path(text).absolute()
        # runs/NAME/checkpoints/best.pt, or runs/NAME itself
        folder = path.parent.parent if path.parent.name == checkpoint.FOLDER else path if path.is_dir() else None
    return Found(text, state, folder, state.get("mlflow_run_id"), tracking_uri)


def published(name: str) -> str | None:
    """Return the digest of the model that is published in a folder or at a URL, or None if none is.

    Raises:
        BrokenPublication: if the pointer is damaged.
    """
    if RUN_ID.fullmatch(name) or name.startswith(("runs:/", "models:/")):
        return None
    try:
        pointer = publishing.read_pointer(storage.locate(name))
    # What is wrong with the place is reported when the model is looked for.
    except OSError:
        return None
    return None if pointer is None else pointer.sha256


def _find_tracked(name: str, asked: str | None) -> Found:
    from deepskip.jobs import tracking

    uri = tracking.tracking_uri(STORAGE.absolute(), asked)
    database = Path(uri.removeprefix("sqlite:///"))
    # mlflow would create an empty database
    if uri.startswith("sqlite:///") and not database.is_file():
        raise ModelNotFound(
            f"{name} is an MLflow name, but there is no MLflow database at {database}; "
            "set tracking_uri or MLFLOW_TRACKING_URI, or name the run's folder (runs/NAME)"
        )
    with tempfile.TemporaryDirectory(prefix="deepskip-model-") as folder:
        try:
            path = tracking.download(uri, _checkpoint_uri(uri, name), folder)
        # requests, sqlalchemy, mlflow and the artifact stores raise different errors
        except Exception as error:
            raise ModelNotFound(
                f"MLflow at {uri} has no DeepSkip model {name} (one with {CHECKPOINT} among its files): "
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
    # a run's ID alone, without a path of an artifact
    if name.startswith("runs:/") and "/" not in name.removeprefix("runs:/").rstrip("/"):
        name = f"{name.rstrip('/')}/{tracking.MODEL}"
    return f"{name.rstrip('/')}/{CHECKPOINT}"


def for_inference(state: checkpoint.ModelState) -> dict[str, Any]:
    """Return a checkpoint's state without the parts that only a training needs."""
    return {key: value for key, value in state.items() if key not in ("format", "version", "optimizer", "rng")}
