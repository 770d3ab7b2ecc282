"""A model is found by each of its names, and as MLflow's own model."""

import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest

import deepskip
from deepskip import checkpoint
from deepskip.jobs import models, tracking
from tests.deepskip.test_predictor import state_of

IMAGE = np.random.default_rng(1).integers(0, 256, (45, 38, 5)).astype(np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(scope="module")
def tracked(home: Path) -> tuple[str, str, str]:
    """Return a tracked and registered run in runs/five: run id, tracking URI, id of the logged model."""
    storage = home / "runs"
    storage.mkdir()
    uri = tracking.tracking_uri(storage, None)
    run_id = tracking.start_run(uri, storage, "deepskip", "five", None, {"optim": {"steps": 1}})
    state = state_of(5, 3) | {"mlflow_run_id": run_id, "optimizer": {"large": 1}, "rng": {}}
    checkpoint.save(state, storage / "five" / checkpoint.FOLDER / checkpoint.BEST)
    path = home / "checkpoint.pt"
    checkpoint.save(models.for_inference(checkpoint.read(storage / "five" / checkpoint.FOLDER / checkpoint.BEST)), path)
    tracking.log_model(uri, run_id, deepskip.load(path).segmenter, path)
    (logged,) = mlflow.MlflowClient(uri).search_logged_models(
        [mlflow.MlflowClient(uri).get_run(run_id).info.experiment_id]
    )
    mlflow.register_model(f"runs:/{run_id}/model", "cells")
    mlflow.MlflowClient(uri).set_registered_model_alias("cells", "newest", 1)
    return run_id, uri, logged.model_id


def test_every_name_gives_the_same_model(home: Path, tracked: tuple[str, str, str]) -> None:
    run_id, uri, model_id = tracked
    expected = deepskip.load(home / "runs" / "five").predict_proba(IMAGE)
    folders = ["runs/five", "runs/five/checkpoints/best.pt", str(home / "checkpoint.pt")]
    names = [run_id, f"runs:/{run_id}", f"runs:/{run_id}/model", "models:/cells/1", "models:/cells@newest"]
    for name in (*folders, *names, f"models:/{model_id}"):
        # A new process would not know that server.
        mlflow.set_tracking_uri(f"sqlite:///{home / 'other.db'}")
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        np.testing.assert_array_equal(models.load(name).predict_proba(IMAGE), expected)
        found = models.find(name)
        assert (found.run_id, found.tracking_uri) == (run_id, uri), name
        assert found.run_folder == (home / "runs" / "five" if name in folders[:2] else None)
    assert "optimizer" not in models.find(run_id).state
    assert models.find("runs/five").title == "five"
    assert not (home / "other.db").exists()


def test_mlflow_itself_runs_the_model_on_batches(tracked: tuple[str, str, str], home: Path) -> None:
    _, uri, model_id = tracked
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(f"models:/{model_id}")
    own = deepskip.load(home / "runs" / "five")
    for N, H, W in ((1, 45, 38), (3, 17, 64)):
        images = np.random.default_rng(N).integers(0, 256, (N, H, W, 5))
        found = model.predict(images.transpose(0, 3, 1, 2).astype(np.float32))
        np.testing.assert_allclose(found, own.predict_proba(images).transpose(0, 3, 1, 2), atol=1e-5)
    with pytest.raises(mlflow.MlflowException, match="Failed to enforce schema"):
        model.predict(np.zeros((1, 4, 32, 32), np.float32))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/none", "does not exist; name a run's folder"),
        ("0" * 32, "has no DeepSkip model 0000"),
        ("models:/none/1", "has no DeepSkip model models:/none/1"),
        ("models:/m-00000000000000000000000000000000", "has no DeepSkip model"),
        ("models:/cells/9", "has no DeepSkip model"),
    ],
)
def test_what_is_not_there(tracked: tuple[str, str, str], name: str, said: str) -> None:
    with pytest.raises(models.ModelNotFound, match=said):
        models.find(name)


def test_without_a_database_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(models.ModelNotFound, match=r"no MLflow database at .*runs/mlflow.db"):
        models.find("0" * 32)
    assert not list(tmp_path.iterdir())
