"""Check a run that followed a stream: which sample was trained in which step, and whether each was taken exactly once.

All follows from the admission log and the order. The newest checkpoint has a sum over the samples that the steps really took
(`data_shards.admission.fingerprint`); it is compared with that of the order.
"""

import contextlib
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepskip import checkpoint, identity
from deepskip.data_shards import manifest, storage
from deepskip.data_shards.admission import REPLAY, Admission, StreamOrder, fingerprint
from deepskip.data_shards.index import BrokenIndex, Index, MissingIndex, load_first, load_index
from deepskip.jobs import admissions, journal, runs
from deepskip.jobs.admissions import Entry
from deepskip.jobs.options import AuditConfig
from deepskip.jobs.settings import parse_settings, stop
from deepskip.jobs.training.follower import FINGERPRINTS, entries_of

# Faults of one kind that are listed.
MOST_LISTED = 20


@dataclass
class Audit:
    """What an audit has found.

    Attributes:
        faults: what is wrong, a line each.
        samples: number of admitted samples.
        trained: number of those that were trained exactly once.
        replayed: number of replayed samples, each time counted.
        skipped: number of samples that could not be read.
        steps: number of steps of the newest checkpoint.
        generations: number of admitted generations.
        remaining: number of admitted samples that later steps take.
    """

    faults: list[str] = field(default_factory=list)
    samples: int = 0
    trained: int = 0
    replayed: int = 0
    skipped: int = 0
    steps: int = 0
    generations: int = 0
    remaining: int = 0


def main(argv: list[str]) -> None:
    """Audit a run, and print one line if all is right, else what is wrong.

    Args:
        argv: command-line arguments; a first one without a leading dash is the run.

    Raises:
        SystemExit: status 1 if anything is wrong, 2 if there is nothing to audit.
    """
    words = ["--run", *argv] if argv and not argv[0].startswith("-") else argv
    config = parse_settings("audit", AuditConfig, words)
    folder = storage.local(config.run)
    found = audit(folder, storage.local(config.out) if config.out else None)
    for fault in found.faults:
        print(f"wrong: {fault}")
    if found.faults:
        sys.exit(1)
    skipped = f"; {found.skipped:,} could not be read" if found.skipped else ""
    print(
        f"{folder.name}: {found.trained:,} samples of {found.generations:,} generations, each trained exactly once in "
        f"{found.steps:,} steps; {found.replayed:,} replayed; {found.remaining:,} to come{skipped}"
    )


def audit(folder: Path, out: Path | None = None) -> Audit:
    """Audit a run.

    Args:
        folder: folder of the run.
        out: CSV file of which sample was trained in which step; None writes none.

    Raises:
        SystemExit: status 2 if there is no run that follows a stream.
    """
    try:
        record = runs.read_record(folder)
        if not record:
            stop(f"{folder} is no run: it has no {runs.RECORD}")
        config = record["config"]
        if not config["data"].get("follow"):
            stop(f"{folder} does not follow a stream (data.follow): deepskip order prints what its steps take")
        # A checkpoint is read before the log, which has all that it has, also if the training continues.
        state, _ = checkpoint.newest(folder)
        entries = admissions.read(folder)
        bad = journal.checked(folder / journal.BAD_SAMPLES, journal.is_report, dict)
    except (journal.BrokenFile, OSError) as error:
        stop(str(error))
    found = Audit(generations=len(entries))
    if not entries:
        found.faults.append(f"{folder / admissions.FILE} is missing")
        return found
    found.steps = state["step"] if state else 0
    split = storage.join(config["data"]["path"], "train")
    found.faults += other_data(split, entries)
    taken = None
    if state is not None:
        try:
            kept, taken = entries_of(state["stream"]), state["stream"]["taken"]
            if kept != entries[: len(kept)]:
                found.faults.append(
                    f"{folder / admissions.FILE} is not the log of the checkpoint of step {found.steps}"
                )
        except (KeyError, identity.OtherData) as error:
            found.faults.append(f"the checkpoint of step {found.steps} has no admission log: {error}")
    index = None
    if not found.faults and (bad or out is not None):
        index = load_index(split, generations=len(entries))
    try:
        order = order_of(config, runs.lanes_of(record) or 1, entries)
    except ValueError as error:
        found.faults.append(f"{folder / admissions.FILE}: {error}")
        return found
    skipped = numbers_of(index, [each for each in bad if each["split"] == "train"]) if index else set()
    # An earlier table stays until this one is whole, and where the data has a fault. A pipe or a device is written to at once.
    asked = out if index is not None else None
    whole = asked is not None and (asked.is_file() or not asked.exists())
    with storage.written_whole(asked) if asked and whole else contextlib.nullcontext(asked) as part:
        walk(found, order, skipped, taken, index, part)
    return found


