"""Store what a GPU run says of the new launches: python -m deepskip.kernels.bench.store_timings DIR [--file FILE].

From then on `run.kernels: auto` takes them on that GPU where they were faster.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepskip.kernels import timings
from deepskip.kernels.bench import cases, journal
from deepskip.kernels.bench.gpu_page import median
from deepskip.kernels.timings import Timing

Row = dict[str, Any]
STAGE = re.compile(r"level (\d+), (\d+)x(\d+)x(\d+)(, next)?")
NORM = re.compile(r"level (\d+) norm \+ ReLU, next, (\d+)x(\d+)x(\d+)")
LOSS = re.compile(r"loss, (\d+)x(\d+)x(\d+)x(\d+)(, next)?")
CONVOLUTION = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)x(\d+)")
BOTH = "forward + backward"


def pairs(rows: list[Row]) -> Iterator[tuple[str, int, float, float]]:
    """Yield operator, pixels, and the seconds of the established and of the new launches, forward and backward.

    Args:
        rows: rows of a GPU run.
    """
    apart: dict[tuple[str, int], dict[bool, float]] = {}
    for row in rows:
        size, operator = str(row.get("size", "")), str(row.get("operator", ""))
        if "seconds" not in row or row.get("toy"):
            continue
        if row["suite"] == "launches" and (found := STAGE.fullmatch(size)) and operator == f"stage {BOTH}":
            u, N, H, W = map(int, found.groups()[:4])
            name = timings.stage(cases.BASE << (u - 1), cases.LEVELS - u + 1)
            apart.setdefault((name, N * H * W), {})[found[5] is not None] = median(row)
        elif row["suite"] == "launches" and (found := LOSS.fullmatch(size)) and operator == "loss + gradient":
            N, V, H, W = map(int, found.groups()[:4])
            apart.setdefault((timings.loss(V), N * H * W), {})[found[5] is not None] = median(row)
        elif row["suite"] == "launches" and (found := CONVOLUTION.fullmatch(size)) and operator.endswith(f", {BOTH}"):
            N, C, K, H, W = map(int, found.groups())
            yield timings.convolution(C, K), N * H * W, median(row, "plain_seconds"), median(row)
        elif row["suite"] == "norm contenders" and (found := NORM.fullmatch(size)) and operator == BOTH:
            u, N, H, W = map(int, found.groups())
            yield timings.norm(cases.BASE << (u - 1)), N * H * W, median(row), median(row, "deepskip_seconds")
    for (name, pixels), sides in apart.items():
        if len(sides) == 2:
            yield name, pixels, sides[False], sides[True]


def timings_of(rows: list[Row]) -> dict[str, list[Timing]]:
    """Return the timings of a run by operator; the gate has kept what is wrong from being timed.

    Args:
        rows: rows of a GPU run.
    """
    found: dict[str, list[Timing]] = {}
    for name, pixels, established, new in pairs(rows):
        found.setdefault(name, []).append(Timing(pixels, round(established / new, 3)))
    return found


def main() -> int:
    """Read the rows, and add the GPU's timings to the file, in place of earlier ones of the same GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path, help="folder of the run, with rows.jsonl")
    parser.add_argument("--file", type=Path, default=timings.FILE)
    arguments = parser.parse_args()
    rows, _ = journal.read(arguments.run / "rows.jsonl")
    gpus = {row["name"] for row in rows if row.get("suite") == "environment" and row.get("device") == "cuda"}
    found = timings_of(rows)
    if len(gpus) != 1 or not found:
        sys.exit(f"error: {arguments.run / 'rows.jsonl'} has no timings of one GPU")
    stored = timings.load(arguments.file)
    stored[gpus.pop()] = found
    timings.save(stored, arguments.file)
    for name, each in sorted(found.items()):
        print(f"{name}: {', '.join(f'{one.pixels} pixels {one.ratio:.2f} x' for one in sorted(each))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
