"""Memory and time of a step in parts (optim.micro_batch), on one thread of a CPU: python -m deepskip.bench.step_memory."""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from unittest import mock

import torch

from deepskip.allocator import keep_freed_memory
from deepskip.bench import step_launches
from deepskip.config import Config
from deepskip.training_step import DataInfo, TrainingStep

SIZE = (16, 3, 256, 256)
STEPS = 4


def megabytes() -> float:
    """Return the most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(norm: str, micro_batch: int | None) -> None:
    """Print the memory of a training's steps above that before them, MB, and the median of their seconds of CPU."""
    torch.set_num_threads(1)
    keep_freed_memory()
    config = Config()
    config.model.norm, config.optim.micro_batch = norm, micro_batch  # type: ignore[assignment]
    training = TrainingStep(config, DataInfo(3, 1, 255, [0.0] * 3, [1.0] * 3, {}), torch.device("cpu"))
    with mock.patch.object(step_launches, "SIZE", SIZE):
        batch = step_launches.make_batch(config, 0)
    before, seconds = megabytes(), []
    for _ in range(STEPS):
        start = time.process_time()
        training(batch)
        seconds.append(time.process_time() - start)
    # The first step also prepares.
    print(f"| {norm} | {micro_batch or SIZE[0]} | {megabytes() - before:.0f} | {statistics.median(seconds[1:]):.2f} |")


def main() -> None:
    """Print a Markdown table; each row is measured in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.bench.step_memory", description=__doc__)
    parser.add_argument("--row", nargs=2, metavar=("NORM", "SAMPLES"), help="one row alone; 0 samples take all at once")
    arguments = parser.parse_args()
    if arguments.row:
        measure(arguments.row[0], int(arguments.row[1]) or None)
        return
    print("| norm | samples of a part | MB | seconds of CPU |\n|---|---:|---:|---:|", flush=True)
    for norm in ("group", "batch"):
        for samples in (0, 8, 4, 2):
            subprocess.run([sys.executable, "-m", parser.prog.split()[-1], "--row", norm, str(samples)], check=True)


if __name__ == "__main__":
    main()
