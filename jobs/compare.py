"""The comparison: python -m jobs.compare --config jobs/configs/compare.yaml runs the grid of networks, categories and seeds."""

import shlex
import sys

from jobs.comparison.processes import Processes
from jobs.comparison.rows import read_grid
from jobs.comparison.run import run


def main(argv: list[str] | None = None) -> None:
    """Runs the grid, or what is left of it; exit status 1 where cells failed."""
    arguments = sys.argv[1:] if argv is None else argv
    grid = read_grid(arguments)
    command = f"python -m jobs.compare {shlex.join(arguments)}"
    counts = run(grid, Processes(grid, command))
    print(f"{grid.out}: {counts['done']} cells done, {counts['failed']} failed, {counts['left']} left")
    raise SystemExit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
