"""Detect that new samples are segmented worse than earlier ones, by ADWIN (Bifet and Gavalda, 2007) as river has it."""

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepskip.jobs import journal

# A line for each generation: its number, the step before which it was measured, and the IoU of each of its samples.
SCORES = "scores.jsonl"
# How often ADWIN compares two parts of its window, in samples.
CLOCK = 8


# Newest samples among which the begin of a drift is looked for.
NEWEST = 4096


class Drop(NamedTuple):
    """A change of the mean score.

    Attributes:
        generation: generation in which it began.
        before: mean before it.
        after: mean after it.
    """

    generation: int
    before: float
    after: float


class MissingRiver(RuntimeError):
    """The package river is not installed."""


class DriftDetector:
    """Find drops of a score, which is given sample by sample.

    A rise is not reported: it is what training does. ADWIN decides whether the score has changed, and `division`
    with which generation.

    Args:
        delta: chance of a false alarm in each comparison, ADWIN's delta.

    Raises:
        MissingRiver: if river is not installed.
    """

    def __init__(self, delta: float = 0.002) -> None:
        try:
            from river.drift import ADWIN
        except ImportError as error:
            raise MissingRiver(
                "run.drift needs river, which is not installed: pip install '.[stream]' in the checkout, or set run.drift to "
                "false"
            ) from error
        self.adwin = ADWIN(delta=delta, clock=CLOCK)
        # Generation and score of the samples since ADWIN began anew.
        self.newest: deque[tuple[int, float]] = deque(maxlen=NEWEST)

    def add(self, generation: int, scores: Sequence[float]) -> Drop | None:
        """Add the scores of a generation, and return the last drop that was found with them, or None.

        Args:
            generation: its number.
            scores: score of each of its samples, in their order.
        """
        found = None
        for score in scores:
            self.adwin.update(score)
            self.newest.append((generation, score))
            if self.adwin.drift_detected:
                drop = division(self.newest)
                found = drop if drop.after < drop.before else found
                # River's ADWIN begins anew after an alarm.
                self.newest.clear()
        return found


def division(scored: Sequence[tuple[int, float]]) -> Drop:
    """Return with which generation the mean of scores changes: the division that leaves the least sum of squares.

    It is between two generations, unless all scores are of one.

    Args:
        scored: generation and score of successive samples, two or more.
    """
    scores = np.array([score for _, score in scored])
    n = np.arange(1, len(scores))
    sums = scores.cumsum()
    before, after = sums[:-1] / n, (sums[-1] - sums[:-1]) / n[::-1]
    gain = n * n[::-1] * (before - after) ** 2
    numbers = np.array([generation for generation, _ in scored])
    if numbers[0] != numbers[-1]:
        gain[numbers[1:] == numbers[:-1]] = -1
    place = int(gain.argmax())
    return Drop(scored[place + 1][0], float(before[place]), float(after[place]))


def is_scores(value: Any) -> bool:
    """Return whether a JSON value is a line of the scores."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), int) for name in ("generation", "step"))
        and isinstance(value.get("iou"), list)
        and all(isinstance(each, int | float) for each in value["iou"])
    )


def write(folder: Path, generation: int, step: int, scores: Sequence[float]) -> None:
    """Append the scores of a generation to those of a run.

    Args:
        folder: folder of the run.
        generation: number of the generation.
        step: step before which it was measured.
        scores: IoU of each of its samples.

    Raises:
        OSError: they cannot be written.
    """
    line = {"generation": generation, "step": step, "iou": [round(score, 6) for score in scores]}
    journal.append(folder / SCORES, json.dumps(line))


def read(folder: Path, step: int) -> dict[int, list[float]]:
    """Return the scores of the generations that a run has measured before a step, by their numbers.

    A generation that was measured again after a crash has its newest scores.

    Args:
        folder: folder of the run.
        step: number of steps done; what was measured at this step or later is measured again.

    Raises:
        journal.BrokenFile: a line is not one of scores.
        OSError: the file cannot be read.
    """
    lines = journal.checked(folder / SCORES, is_scores, dict)
    return {line["generation"]: line["iou"] for line in lines if line["step"] < step}
