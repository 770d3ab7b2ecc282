"""The comparison: python -m jobs.compare --config jobs/configs/compare.yaml runs the grid of networks, categories and seeds."""

import importlib.util
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from jobs.comparison.grid import trained_otherwise
from jobs.comparison.processes import Processes
from jobs.comparison.rows import read_grid
from jobs.comparison.run import run
from jobs.settings import stop


def main(argv: list[str] | None = None) -> None:
    """Runs the grid, or what is left of it; exit status 1 where cells failed or are left."""
    arguments = sys.argv[1:] if argv is None else argv
    command = f"python -m jobs.compare {shlex.join(arguments)}"
    grid = read_grid(arguments)
    # workers on other machines have other working folders
    grid = replace(grid, out=str(Path(grid.out).absolute()), data=str(Path(grid.data).absolute()))
    if fault := trained_otherwise(grid):
        stop(fault)
    with_ray = importlib.util.find_spec("ray") is not None if grid.ray is None else grid.ray
    if with_ray:
        # heavy, and not there on every machine with a GPU
        from jobs import tracking
        from jobs.comparison.mlflow_runs import Runs
        from jobs.comparison.ray_tasks import RayTasks

        try:
            runs = Runs(grid)
        except tracking.TrackingUnreachable as error:
            stop(str(error))
        counts = run(grid, RayTasks(grid, command), runs.take)
        runs.finish(not counts["left"])
    else:
        counts = run(grid, Processes(grid, command))
    print(f"{grid.out}: {counts['done']} cells done, {counts['failed']} failed, {counts['left']} left")
    raise SystemExit(1 if counts["failed"] or counts["left"] else 0)


if __name__ == "__main__":
    main()
