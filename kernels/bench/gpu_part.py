"""A process of a GPU run: jobs one after the other, each on its own, every row written as soon as it is measured."""

import argparse
import ctypes
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepskip import kernels
from deepskip.kernels.bench import journal, measure

Row = dict[str, Any]
# The known values of a row, and a function that measures the rest: one row or more.
Job = tuple[Row, Callable[[], Row | list[Row]]]


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        stages: (N, H, W) of level 1.
        levels: decoder levels.
        losses: (N, V, H, W) of logits.
        bandwidths: bytes to move.
        warm: calls before timing.
        rounds: timed calls.
        dtype: dtype of everything that is timed.
        checked: other dtypes that the gate compares.
        next_levels: decoder levels with the launches that no GPU has timed yet.
        convolutions: (N, C, K, H, W) with such launches.
    """

    stages: tuple[tuple[int, int, int], ...]
    levels: tuple[int, ...]
    losses: tuple[tuple[int, int, int, int], ...]
    bandwidths: tuple[int, ...]
    warm: int
    rounds: int
    dtype: torch.dtype
    checked: tuple[torch.dtype, ...]
    next_levels: tuple[int, ...]
    convolutions: tuple[tuple[int, int, int, int, int], ...]


REAL = Sizes(
    ((16, 512, 512), (8, 1024, 1024)), (1, 2, 3, 4),
    ((16, 1, 1024, 1024), (8, 19, 512, 512), (4, 1, 128, 128), (32, 1, 512, 512)),
    (2**30, 2**31, 2**32), 3, 30, torch.bfloat16, (torch.float16, torch.float32),
    (1, 2), ((16, 8, 8, 512, 512), (16, 40, 8, 512, 512), (16, 3, 8, 512, 512)),
)  # fmt: skip
TOY = Sizes(
    ((1, 16, 16),), (3,), ((2, 1, 8, 8), (1, 3, 8, 8)), (2**20,), 0, 1, torch.float32, (torch.float16,), (4,),
    ((1, 4, 4, 3, 4),),
)  # fmt: skip


class Run(NamedTuple):
    """Where jobs run.

    Attributes:
        device: device of the jobs.
        sizes: what they measure.
        until: Unix time at which the run ends.
        compile_options: options of torch.compile.
        wrong: operators that the gate found wrong.
    """

    device: torch.device
    sizes: Sizes
    until: float
    compile_options: dict[str, Any]
    wrong: frozenset[str]

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.time()


Phase = Callable[[Run], Iterator[Job]]


def timed(run: Run, calls: Mapping[str, Callable[[], Any]]) -> Row:
    """Time calls alternately.

    Returns:
        Row with all seconds: the first call's under "seconds", the others' under NAME_seconds.
    """
    times = measure.turns(calls, run.sizes.rounds, run.device, run.sizes.warm)
    first, *others = calls
    return {"seconds": times[first]} | {f"{name}_seconds": times[name] for name in others}


def die_with_parent() -> None:
    """Have Linux kill this process when its parent ends, so that a killed run leaves no process behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def wrong_operators(rows: list[Row], dtype: torch.dtype) -> frozenset[str] | None:
    """Return the operators that the gate found wrong in a dtype, or None if the gate did not finish."""
    mine = [row for row in rows if row.get("suite") == "gate" and row.get("dtype") == str(dtype)]
    if not any(row.get("complete") for row in mine):
        return None
    return frozenset(row["operator"] for row in mine if row.get("right") is False)


def run_job(job: Job, about: Row, rows: Path) -> None:
    """Run a job and append its rows, or a row with its error.

    Args:
        job: job to run.
        about: values for each of its rows.
        rows: file of the rows.

    Raises:
        RuntimeError: if CUDA itself failed, so that this process can no longer use the card.
    """
    row, measured = job
    try:
        found = measured()
        for one in found if isinstance(found, list) else [found]:
            journal.append(rows, about | row | one)
    except Exception as error:
        traceback.print_exc()
        journal.append(rows, about | row | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
        if "CUDA error" in str(error) or "Triton Error [CUDA]" in str(error):
            raise


def run_phases(phases: Mapping[str, Phase], names: list[str], out: Path, until: float) -> None:
    """Run phases, job by job, until the time is over; skipped work leaves a row that says so.

    Args:
        phases: phases by name.
        names: phases to run.
        out: folder of rows.jsonl.
        until: Unix time at which the run ends.
    """
    die_with_parent()
    cuda = torch.cuda.is_available()
    # "auto" would fall back to plain operators if Triton cannot compile, and they would be measured as ours.
    kernels.backend.choose("triton")
    torch.backends.cudnn.benchmark = True
    # The comparison is in fp32, which tf32 would falsify.
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    sizes = REAL if cuda else TOY
    rows = out / "rows.jsonl"
    run = Run(torch.device("cuda" if cuda else "cpu"), sizes, until, {} if cuda else {"backend": "eager"}, frozenset())
    for name in names:
        about: Row = {"phase": name, "toy": not cuda}
        if name not in ("machine", "bandwidth", "gate"):
            found = wrong_operators(journal.read(rows)[0], sizes.dtype)
            if found is None:
                journal.append(rows, about | {"suite": "run", "skipped": "the comparison with float64 did not end"})
                continue
            run = run._replace(wrong=found)
        for job in phases[name](run):
            if run.left() <= 0:
                journal.append(rows, about | {"suite": "run", "skipped": "no time was left for it, or for its rest"})
                break
            run_job(job, about, rows)
        if cuda:
            journal.append(rows, about | {"suite": "clocks", **measure.card_state()})


def finite(x: float) -> float | None:
    """Return a finite number unchanged, else None, which JSON can represent."""
    return x if math.isfinite(x) else None


def arguments_of(program: str, phases: list[str], about: str | None) -> argparse.Namespace:
    """Parse the command line of a part."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("phases", nargs="*", default=phases, help=f"of {', '.join(phases)}; all by default")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl")
    parser.add_argument("--until", type=float, default=time.time() + 540, help="Unix time at which it must have ended")
    arguments = parser.parse_args()
    if unknown := set(arguments.phases) - set(phases):
        parser.error(f"unknown phase {', '.join(sorted(unknown))}; phases are {', '.join(phases)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments
