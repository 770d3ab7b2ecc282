"""The comparison in MLflow: one run for the grid, a child run for each cell; never in the grid's way."""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param

from deepskip import files
from jobs import tracking
from jobs.comparison import grid as results
from jobs.comparison.rows import Grid
from jobs.comparison.work import Task

NOTE = "mlflow.json"


class Runs:
    """The grid's run, the same one each time that the grid is gone on with."""

    def __init__(self, grid: Grid) -> None:
        """Makes the run, or takes it up; raises tracking.TrackingUnreachable."""
        out = Path(grid.out)
        uri = tracking.tracking_uri(out, grid.tracking_uri)
        settings = {key: value for key, value in asdict(grid).items() if key != "networks"}
        known = (results.read(out / NOTE) or {}).get("run_id")
        self.run_id = tracking.start_run(uri, out, grid.experiment, out.name, known, {"grid": settings})
        files.write(out / NOTE, f'{{"run_id": "{self.run_id}"}}'.encode())
        self.client = mlflow.MlflowClient(uri)
        self.experiment_id = self.client.get_run(self.run_id).info.experiment_id

    def take(self, task: Task, record: dict[str, Any]) -> None:
        """Logs a cell that ended as a child run: its metrics and curves, or its error; what the server refuses is lost."""
        try:
            self.log(task, record)
        # requests, sqlalchemy and mlflow each have their own errors
        except Exception as error:
            print(f"warning: MLflow does not take {task}, the grid goes on: {tracking.in_short(error)}", flush=True)

    def log(self, task: Task, record: dict[str, Any]) -> None:
        """Logs a cell; raises what MLflow raises."""
        assert task.cell is not None
        tags = {"mlflow.parentRunId": self.run_id}
        child = self.client.create_run(self.experiment_id, tags=tags, run_name=str(task)).info.run_id
        params = [Param(key, str(value)) for key, value in asdict(task.cell).items()]
        if error := record.get("error"):
            self.client.set_tag(child, "error", error)
            self.client.log_batch(child, params=params)
            self.client.set_terminated(child, "FAILED")
            return
        now = int(time.time() * 1000)
        metrics = [
            Metric(f"{split}/{name}", value, now, record["steps"])
            for split in ("validation", "test")
            for name, value in record[split].items()
            if value is not None
        ]
        metrics += [
            Metric(f"curves/{split}/{name}", value, now, point["step"])
            for split, points in record["curves"].items()
            for point in points
            for name, value in point.items()
            if name != "step" and value is not None
        ]
        for start in range(0, len(metrics), tracking.MOST_METRICS):
            self.client.log_batch(child, metrics[start : start + tracking.MOST_METRICS], params if start == 0 else ())
        self.client.set_terminated(child, "FINISHED")

    def finish(self, whole: bool) -> None:
        """Closes the grid's run."""
        with contextlib.suppress(Exception):
            self.client.set_terminated(self.run_id, "FINISHED" if whole else "KILLED")
