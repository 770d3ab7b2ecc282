"""Compare networks: a grid of ordinary trainings over networks, categories of data and seeds, each tested once.

Every cell is a training as `jobs.train --local` runs it, then `deepskip evaluate` on the test split. Running the same
command again resumes an interrupted comparison. The results are OUT/cells.csv, table.md,
categories.svg and parameters.svg.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from deepskip import identity
from deepskip.cluster.local import end_with_parent
from deepskip.cluster.settings import of_loopback
from deepskip.data_shards import storage, trouble
from deepskip.data_shards.bands import BandError, choose_bands
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.index import BrokenIndex, MissingIndex, load_index
from deepskip.identity import Identity
from deepskip.jobs import evaluate, runs
from deepskip.jobs.comparison import table
from deepskip.jobs.comparison.grid import TEST, Cell, Grid, cells, content_of, read_cell, read_grid, write_cell
from deepskip.jobs.runs import NOT_TRACKED
from deepskip.jobs.settings import cache_of, stop

LOG = "cell.log"
RUNNING: set[subprocess.Popen[bytes]] = set()


def check(argv: list[str]) -> None:
    """Validate the settings of a comparison.

    Args:
        argv: command-line arguments.

    Raises:
        SystemExit: status 2 after `error:` lines, if the grid is invalid.
    """
    read_grid(argv)


@trouble.told()
def main(argv: list[str] | None = None) -> None:
    """Run the cells of the grid that are not done, and write the table of all results.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: always. Status 0 if no cell failed and 1 if one did; 2 for invalid settings, and for cells in `out`
            that were trained or tested with other settings.
    """
    grid = read_grid(sys.argv[1:] if argv is None else argv)
    every = list(cells(grid))
    data = data_here(every, grid)
    if faults := [fault for cell in every if (fault := done_otherwise(cell, grid, data[kind_of(cell)]))]:
        stop("\n".join([*faults[:20], "choose another --out, or remove the folders of the cells to run again"]))
    left = [cell for cell in every if not is_done(cell, grid) and (grid.only is None or cell.network in grid.only)]
    print(f"{len(every)} cells, {len(every) - len(left)} done or not selected", flush=True)
    failed = 0
    for number, (cell, fault) in enumerate(outcomes(left, grid), 1):
        failed += fault is not None
        print(f"{number}/{len(left)} {cell}: {fault or 'done'}", flush=True)
    results = table.collect(grid)
    if results:
        paths = table.write(grid, results)
        print(f"\n{table.markdown(grid, results)}\n{', '.join(map(str, paths))}")
    print(f"{grid.out}: {len(results)} cells done, {failed} failed, {len(every) - len(results) - failed} left")
    raise SystemExit(1 if failed else 0)


def is_done(cell: Cell, grid: Grid) -> bool:
    """Return whether a cell is trained and tested."""
    return (cell.folder / TEST / evaluate.REPORT).is_file()


def kind_of(cell: Cell) -> tuple[str, str]:
    """Return what decides the data of a cell: its path and its choice of bands."""
    return cell.config.data.path, str(cell.config.data.bands)


def data_here(every: list[Cell], grid: Grid) -> dict[tuple[str, str], dict[str, Identity]]:
    """Return the identity of each split by `kind_of`, without splits that cannot be read: a finished grid needs none.

    Args:
        every: the cells of the grid.
        grid: the settings of the comparison.
    """
    found: dict[tuple[str, str], dict[str, Identity]] = {}
    for kind, config in {kind_of(cell): cell.config for cell in every}.items():
        found[kind] = {}
        for split in ("train", "val", grid.test):
            with suppress(MissingIndex, BrokenIndex, BandError, storage.StorageError):
                index = load_index(storage.join(config.data.path, split), cache_of(config))
                found[kind][split] = identity_of(choose_bands(index, config.data.bands))
    return found


def done_otherwise(cell: Cell, grid: Grid, data: Mapping[str, Identity]) -> str | None:
    """Return how an existing cell differs from the grid's settings, or from the data as it is now.

    Args:
        cell: a cell of the grid.
        grid: the settings of the comparison.
        data: identity of each split of the cell's data that can be read.

    Returns:
        The first difference as a message, or None if there is none.
    """
    record = runs.read_json(cell.folder / runs.RECORD)
    reason = runs.reason_against(cell.folder, record, asdict(cell.config), grow=False)
    if reason not in (None, runs.FINISHED):
        return f"{cell} {reason} than the grid"
    # All cells see the same data: one that was trained before generations were appended does not fit the others.
    trained = {split: data[split] for split in ("train", "val") if split in data}
    noted, accepted = record.get("data"), cell.config.data.accept
    if isinstance(noted, dict) and identity.refusal(noted, trained, accepted):
        return f"{cell} was trained on other data than is there now: {identity.changes(noted, trained)}"
    report = runs.read_json(cell.folder / TEST / evaluate.REPORT)
    tested = {grid.test: report.get("data", {}).get("identity")}
    if words := identity.changes(tested, {grid.test: data[grid.test]} if grid.test in data else {}):
        return f"{cell} was tested on other data than is there now: {words}"
    before, now = read_cell(cell.folder) if is_done(cell, grid) else {}, content_of(cell, grid)
    changed = [key for key in now if key != "config" and before and before[key] != now[key]]
    return (
        f"{cell} was tested with {changed[0]} {before[changed[0]]}, the grid has {now[changed[0]]}" if changed else None
    )


def outcomes(left: list[Cell], grid: Grid) -> Iterator[tuple[Cell, str | None]]:
    """Run cells, on Ray or as processes of this machine, and yield each as it ends.

    Args:
        left: cells to run.
        grid: the settings of the comparison.

    Yields:
        The cell and its error message, None if it succeeded.
    """
    if not left:
        return
    make_experiments(left, grid)
    files = [write_cell(cell, grid) for cell in left]
    if grid.ray:
        yield from over_ray(left, files, grid)
        return
    pool = ThreadPoolExecutor(grid.workers)
    started = {pool.submit(run_cell, file): cell for file, cell in zip(files, left, strict=True)}
    try:
        for future in as_completed(started):
            yield started[future], future.result()
    finally:
        # a comparison that is stopped starts no further cell and leaves no process behind
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            process.terminate()
        pool.shutdown()


def make_experiments(left: list[Cell], grid: Grid) -> None:
    """Create the MLflow database and the experiments of cells before the cells start.

    Several processes cannot create them at the same time. Without MLflow nothing is created.

    Args:
        left: cells to run.
        grid: the settings of the comparison.

    Raises:
        SystemExit: status 2 if a tracking server cannot be used.
    """
    if find_spec("mlflow") is None:
        return
    from deepskip.jobs import tracking

    for uri, experiment in {(cell.config.run.tracking_uri, cell.config.run.experiment) for cell in left}:
        if uri and uri != NOT_TRACKED:
            try:
                tracking.experiment_id(uri, Path(grid.out), experiment)
            except tracking.TrackingUnreachable as error:
                stop(str(error))


def run_cell(file: Path) -> str | None:
    """Run one cell in a separate process, whose output is appended to cell.log next to its run.

    Args:
        file: the cell's JSON file, as `write_cell` wrote it.

    Returns:
        The error message, or None if the cell succeeded.
    """
    log = file.with_name(LOG)
    with log.open("a") as output:
        begin = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "deepskip.jobs.comparison.cell", str(file)],
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            # however the comparison ends, no training keeps running
            preexec_fn=end_with_parent(),
        )  # fmt: skip
        RUNNING.add(process)
        status = process.wait()
        RUNNING.discard(process)
    if status == 0:
        return None
    said = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error:")] or said
    return f"exit status {status}, {errors[-1] if errors else 'no output'} ({log})"


def over_ray(left: list[Cell], files: list[Path], grid: Grid) -> Iterator[tuple[Cell, str | None]]:
    """Run cells as Ray tasks, and yield each as it ends.

    If a task's machine is lost, Ray retries the task and its training resumes.

    Args:
        left: cells to run.
        files: the JSON file of each cell.
        grid: the settings of the comparison.

    Yields:
        The cell and its error message, None if it succeeded.
    """
    # Ray reads these variables when it is imported
    for name, value in of_loopback(os.environ.get("RAY_ADDRESS")).items():
        os.environ.setdefault(name, value)
    import ray
    import ray.exceptions

    from deepskip.jobs.training.allocation import start_ray

    start_ray()
    remote = ray.remote(num_cpus=grid.cpus, num_gpus=grid.gpus, max_retries=3)(run_cell)
    running = {remote.remote(file): cell for file, cell in zip(files, left, strict=True)}
    while running:
        (ended, *_), _ = ray.wait(list(running))
        cell = running.pop(ended)
        try:
            yield cell, ray.get(ended)
        except ray.exceptions.RayError as error:
            yield cell, " ".join(str(error).split())[:300]


if __name__ == "__main__":
    main()
