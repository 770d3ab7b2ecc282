"""A rank's side of a training that follows a growing split: its admission log, what it reads, and on rank 0 what is new."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepskip import identity
from deepskip.checkpoint import StreamState
from deepskip.config import Config
from deepskip.data_shards import manifest
from deepskip.data_shards.admission import Admission, StreamOrder, fingerprint
from deepskip.data_shards.dataset import Shards, SkipReport
from deepskip.data_shards.growing import images_of, stream_batches
from deepskip.data_shards.index import BrokenIndex
from deepskip.data_shards.manifest import Generation
from deepskip.data_shards.polling import ChainPoller, trimmed
from deepskip.data_shards.stream import Entries
from deepskip.data_shards.window import ChainWindow, Part, extended, shortened, window_of
from deepskip.jobs import admissions
from deepskip.jobs.admissions import Entry
from deepskip.jobs.training import drift
from deepskip.jobs.training.drift import DriftDetector
from deepskip.prequential import iou_of
from deepskip.ranks import broadcast_bytes
from deepskip.training_step import Batch

# Generations that one segment takes at most.
MOST_TOGETHER = 1000
# Sums of fingerprints are kept below this.
FINGERPRINTS = 2**61


class Follower:
    """The stream of a rank, as `deepskip.following.Stream`.

    Args:
        config: settings of the training.
        folder: the run's folder.
        shards: the training split, with the generations that the run began with.
        rank: number of this rank.
        world_size: number of ranks.
        device: device of the collectives.
        entries: additional entries of each batch.
        loader_workers: number of processes that decode samples.
        ranks_here: number of ranks that share this machine's cache.
        skipped: called with each bad sample that is skipped.
        started: called on rank 0 with the step at which the training starts.
        waiting: called on rank 0 with the number of steps done when nothing is new.
        warn: called on rank 0 with a warning, in any thread.
        check_lease: called on rank 0 before the log is written.

    Attributes:
        order: order of the stream, whose segments are appended.
        digests: sha256 of the manifest of each admitted generation, 32 bytes each.
        total: sum of the fingerprints of all samples that were taken.
        poller: looks for what is new, on rank 0.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        shards: Shards,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        entries: Entries,
        loader_workers: int,
        ranks_here: int,
        skipped: Callable[[SkipReport], None],
        started: Callable[[int], None],
        waiting: Callable[[int], None],
        warn: Callable[[str], None],
        check_lease: Callable[[], None],
    ) -> None:
        self.config, self.folder, self.shards = config, folder, shards
        self.rank, self.world_size, self.device = rank, world_size, device
        self.entries, self.loader_workers, self.ranks_here = entries, loader_workers, ranks_here
        self.skipped, self.started, self.waiting = skipped, started, waiting
        self.warn, self.check_lease = warn, check_lease
        self.replays = config.data.when_idle == "replay"
        # One for the whole training, which keeps its open files within bounds.
        self.whole = shards.uncropped()
        self.base = shards.index
        self.order = self._order([], [])
        self.digests = bytearray()
        self.total = 0
        self.poller: ChainPoller | None = None
        self.drift = DriftDetector() if rank == 0 and config.run.drift else None
        # Newest watermark of each generation of the window, and the seconds from the last one to its first step.
        self.watermarks: dict[int, float | None] = {}
        self.lag: float | None = None
        # Time and number of looks since when nothing is new.
        self._idle: tuple[float, int] | None = None

    def _order(self, log: list[Admission], sizes: list[list[int]]) -> StreamOrder:
        data, optim = self.config.data, self.config.optim
        assert data.lanes != "auto", "the driver chooses"
        return StreamOrder(
            self.config.run.seed, log, sizes, optim.global_batch_size, data.shuffle_window, data.lanes, data.replay,
            data.replay_generations,
        )  # fmt: skip

    def load_state_dict(self, state: StreamState | None, step: int) -> None:
        """Resume from the admission log of the run or of a checkpoint, whichever is longer, or begin one; a collective.

        Args:
            state: state of a checkpoint, or None.
            step: number of steps done.

        Raises:
            identity.OtherData: the log, the checkpoint and the split are not of one run.
            BrokenIndex: a generation of the log cannot be read.
            OSError: as before.
        """
        if not self.base.num_samples:
            raise BrokenIndex(f"{self.base.location} holds no samples to begin with; append some, and then train")
        data = b""
        if self.rank == 0:
            entries = self._recover(state)
            texts = [text.decode() for text in self._manifests(entries, step)]
            data = json.dumps([entries, texts]).encode()
        if self.world_size > 1:
            data = broadcast_bytes(data, self.rank, self.device)
        lines, texts = json.loads(data)
        entries = [Entry(*line) for line in lines]
        self.order = self._order(
            [Admission(entry.generation, entry.step) for entry in entries], [entry.shards for entry in entries]
        )
        self.digests = bytearray(bytes.fromhex("".join(entry.digest for entry in entries)))
        self.total = state["taken"] if state else 0
        first = len(entries) - len(texts)
        later = [
            trimmed(Generation(number, entries[number].digest, json.loads(text)))
            for number, text in enumerate(texts, first)
        ]
        self.shards.index = self._window(later)
        self.watermarks = {each.number: each.raw.get("watermark") for each in later}
        if self.drift is not None:
            for generation, scores in sorted(drift.read(self.folder, step).items()):
                self.drift.add(generation, scores)
        if self.rank == 0:
            chain = self.base.generations
            last = Generation(len(entries) - 1, entries[-1].digest, {}) if len(entries) > len(chain) else chain[-1]
            raw = {name: value for name, value in chain[0].raw.items() if name != "shards"}
            self.poller = ChainPoller(self.base.location, raw, last, self.config.data.poll_seconds, self.warn)
            self.poller.start()
            self.started(step)
        # Its samples are in the window for as long as they are read.
        self.base = replace(self.base, shards=(), samples=self.base.samples.schema.empty_table(), generations=())

    def _recover(self, state: StreamState | None) -> list[Entry]:
        """Return the entries of the log on rank 0, and repair or begin its file."""
        noted, kept = admissions.read(self.folder), entries_of(state) if state else []
        both = min(len(noted), len(kept))
        if noted[:both] != kept[:both]:
            number = next(i for i in range(both) if noted[i] != kept[i])
            raise identity.OtherData(
                f"{self.folder / admissions.FILE}, line {number + 1} is not what the newest checkpoint has; remove the file: "
                "the checkpoint has a copy"
            )
        entries = max(noted, kept, key=len)
        base = self.base.generations
        ends = np.cumsum([0, *(each.shards for each in base)]).tolist()
        sizes = [self.base.shard_sizes[ends[i] : ends[i + 1]].tolist() for i in range(len(base))]
        begun = [Entry(each.number, 0, own, each.digest) for each, own in zip(base, sizes, strict=True)]
        if not entries:
            self.check_lease()
            # Written whole: a part of these lines would be the log of a run that began with fewer generations.
            admissions.replace(self.folder, begun)
            return begun
        if len(entries) > len(noted):
            self.check_lease()
            admissions.replace(self.folder, entries)
        if [entry.shards for entry in entries if entry.step == 0] != sizes:
            raise identity.OtherData(
                f"{self.folder / admissions.FILE} is the log of other data than {self.base.location}: the generations that are "
                "admitted from step 0 have other shards"
            )
        return entries

    def _manifests(self, entries: list[Entry], step: int) -> list[bytes]:
        """Return the manifests of the generations that are read from a step on, of those after the first segment.

        Raises:
            BrokenIndex: one is not that of the log.
        """
        order = self._order(
            [Admission(entry.generation, entry.step) for entry in entries], [entry.shards for entry in entries]
        )
        first = order.firsts[order.number_at(step)] - order.replay_generations
        found = []
        # As the log has it, generation 0 may have got an index with other statistics since.
        previous = self.base.generations[-1]
        for entry in entries[max(len(self.base.generations), first) :]:
            path = manifest.location_of(self.base.location, entry.generation)
            text = manifest.read_if_exists(self.base.location, entry.generation)
            try:
                if text is None:
                    raise manifest.BrokenChain(f"{path} is missing")
                if previous.number + 1 < entry.generation:
                    previous = Generation(entry.generation - 1, entries[entry.generation - 1].digest, {})
                previous = manifest.checked(self.base.location, text, self.base.generations[0].raw, previous)
                if previous.digest != entry.digest:
                    raise manifest.BrokenChain(f"{path} has changed since (sha256 differs)")
            except manifest.BrokenChain as error:
                raise BrokenIndex(
                    f"{self.folder.name} was trained on generation {entry.generation}: {error}"
                ) from error
            found.append(text)
        return found

    def _window(self, later: list[Generation]) -> ChainWindow:
        """Return the window of some generations after the first segment, of those before it too if they may be replayed."""
        whole = window_of(self.base)
        if not later:
            return whole
        first, index = later[0].number, self.base
        at = Part(range(first, first), self.order.ends[first], self.order.shard_ends[first], index)
        return shortened(extended(whole, later, at, self.shards.cache), first - self.order.replay_generations)

    def state_dict(self) -> StreamState:
        """Return the admission log as a checkpoint holds it."""
        order = self.order
        return {
            "admissions": torch.from_numpy(order.log()),
            "shards": torch.from_numpy(np.diff(np.array(order.shard_ends, np.int64))),
            "samples": torch.from_numpy(np.array(order.sizes, np.int64)),
            "digests": torch.frombuffer(bytearray(self.digests), dtype=torch.uint8).view(-1, 32),
            "taken": self.total,
        }

    def begins(self, step: int) -> bool:
        """Return whether a segment begins at a step."""
        return self.order.begins[self.order.number_at(step)] == step

    def limit(self, step: int) -> int | None:
        """Return the end of a step's segment, or the begin of the next one after it; None if neither is known."""
        order, number = self.order, self.order.number_at(step)
        if step < order.stops[number]:
            return order.stops[number]
        return order.begins[number + 1] if number + 1 < len(order.begins) else None

    def batches(self, step: int) -> Iterator[Batch]:
        """Yield this rank's share of the global batches from a step to its `limit`."""
        ends = [end for end in (self.limit(step), self.config.optim.steps) if end is not None]
        found = stream_batches(
            self.shards, self.order, step, min(ends, default=None), self.rank, self.world_size, self.loader_workers,
            self.entries, self.ranks_here,
        )  # fmt: skip
        for batch in found:
            for report in batch.pop("bad"):
                self.skipped(report)
            # On the host, where `fingerprint` needs them.
            yield {**batch, "counted": batch["weight"].tolist()}  # type: ignore[typeddict-unknown-key]

    def begun(self, step: int) -> list[tuple[int, range]]:
        """Return number and sample numbers of the generations of the segment that begins at a step."""
        order = self.order
        numbers = order.segment(order.number_at(step)).generations
        known = [mark for number in numbers if (mark := self.watermarks.get(number)) is not None]
        self.lag = time.time() - min(known) if known else None
        return [(number, range(order.ends[number], order.ends[number + 1])) for number in numbers]

    def images(self, samples: range) -> Iterator[Batch]:
        """Yield this rank's share of some samples as whole images."""
        self.whole.index = self.shards.index
        return images_of(self.whole, samples, self.rank, self.world_size, self.skipped)

    def scored(self, step: int, generation: int, counts: torch.Tensor) -> dict[str, float]:
        """Record the IoU of each sample of a generation, and return its metrics; a warning says where a drift began.

        Args:
            step: step from which it is trained on.
            generation: its number.
            counts: counts of `prequential.image_counts`, (samples, 4).
        """
        measured = counts[counts[:, 3] > 0, :3]
        scores = iou_of(measured).tolist()
        found: dict[str, float] = {"generation": generation, "samples": len(scores)}
        # If none of its samples can be read, nothing is measured.
        if scores:
            found["iou"] = iou_of(measured.sum(0)).item()
        if self.lag is not None:
            found["lag_seconds"] = self.lag
        drift.write(self.folder, generation, step, scores)
        if self.drift is not None and (drop := self.drift.add(generation, scores)):
            found["drift"] = drop.generation
            self.warn(
                f"drift: the IoU of new samples fell from {drop.before:.3f} to {drop.after:.3f} in generation "
                f"{drop.generation}, seen in generation {generation} before step {step + 1}"
            )
        return found

    def progress(self, step: int) -> dict[str, float]:
        """Return the number of samples that are committed and not trained on, and the lag of the newest generation."""
        order = self.order
        segment = order.segment(order.number_at(step))
        new = order.global_batch_size - segment.replay
        left = len(segment.samples) - new * (step - segment.steps.start)
        later = order.ends[-1] - segment.samples.stop + (self.poller.samples if self.poller else 0)
        return {"samples_behind": max(0, left) + later} | ({} if self.lag is None else {"lag_seconds": self.lag})

    def fingerprint(self, step: int, batch: Any) -> int:
        """Return the fingerprint of the samples of a batch, without repeats of weight 0."""
        taken = [i for i, weight in enumerate(batch["counted"]) if weight]
        return fingerprint(step, [batch["epoch"][i] for i in taken], [batch["sample"][i] for i in taken])

    def took(self, total: int) -> None:
        """Add the fingerprints of all ranks."""
        self.total = (self.total + total) % FINGERPRINTS

    def look(self, step: int) -> tuple[bytes, bool]:
        """Return what is new, on rank 0.

        Raises:
            BrokenIndex: what follows in the chain cannot be read.
        """
        assert self.poller is not None
        try:
            found = self.poller.take(MOST_TOGETHER)
        except manifest.BrokenChain as error:
            raise BrokenIndex(str(error)) from error
        if found:
            self._idle = None
            return json.dumps([each.__dict__ for each in found]).encode(), False
        if self._idle is None:
            self._idle = time.monotonic(), self.poller.looks
            if not self.replays:
                self.waiting(step)
        since, looks = self._idle
        data = self.config.data
        # One of two looks began after everything was taken.
        over = time.monotonic() - since >= data.idle_seconds and self.poller.looks >= looks + 2
        return b"", data.when_idle == "end" and over

    def record(self, step: int, news: bytes) -> None:
        """Write to the log on rank 0 that generations are taken from a step on.

        Raises:
            admissions.OtherLog: another process has written to the log.
            OSError: the log cannot be written.
        """
        self.check_lease()
        found = generations_of(news)
        admissions.append(self.folder, [Entry(each.number, step, sizes_of(each), each.digest) for each in found])

    def admit(self, step: int, news: bytes) -> None:
        """Take generations from a step on.

        Raises:
            BrokenIndex: their samples cannot be read.
            OSError: as before.
        """
        found, window = generations_of(news), self.shards.index
        assert isinstance(window, ChainWindow)
        first = found[0].number - self.order.replay_generations
        self.shards.index = shortened(extended(window, found, cache=self.shards.cache), first)
        self.order.admit([Admission(each.number, step) for each in found], [sizes_of(each) for each in found])
        self.watermarks = {each.number: each.raw.get("watermark") for each in found}
        self.digests += bytes.fromhex("".join(each.digest for each in found))

    def close(self) -> None:
        """End the look-out for what is new."""
        if self.poller is not None:
            self.poller.close()


def generations_of(news: bytes) -> list[Generation]:
    """Return the generations that `Follower.look` has found."""
    return [Generation(**each) for each in json.loads(news)]


def sizes_of(generation: Generation) -> list[int]:
    """Return the number of samples in each shard of a generation."""
    return [shard["samples"] for shard in generation.raw["shards"]]


def entries_of(state: StreamState) -> list[Entry]:
    """Return the entries of the admission log in a checkpoint.

    Raises:
        identity.OtherData: they are not those of a log.
    """
    ends = np.cumsum([0, *state["shards"].tolist()]).tolist()
    samples, digests = state["samples"].tolist(), state["digests"].numpy()
    log = state["admissions"].tolist()
    if not len(log) == len(digests) == len(ends) - 1 or ends[-1] != len(samples):
        raise identity.OtherData("the admission log in the checkpoint is damaged")
    return [
        Entry(generation, step, samples[ends[i] : ends[i + 1]], digests[i].tobytes().hex())
        for i, (generation, step) in enumerate(log)
    ]
