"""Run one cell of a comparison in its own process: a training without Ray, then `deepskip evaluate` on the test split.

An interrupted `python -m deepskip.jobs.comparison.cell CELL.JSON` resumes if it is started again.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from deepskip import checkpoint
from deepskip.data_shards import storage
from deepskip.jobs import evaluate, runs
from deepskip.jobs.comparison.grid import TEST
from deepskip.jobs.settings import configured
from deepskip.jobs.train import train_here


def main() -> None:
    """Train and test the cell of the file that the command line names."""
    complete(Path(sys.argv[1]))


def complete(path: Path) -> dict[str, Any]:
    """Train and test a cell in this process, from where an earlier process stopped, and return the report of its test.

    The report in the folder TEST of the run marks the cell as done.

    Args:
        path: The cell's JSON file, as `grid.write_cell` wrote it.
    """
    cell, folder = runs.read_json(path), path.parent
    config = configured(cell["config"], str(path))
    summary = train_here(config, folder.name)
    last = cell.get("checkpoint") == "last"
    model = checkpoint.step_path(folder, summary["steps"]) if last else folder
    options = ["--model", str(model), "--track", "none", "--flips", str(cell["flips"]).lower(), "--worst", "0"]
    data = config.data
    options += ["--on_bad_sample", data.on_bad_sample, "--cache_dir", data.cache_dir, "--cache_gb", str(data.cache_gb)]
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker or 1)))
    if config.cluster.gpu is False:
        options += ["--device", "cpu"]
    if cell["threshold"] == "validation":
        report = test(folder / "threshold", data.path, "val", options)
        if report["threshold"] is not None:
            options += ["--threshold", str(report["classes"][0]["best_threshold"])]
    return test(folder / TEST, data.path, cell["test"], options)


def test(out: Path, data: str, split: str, options: list[str]) -> dict[str, Any]:
    """Evaluate the cell's model on a split, unless there is a report already, and return the report.

    Args:
        out: Folder of the report.
        data: Folder or URL that holds the splits.
        split: Name of the split.
        options: Further options of `deepskip evaluate`.
    """
    if not (out / evaluate.REPORT).is_file():
        evaluate.main([*options, "--data", storage.join(data, split), "--out", str(out)])
    return runs.read_json(out / evaluate.REPORT)


if __name__ == "__main__":
    main()
