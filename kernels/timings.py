"""Stored timings: for each GPU, the operators and sizes at which the new launches were faster than the established ones.

timings.json is made of the rows of a GPU run: `python -m deepskip.kernels.bench.store_timings DIR`. A GPU that is not in it
takes the established launches.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("timings.json")
# The new launches must be faster by this factor, which is above the difference of two runs of one kernel.
MARGIN = 1.03
# A timing holds for sizes from a quarter to four times its own.
REACH = 4.0


class Timing(NamedTuple):
    """A timed size of an operator.

    Attributes:
        pixels: number of pixels, N * H * W.
        ratio: time of the established launches over that of the new ones, forward and backward.
    """

    pixels: int
    ratio: float


Timings = dict[str, dict[str, list[Timing]]]


def load(path: Path = FILE) -> Timings:
    """Return the stored timings by name of the GPU, then by operator.

    Args:
        path: file to read; if it does not exist, nothing was timed.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return {gpu: {name: [Timing(*one) for one in rows] for name, rows in mine.items()} for gpu, mine in found.items()}


def save(timings: Timings, path: Path = FILE) -> None:
    """Write timings, sorted, a line for each operator."""
    parts = []
    for gpu, mine in sorted(timings.items()):
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(sorted(rows))}" for name, rows in sorted(mine.items()))
        parts.append(f"  {json.dumps(gpu)}: {{\n{lines}\n  }}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


@cache
def _stored() -> Timings:
    return load()


def next_wins(gpu: str, operator: str, pixels: int, timings: Timings | None = None) -> bool:
    """Return whether a stored timing says that the new launches are faster.

    Args:
        gpu: name of the GPU, as CUDA reports it.
        operator: operator and its channels, as `stage`, `convolution`, `norm` and `loss` name them.
        pixels: number of pixels, N * H * W.
        timings: the timings; None takes the stored ones.
    """
    timed = (_stored() if timings is None else timings).get(gpu, {}).get(operator, [])
    near = [one for one in timed if pixels <= REACH * one.pixels and one.pixels <= REACH * pixels]
    if not near:
        return False
    # Of the sizes around it, both must agree.
    below = max((one for one in near if one.pixels <= pixels), default=None)
    above = min((one for one in near if one.pixels >= pixels), default=None)
    return all(one.ratio >= MARGIN for one in (below, above) if one is not None)


def stage(channels: int, maps: int) -> str:
    """Return the name of a deep-skip stage with this many channels a map."""
    return f"deep_skip {channels} x {maps}"


def convolution(into: int, out: int) -> str:
    """Return the name of a 3x3 convolution."""
    return f"conv3 {into} to {out}"


def norm(channels: int) -> str:
    """Return the name of a batch norm with ReLU."""
    return f"batch_norm_relu {channels}"


def loss(classes: int) -> str:
    """Return the name of the BCE + Dice loss."""
    return f"bce_dice {classes}"
