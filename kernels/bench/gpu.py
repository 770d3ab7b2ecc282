"""Run everything that is measured on a GPU, within a time limit, losing nothing.

python -m deepskip.kernels.bench.gpu --out DIR --seconds 540

It needs only torch, triton and numpy. Each part runs in its own process, in the order of PARTS, with the rest of the time up to
its share. A part that hangs or crashes does not affect the others. Every row is appended to DIR/rows.jsonl as soon as it is
measured (`journal`), with all of its timings. Without a GPU everything runs at toy size through Triton's interpreter: a
rehearsal, whose times mean nothing. `python -m deepskip.kernels.bench.gpu_page DIR` makes the page and the figures.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import torch

from deepskip.kernels.bench import journal


class Part(NamedTuple):
    """A process of the run.

    Attributes:
        module: module that runs as the process.
        phases: phases that it runs.
        share: share of the whole time by which it must have ended.
    """

    module: str
    phases: tuple[str, ...]
    share: float


PARTS = (
    Part("deepskip.kernels.bench.gpu_phases", ("machine", "bandwidth", "gate", "launches"), 0.2),
    Part("deepskip.kernels.bench.gpu_phases", ("candidates",), 0.42),
    Part("deepskip.kernels.bench.gpu_phases", ("contenders",), 0.68),
    Part("deepskip.bench.gpu_network", ("network",), 0.86),
    Part("deepskip.kernels.bench.gpu_phases", ("other types",), 0.9),
    Part("deepskip.kernels.bench.gpu_phases", ("autotune",), 1.0),
)
# Seconds that a part may take beyond its time before it is killed, so that the last part still ends in time.
GRACE = 3.0


def run_part(part: Part, out: Path, ends: float) -> None:
    """Run a part until it or its time ends, and write a row that says which.

    Args:
        part: part to run.
        out: folder of rows.jsonl and of the parts' output.
        ends: Unix time at which the part must have ended.
    """
    rows = out / "rows.jsonl"
    left = ends - time.time() - GRACE
    row = {"phase": part.phases[0], "suite": "run", "part": " ".join(part.phases)}
    if left <= 0:
        journal.append(rows, row | {"skipped": "no time was left"})
        return
    command = [sys.executable, "-m", part.module, *part.phases, "--out", str(out), "--until", str(ends - GRACE)]
    # Set before Triton is imported, which decides then whether kernels are interpreted.
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    started = time.time()
    with (out / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        # SIGTERM to this process also ends the part.
        stop = _stop_with(process)
        try:
            code = process.wait(timeout=left + GRACE - 1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        finally:
            signal.signal(signal.SIGTERM, stop)
    took = round(time.time() - started, 1)
    if code == 0:
        journal.append(rows, row | {"took_seconds": took})
    else:
        how = "was killed at the end of its time" if code is None else f"ended with status {code}"
        journal.append(rows, row | {"took_seconds": took, "failed": f"{how}; {out / 'output.txt'} has its output"})


def _stop_with(process: subprocess.Popen[bytes]) -> signal.Handlers:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        process.kill()
        sys.exit(128 + number)

    return signal.signal(signal.SIGTERM, stop)  # type: ignore[return-value]


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.kernels.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, a new one")
    parser.add_argument("--seconds", type=float, default=540, help="the whole run's time; 540 by default")
    arguments = parser.parse_args()
    started = time.time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if (arguments.out / "rows.jsonl").exists():
        parser.error(f"{arguments.out} has the rows of another run; choose a new folder")
    for part in PARTS:
        run_part(part, arguments.out, started + part.share * arguments.seconds)
        print(f"{time.time() - started:6.1f} s  {' '.join(part.phases)}", flush=True)
    rows, broken = journal.read(arguments.out / "rows.jsonl")
    print(f"{len(rows)} rows in {arguments.out / 'rows.jsonl'}" + (f", {broken} incomplete lines" if broken else ""))
    for row in rows:
        if "failed" in row:
            print(f"{row['part'] if 'part' in row else row['phase']}: {row['failed']}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
