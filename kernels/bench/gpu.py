"""One run of all that is measured on a GPU, within a time, losing nothing.

python -m deepskip.kernels.bench.gpu --out DIR --seconds 540

Needs torch, triton and numpy only. Each part runs in a process of its own, in the order of PARTS, with what is left of the time
up to its share; a part that hangs or crashes takes no other with it. Every row goes to DIR/rows.jsonl when it is there
(`journal`), with all of its timings. Without a GPU everything runs at toy size through Triton's interpreter: a rehearsal, whose
times say nothing. `python -m deepskip.kernels.bench.gpu_page DIR` makes the page and the figures.
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
    """A process of the run: its module and phases, and the share of the whole time by which it must have ended."""

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
# what a part may take beyond its time before it is killed, while the last part still ends in time
GRACE = 3.0


def run_part(part: Part, out: Path, ends: float) -> None:
    """Run a part until it ends or its time does, and write a row that says which."""
    rows = out / "rows.jsonl"
    left = ends - time.time() - GRACE
    row = {"phase": part.phases[0], "suite": "run", "part": " ".join(part.phases)}
    if left <= 0:
        journal.append(rows, row | {"skipped": "no time was left"})
        return
    command = [sys.executable, "-m", part.module, *part.phases, "--out", str(out), "--until", str(ends - GRACE)]
    # before a part first imports Triton: its kernels are made for the interpreter, or not, as they are read
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    started = time.time()
    with (out / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        # this process's end is that of its part too
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
        journal.append(rows, row | {"took_seconds": took, "failed": f"{how}; {out / 'output.txt'} has its last words"})


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
        parser.error(f"{arguments.out} has the rows of another run; name a new folder")
    for part in PARTS:
        run_part(part, arguments.out, started + part.share * arguments.seconds)
        print(f"{time.time() - started:6.1f} s  {' '.join(part.phases)}", flush=True)
    rows, broken = journal.read(arguments.out / "rows.jsonl")
    print(f"{len(rows)} rows in {arguments.out / 'rows.jsonl'}" + (f", {broken} lines cut off" if broken else ""))
    for row in rows:
        if "failed" in row:
            print(f"{row['part'] if 'part' in row else row['phase']}: {row['failed']}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
