"""Measure the drift alarm: the contrast of all images is inverted in mid-stream, while a training follows.

Run it as `python -m deepskip.jobs.bench.drift`; it takes minutes. It writes drift.csv and drift.svg.

Images are bright discs of random size and contrast on noise, 32 x 32 pixels. The admission log is written beforehand: one
generation a segment. So a result depends on the seed alone, and not on the speed of the machine.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import deepskip
from deepskip.data_shards.appending import append_split
from deepskip.data_shards.index import load_first
from deepskip.data_shards.manifest import Generation, read_chain
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from deepskip.jobs import admissions, runs
from deepskip.jobs.admissions import Entry
from deepskip.jobs.journal import read_measured
from deepskip.jobs.training import drift

DOCS = Path(__file__).parents[2] / "docs"
SAMPLES, BATCH, SIDE = 64, 16, 32
GENERATIONS, INVERTED = 90, 24


class Row(NamedTuple):
    """A generation as a run has measured it.

    Attributes:
        seed: seed of the run and its data.
        generation: number of the generation.
        inverted: whether the contrast of its images is inverted.
        samples: number of its samples.
        iou: mean of the IoU of its samples.
        deviation: standard deviation of the IoU of its samples.
        pixel_iou: IoU of all of its pixels.
        alarm: generation in which the alarm that came with this one says that a drift began; None without an alarm.
    """

    seed: int
    generation: int
    inverted: bool
    samples: int
    iou: float
    deviation: float
    pixel_iou: float
    alarm: int | None


def discs(seed: int, generation: int, inverted: bool) -> Iterator[Sample]:
    """Yield the samples of a generation: one to three bright discs on noise.

    Args:
        seed: seed of the data.
        generation: number of the generation.
        inverted: whether bright and dark change places.
    """
    rng = np.random.default_rng([seed, generation])
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number in range(SAMPLES):
        mask = np.zeros((SIDE, SIDE), bool)
        for _ in range(rng.integers(1, 4)):
            (row, column), radius = rng.uniform(4, SIDE - 4, 2), rng.uniform(2, 5)
            mask |= (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        image = rng.normal(90, 20, (SIDE, SIDE)) + rng.uniform(30, 90) * mask
        image = (255 - image if inverted else image).clip(0, 255).astype(np.uint8)
        yield Sample(f"{generation:04d}-{number:04d}", image[..., None], mask.astype(np.uint8))


def stream(home: Path, seed: int, generations: int, begin: int) -> None:
    """Make a data set of many generations, whose contrast is inverted from one of them on.

    Args:
        home: folder of the data set, data/ in it.
        seed: seed of the data.
        generations: number of generations.
        begin: the first inverted generation.
    """
    split = home / "data" / "train"
    write_shards(discs(seed, 0, False), split, num_classes=1)
    write_shards(list(discs(seed, 10**6, False))[:4], home / "data" / "val", num_classes=1)
    chain: list[Generation] | None = None
    for number in range(1, generations):
        packed = home / f"generation-{number}"
        write_shards(discs(seed, number, number >= begin), packed, num_classes=1)
        chain = append_split(str(split), packed, chain=chain, unlike=number).chain


def measure(home: Path, seed: int, generations: int, begin: int) -> list[Row]:
    """Train on a stream and return how each generation was measured before it was trained on.

    Args:
        home: folder for data and run.
        seed: seed of data and run.
        generations: number of generations.
        begin: the first inverted generation.
    """
    stream(home, seed, generations, begin)
    split, run = str(home / "data" / "train"), home / "runs" / "drift"
    run.mkdir(parents=True)
    steps = SAMPLES // BATCH
    admissions.append(
        run,
        [
            Entry(each.number, each.number * steps, [shard["samples"] for shard in each.raw["shards"]], each.digest)
            for each in read_chain(split, [load_first(split)[0]])
        ],
    )
    config = deepskip.Config()
    given: dict[str, Any] = {
        "model.base_channels": 4, "model.levels": 3, "model.norm": "group", "data.path": str(home / "data"), "data.crop": SIDE,
        "data.follow": True, "data.when_idle": "end", "data.idle_seconds": 0.0, "data.poll_seconds": 0.1,
        "data.loader_workers": 0, "optim.steps": None, "optim.schedule": "constant", "optim.global_batch_size": BATCH,
        "optim.warmup_steps": 10, "optim.ema_decay": 0.9, "run.storage": str(home / "runs"), "run.name": "drift",
        "run.seed": seed, "run.drift": True, "run.validate_every": 10**6, "run.checkpoint_every": 10**6, "run.panels": 0,
        "run.tracking_uri": "none", "cluster.cpus_per_worker": 1,
    }  # fmt: skip
    for key, value in given.items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)
    deepskip.train(config)
    found = drift.read(run, 10**9)
    lines = {}
    for kind, _, values, _ in read_measured(run / runs.JOURNAL):
        if kind == "stream" and "iou" in values:
            lines[int(values["generation"])] = values
    return [
        Row(
            seed, number, number >= begin, len(found[number]), float(np.mean(found[number])), float(np.std(found[number])),
            values["iou"], int(values["drift"]) if "drift" in values else None,
        )
        for number, values in sorted(lines.items())
    ]  # fmt: skip


def verdict(rows: Sequence[Row], begin: int) -> str:
    """Return in one line how a run met its drift.

    Args:
        rows: the generations of the run.
        begin: the first inverted generation.
    """
    iou = {row.generation: row.iou for row in rows}
    before = float(np.mean([iou[number] for number in range(max(1, begin - 5), begin)]))
    again = next((number for number in sorted(iou) if number > begin and iou[number] >= 0.95 * before), None)
    alarms = ", ".join(
        f"with generation {row.generation} (began in {row.alarm})" for row in rows if row.alarm is not None
    )
    return (
        f"seed {rows[0].seed}: IoU {before:.3f} in the 5 generations before {begin}, {iou[begin]:.3f} in {begin}, "
        + (f"95 % of it again in {again}" if again else "not 95 % of it again")
        + f", {rows[-1].iou:.3f} in {rows[-1].generation}; alarms: {alarms or 'none'}"
    )


def draw(rows: Sequence[Row], begin: int, path: Path) -> None:
    """Draw the score of each generation, with the alarms.

    Args:
        rows: the generations of all runs.
        begin: the first inverted generation.
        path: SVG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    # A fixed salt, so that the same numbers make the same file.
    with mpl.rc_context({"svg.hashsalt": "drift", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
        for place, seed in enumerate(sorted({row.seed for row in rows})):
            own = [row for row in rows if row.seed == seed]
            axis.plot(
                [row.generation for row in own], [row.iou for row in own], color=f"C{place}", label=f"seed {seed}"
            )
            for row in own:
                if row.alarm is not None:
                    # Above the curves, a line for each seed.
                    axis.plot(
                        row.generation,
                        1.06 + 0.06 * place,
                        "v",
                        color=f"C{place}",
                        markersize=9,
                        markeredgecolor="black",
                    )
        axis.axvline(begin - 0.5, color="0.4", linestyle="--", linewidth=1)
        axis.annotate(
            "contrast inverted",
            (begin - 0.5, 0.02),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            color="0.3",
        )
        axis.plot([], [], "v", color="white", markeredgecolor="black", markersize=9, label="alarm")
        axis.set(
            xlabel=f"generation of {SAMPLES} samples",
            ylabel="mean IoU before training on it",
            ylim=(-0.03, 1.24),
            yticks=np.linspace(0, 1, 6),
        )
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def stored(path: Path) -> list[Row]:
    """Return the rows of a drift.csv."""
    with path.open(newline="") as file:
        return [
            Row(
                int(row["seed"]), int(row["generation"]), row["inverted"] == "1", int(row["samples"]), float(row["iou"]),
                float(row["deviation"]), float(row["pixel_iou"]), int(row["alarm"]) if row["alarm"] else None,
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the rows to a CSV."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(Row._fields)
        for row in rows:
            table.writerow(
                [row.seed, row.generation, int(row.inverted), row.samples, *(f"{x:.4f}" for x in row[4:7]), row.alarm]
            )


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, and write OUT/drift.csv and OUT/drift.svg.

    Args:
        argv: command-line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m deepskip.jobs.bench.drift", description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for drift.csv and drift.svg")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--generations", type=int, default=GENERATIONS)
    parser.add_argument("--begin", type=int, default=INVERTED, help="the first inverted generation")
    parser.add_argument("--redraw", action="store_true", help="draw OUT/drift.csv as it is, and measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.redraw:
        draw(stored(arguments.out / "drift.csv"), arguments.begin, arguments.out / "drift.svg")
        return
    torch.set_num_threads(1)
    rows: list[Row] = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as home:
            own = measure(Path(home), seed, arguments.generations, arguments.begin)
        print(verdict(own, arguments.begin), flush=True)
        rows += own
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(rows, arguments.out / "drift.csv")
    draw(rows, arguments.begin, arguments.out / "drift.svg")


if __name__ == "__main__":
    main()