def order_of(config: dict[str, Any], lanes: int, entries: Sequence[Entry]) -> StreamOrder:
    """Return the order of a run.

    Args:
        config: settings of the run by section.
        lanes: number of lanes.
        entries: admission log.

    Raises:
        ValueError: the log is none of an order.
    """
    data = config["data"]
    return StreamOrder(
        config["run"]["seed"], [Admission(each.generation, each.step) for each in entries],
        [each.shards for each in entries], config["optim"]["global_batch_size"], data["shuffle_window"], lanes,
        data["replay"], data["replay_generations"],
    )  # fmt: skip


def other_data(split: str, entries: Sequence[Entry]) -> list[str]:
    """Return what of the chain of a split is not as the admission log has it.

    Args:
        split: path or URL of the split.
        entries: admission log.
    """
    try:
        chain = manifest.read_chain(split, [load_first(split)[0]], len(entries))
    except (MissingIndex, BrokenIndex, manifest.BrokenChain, OSError) as error:
        return [f"the data cannot be compared with the log: {error}"]
    found = []
    for generation, entry in zip(chain, entries, strict=True):
        sizes = [shard["samples"] for shard in generation.raw["shards"]]
        # The statistics in the index of generation 0 may have been renewed.
        if sizes != entry.shards or (generation.number and generation.digest != entry.digest):
            found.append(
                f"generation {generation.number} of {split} is not the one that was admitted at step {entry.step}"
            )
    return found


def numbers_of(index: Index, bad: Iterable[dict[str, Any]]) -> set[int]:
    """Return the numbers of samples that were skipped.

    Args:
        index: the index of the split.
        bad: reports of the samples.
    """
    shards = {index.shard_location(number): number for number in range(len(index.shards))}
    found = set()
    for report in bad:
        own = list(index.shard_range(shards[report["shard"]])) if report["shard"] in shards else []
        found |= {number for number, key in zip(own, index.keys(own), strict=True) if key == report["key"]}
    return found


def walk(
    found: Audit, order: StreamOrder, skipped: set[int], taken: int | None, index: Index | None, out: Path | None
) -> None:
    """Count what each step takes, and compare it with what the checkpoint has taken.

    Args:
        found: the audit, which is completed in place.
        order: order of the stream.
        skipped: numbers of samples that could not be read.
        taken: sum of fingerprints in the checkpoint; None if there is none.
        index: index of the split, for keys.
        out: CSV file for step, generation, sample, key and whether it was replayed.
    """
    found.samples = order.ends[-1]
    counts = np.zeros(found.samples, np.int64)
    total = 0
    with (out or Path("/dev/null")).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "generation", "sample", "key", "replayed"])
        for step in range(found.steps):
            slots = [slot for slot in order.slots(step, 0, 1) if slot.weight]
            new = [slot.sample for slot in slots if slot.epoch < REPLAY]
            np.add.at(counts, new, 1)
            found.replayed += len(slots) - len(new)
            read = [slot for slot in slots if slot.sample not in skipped]
            total += fingerprint(step, [slot.epoch for slot in read], [slot.sample for slot in read])
            if out is not None and index is not None:
                samples = [slot.sample for slot in slots]
                generations = (np.searchsorted(order.ends, samples, side="right") - 1).tolist()
                for slot, generation, key in zip(slots, generations, index.keys(samples), strict=True):
                    table.writerow([step + 1, generation, slot.sample, key, int(slot.epoch >= REPLAY)])
    # Samples of segments that are complete, of the one in progress, and of later ones.
    for segment in order.segments:
        own = counts[segment.samples.start : segment.samples.stop]
        low, high = int(segment.steps.stop <= found.steps), int(segment.steps.start < found.steps)
        odd = np.flatnonzero((own < low) | (own > high))
        for place in odd[:MOST_LISTED].tolist():
            found.faults.append(f"sample {segment.samples.start + place} is trained {own[place]} times")
        if len(odd) > MOST_LISTED:
            found.faults.append(
                f"and {len(odd) - MOST_LISTED} further samples of generations from {segment.generations.start}"
            )
    found.trained = int((counts == 1).sum()) - sum(counts[number] == 1 for number in skipped)
    found.skipped, found.remaining = len(skipped), int((counts == 0).sum())
    if taken is not None and taken != total % FINGERPRINTS:
        found.faults.append(
            f"the steps up to {found.steps} have taken other samples than the order says (fingerprint {taken} instead of "
            f"{total % FINGERPRINTS})"
            + (f". One that was skipped and read later is such a sample: see {journal.BAD_SAMPLES}" if skipped else "")
        )
