"""What MLflow has not taken of a run that is done, noted in the run's folder, and sent by the same command later."""

import tempfile
import threading
from pathlib import Path
from typing import Any

from data_shards import storage
from data_shards.index import load_index
from deepskip.config import Config
from jobs import runs
from jobs.settings import cache_of

FILE = "unsent.json"
# a slow server gets the model within so long, or with the next call of the same command
MODEL_SECONDS = 120.0
NOT_TAKEN = "warning: MLflow at {uri} did not take everything, the same command sends it: {fault}"


def note(folder: Path, what: dict[str, Any]) -> None:
    """Notes more that MLflow has not got: "status", with the metrics and files before it, or "model"."""
    runs.write_json(folder / FILE, runs.read_json(folder / FILE) | what)


def send(folder: Path, config: Config) -> None:
    """Sends what MLflow did not take of a run that is finished, its status above all."""
    from jobs import tracking

    unsent = runs.read_json(folder / FILE)
    if not unsent:
        return
    uri = tracking.tracking_uri(folder.parent, config.run.tracking_uri)
    run_id = runs.read_json(folder / runs.RECORD)["mlflow_run_id"]
    if "status" in unsent:
        validation = load_index(storage.join(config.data.path, "val"), cache_of(config))
        fault = tracking.Tracker(uri, run_id, validation.ignore_index, folder / runs.JOURNAL).finish(unsent["status"])
        if fault:
            print(NOT_TAKEN.format(uri=uri, fault=fault), flush=True)
            return
        sent(folder, "status")
    if "model" in unsent:
        if not log_model(folder, run_id):
            return
        sent(folder, "model")
    print(f"MLflow at {uri} has now what it did not take before")


def sent(folder: Path, what: str) -> None:
    """Notes that MLflow has now something of a run that it did not take before."""
    left = {key: value for key, value in runs.read_json(folder / FILE).items() if key != what}
    if left:
        runs.write_json(folder / FILE, left)
    else:
        (folder / FILE).unlink(missing_ok=True)


def log_model(run: Path, run_id: str) -> bool:
    """Logs the best checkpoint's model to MLflow, and tells whether it is there.

    A server that is away, or takes more than MODEL_SECONDS, costs a warning and not the training.
    """
    from deepskip import checkpoint
    from deepskip.inference import build_segmenter
    from jobs import models, tracking

    faults: list[str] = [f"it takes more than {MODEL_SECONDS:g} s; the same command tries again"]

    def log(folder: str) -> None:
        try:
            state = checkpoint.load_for_inference(run)
            segmenter = build_segmenter(state)
            if reason := getattr(segmenter.network, "not_exported", None):
                print(f"the model is not logged to MLflow: {reason}", flush=True)
                faults.clear()
                return
            path = Path(folder) / Path(models.CHECKPOINT).name
            checkpoint.save(models.for_inference(state), path)
            tracking.log_model(run_id, segmenter, path)
            faults.clear()
        # mlflow, torch.export and the network each have their own errors; the checkpoint is safe on disk
        except Exception as error:
            faults[:] = [" ".join(str(error).split())[:300]]

    with tempfile.TemporaryDirectory(prefix="deepskip-model-", ignore_cleanup_errors=True) as folder:
        thread = threading.Thread(target=log, args=[folder], daemon=True)
        thread.start()
        thread.join(MODEL_SECONDS)
        found = list(faults)
    for fault in found:
        print(f"warning: the model was not logged to MLflow: {fault}", flush=True)
    return not found
