"""Pack the sets, train and test one network on one of them, and draw the results.

Run it as `python -m deepskip.jobs.bench.published pack | run | page`; docs/benchmark-runs.md explains it.
"""

import argparse
import shlex
import sys
from pathlib import Path

from deepskip.data_shards.sources.split import PackError
from deepskip.jobs.bench.published import data, page, runs
from deepskip.jobs.settings import stop


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    built = argparse.ArgumentParser(prog="python -m deepskip.jobs.bench.published", description=__doc__)
    commands = built.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="pack a set by its official split")
    pack.add_argument("set", choices=data.SETS)
    pack.add_argument("--folder", type=Path, nargs="+", required=True, help="folders that hold images/ and masks/")
    pack.add_argument(
        "--split",
        type=Path,
        required=True,
        help="CSV with columns stem,split, or a folder with train*.txt and test*.txt",
    )
    pack.add_argument("--out", type=Path, required=True, help="folder for the parts search, official and distinct")
    pack.add_argument("--val_share", type=float, default=0.1, help="share of the training split for validation (0.1)")
    pack.add_argument("--seed", type=int, default=0, help="seed of the validation images (0)")
    pack.add_argument("--near_duplicates", type=Path, help="list of training images that the part distinct omits")
    run = commands.add_parser("run", help="train and test; the same command resumes, and repeats nothing that is done")
    run.add_argument("set", choices=data.SETS)
    run.add_argument("--data", type=Path, required=True, help="folder that `pack` made")
    run.add_argument("--recipe", type=Path, required=True, help="YAML of the training's settings")
    run.add_argument("--part", choices=data.PARTS, default="official", help="search is tested on validation images")
    run.add_argument("--network", default="deepskip", help="value of model.network (deepskip)")
    run.add_argument("--settings", default="{}", help="YAML of settings that override the recipe")
    run.add_argument("--seeds", type=int, nargs="+", default=[0])
    run.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the runs")
    run.add_argument("--table", type=Path, default=page.RUNS, help="CSV to which a row is added")
    drawn = commands.add_parser("page", help="write the table and the figure")
    drawn.add_argument("--table", type=Path, default=page.RUNS, help="CSV of the runs")
    drawn.add_argument("--out", type=Path, help="folder for results.md and iou.svg; by default they go into the docs")
    return built


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: status 2 for invalid arguments, settings or data.
    """
    words = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(words)
    if arguments.command == "pack":
        try:
            counts = data.pack(
                arguments.set, arguments.folder, arguments.split, arguments.out,
                val_share=arguments.val_share, seed=arguments.seed, near_duplicates=arguments.near_duplicates,
            )  # fmt: skip
        except PackError as error:
            stop(str(error))
        for part, sizes in counts.items():
            print(f"{arguments.out / part}: " + ", ".join(f"{count} {split}" for split, count in sizes.items()))
    elif arguments.command == "run":
        for seed in arguments.seeds:
            trial = runs.Trial(
                arguments.set, arguments.part, arguments.network, seed, arguments.recipe, arguments.settings
            )
            row = runs.run(trial, arguments.data, arguments.out, arguments.table)
            print(", ".join(f"{name} {row[name]}" for name in ("set", "part", "network", "seed", *runs.METRICS)))
    else:
        print(shlex.join(map(str, page.write(arguments.table, arguments.out))))


if __name__ == "__main__":
    main()
