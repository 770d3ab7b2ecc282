"""Take items from a source and commit them as generations, each item exactly once, whatever is killed at any moment.

A generation's samples and the source's offsets are in one manifest, which is committed atomically. What was read but not
committed is read again. Little is in memory: a few items that are being decoded; samples of the next generation are on disk.
"""

import errno
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event

import pyarrow.compute as pc

from deepskip.data_shards import storage
from deepskip.data_shards.appending import AppendError, append_split, staging
from deepskip.data_shards.index import load_samples
from deepskip.data_shards.ingest.items import Changed, Item, Rules, Source, sample_of
from deepskip.data_shards.ingest.journal import Journal
from deepskip.data_shards.ingest.pressure import Pressure
from deepskip.data_shards.labels import IGNORE_INDEX
from deepskip.data_shards.manifest import Generation, advance_of, conflict
from deepskip.data_shards.progress import no_word
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards

# Threads that read and decode, and items that are read ahead of the one that is written.
THREADS, AHEAD = 4, 8
# Seconds before a storage that does not answer is asked again.
OUTAGE_SECONDS = 5.0
# Seconds after which the loop looks at the clock while it waits.
TICK = 0.25
# Errors of a file that no time heals.
NEVER = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
# HTTP's answers for addresses that have no file.
NEVER_STATUS = (400, 404, 410, 414)


@dataclass
class Ingest:
    """The state of an ingest.

    Attributes:
        name: Name of the source in keys and offsets.
        split: Path or URL of the split.
        source: Where items come from.
        rules: How items become samples.
        journal: Where items are listed that cannot be used.
        chain: Generations of the split.
        taken: Keys of the source's items that are in the chain; a source whose items are in order needs none.
        offsets: Offsets of the source after the last item that was used or refused.
        stop: Ends the ingest when it is set; what is complete is committed.
        say: Called with each line to report.
        pressure: The training to wait for, or None.
        moved: When an item was last worked on, of time.monotonic.
        working: Whether items are being read or decoded.
        trouble: The last report that an item cannot be read now.
    """

    name: str
    split: str
    source: Source
    rules: Rules
    journal: Journal
    chain: list[Generation]
    taken: set[str]
    offsets: dict[str, int | str]
    stop: Event = field(default_factory=Event)
    say: Callable[[str], None] = no_word
    pressure: Pressure | None = None
    moved: float = field(default_factory=time.monotonic)
    working: bool = False
    trouble: str = ""


def run(ingest: Ingest, samples: int = 256, seconds: float = 60.0, idle_seconds: float | None = None) -> int:
    """Commit generations until the ingest is stopped, or until nothing has come for a time.

    Args:
        ingest: The ingest.
        samples: Number of samples at which a generation is committed.
        seconds: Time after its first sample at which a generation is committed, whatever its number of samples.
        idle_seconds: The ingest ends when no item has come for this long; None never ends it.

    Returns:
        Number of samples that were committed.

    Raises:
        AppendError: If another ingest of the same source has committed meanwhile.
        LostItems: If the source no longer has items that were never read.
        OSError: If the data set cannot be written. What was not committed is read again by the next ingest.
    """
    committed = 0
    with ThreadPoolExecutor(THREADS) as pool:
        stream = decoded(ingest, pool)
        try:
            while (first := wait_for_one(ingest, stream, idle_seconds)) is not None:
                committed += commit_batch(ingest, stream, first, samples, seconds, idle_seconds)
        finally:
            stream.close()
            pool.shutdown(wait=False, cancel_futures=True)
    return committed


def wait_for_one(
    ingest: Ingest, stream: Iterator[tuple[Item, Sample] | None], idle_seconds: float | None
) -> tuple[Item, Sample] | None:
    """Return the next sample, or None if the ingest ends before it comes."""
    wait_for_training(ingest)
    while not ingest.stop.is_set():
        found = next(stream)
        if found is not None:
            return found
        if not ingest.working:
            ingest.journal.sync()
        if is_idle(ingest, idle_seconds):
            return None
    return None


def wait_for_training(ingest: Ingest) -> None:
    """Wait until the training is not too far behind, or the ingest is stopped."""
    told = False
    while ingest.pressure is not None and not ingest.stop.is_set() and ingest.pressure.is_high(ingest.chain):
        if not told:
            ingest.say(f"the training is {ingest.pressure.behind(ingest.chain)} samples behind: waiting for it")
        told, ingest.moved = True, time.monotonic()
        ingest.stop.wait(TICK)


def is_idle(ingest: Ingest, idle_seconds: float | None) -> bool:
    """Return whether nothing has come for a time; None is never."""
    if ingest.source.behind or ingest.working:
        ingest.moved = time.monotonic()
        return False
    return idle_seconds is not None and time.monotonic() - ingest.moved >= idle_seconds


def commit_batch(
    ingest: Ingest,
    stream: Iterator[tuple[Item, Sample] | None],
    first: tuple[Item, Sample],
    samples: int,
    seconds: float,
    idle_seconds: float | None,
) -> int:
    """Commit a generation of the first sample and those that follow it, and return its number of samples.

    Raises:
        AppendError: If another ingest has committed one of them.
        OSError: If it cannot be written.
    """
    items: list[Item] = []
    deadline = time.monotonic() + seconds

    def batch() -> Iterator[Sample]:
        for found in itertools.chain([first], stream):
            if found is not None:
                items.append(found[0])
                yield found[1]
            elif is_idle(ingest, idle_seconds):
                return
            if len(items) >= samples or time.monotonic() >= deadline or ingest.stop.is_set():
                return

    rules = ingest.rules
    with staging(ingest.split) as folder:
        write_shards(
            batch(),
            folder / "train",
            num_classes=rules.first.num_classes,
            ignore_index=rules.first.ignore_index,
            preparation=rules.first.preparation,
            samples_per_shard=rules.samples_per_shard,
            tile=rules.tile,
        )
        if any(item.offset is None for item in items):
            ingest.offsets[ingest.name] = int(ingest.offsets.get(ingest.name, 0)) + len(items)
        # The journal is durable before the offsets after its items are.
        ingest.journal.sync()
        before = advance_of(ingest.chain)["watermark"]
        # A source's clock may be wrong.
        newest = min(time.time(), max(item.time for item in items))
        try:
            made = append_split(
                ingest.split,
                folder / "train",
                watermark=newest if before is None else max(before, newest),
                offsets=ingest.offsets,
                chain=ingest.chain,
                unlike=len(ingest.chain),
            )
        except AppendError as error:
            raise AppendError(f"{error}. Another ingest of {ingest.name} has committed: run only one") from error
    ingest.chain = made.chain
    ingest.taken.update(item.key for item in items if item.offset is None)
    total = sum(each.samples for each in made.chain)
    notes = [f"{ingest.source.waiting} files wait"] if ingest.source.waiting else []
    notes += [f"{ingest.journal.count} items refused: {ingest.journal.path}"] if ingest.journal.count else []
    ingest.say(
        f"{ingest.split}: generation {made.generation.number} with {len(items)} samples; {total} samples in all"
        + "".join(f"; {note}" for note in notes)
    )
    return len(items)


def decoded(ingest: Ingest, pool: ThreadPoolExecutor) -> Generator[tuple[Item, Sample] | None, None, None]:
    """Yield items with their samples in the source's order, and None after a refused item or a short wait without any.

    Items that cannot be used are written to the journal. `offsets` are those after the item that was yielded last.

    Args:
        ingest: The ingest.
        pool: Threads that read and decode, a few items ahead.
    """
    ahead: deque[tuple[Item, Future[Sample]]] = deque()
    for new in ingest.source.items():
        if new is not None:
            ahead.append((new, pool.submit(read, new, ingest.rules)))
            ingest.working = True
        while ahead and (new is None or len(ahead) >= AHEAD or ahead[0][1].done()):
            item, future = ahead.popleft()
            while not done(future, ingest):
                yield None
            try:
                sample = outcome(ingest, item, future)
            # A storage that does not answer now. Without this item, no later one of its source may be committed.
            except OSError as error:
                report(ingest, item, error)
                ahead.appendleft((item, pool.submit(after_outage, item, ingest)))
                continue
            if item.offset is not None:
                ingest.offsets[item.offset[0]] = item.offset[1]
            # Also after a refused item the loop looks at the clock and at signals.
            yield None if sample is None else (item, sample)
        if new is None:
            ingest.working = False
            yield None


def done(future: "Future[Sample]", ingest: Ingest) -> bool:
    """Wait a little for an item, and return whether it is done."""
    ingest.moved = time.monotonic()
    return bool(wait([future], timeout=TICK).done)


def read(item: Item, rules: Rules) -> Sample:
    """Read and decode an item."""
    return sample_of(item.key, item.read(), rules)


def after_outage(item: Item, ingest: Ingest) -> Sample:
    """Read and decode an item, after a while."""
    ingest.stop.wait(OUTAGE_SECONDS)
    return read(item, ingest.rules)


def outcome(ingest: Ingest, item: Item, future: "Future[Sample]") -> Sample | None:
    """Return an item's sample, or None if it was refused or is looked at again later.

    Raises:
        OSError: If its storage does not answer now, and the source's items are in order.
    """
    version = item.version
    try:
        return future.result()
    except Changed:
        ingest.source.again(item, True)
        return None
    except FileNotFoundError as error:
        # If the file appears again, it is new.
        reason, version = f"was removed before it was read: {error}", "" if isinstance(version, str) else version
    except ValueError as error:
        reason = str(error)
    except OSError as error:
        if not is_final(error):
            if item.offset is not None:
                raise
            report(ingest, item, error)
            ingest.source.again(item, True)
            return None
        reason = str(error)
    except MemoryError:
        raise
    # An unknown fault would stop the ingest again after each restart.
    except Exception as error:
        reason = f"cannot be read: {error!r}"
    if ingest.journal.add(item.name, version, reason):
        number = f" at {version}" if isinstance(version, int) else ""
        ingest.say(f"refused {item.name}{number}: {reason}")
    ingest.source.again(item, False)
    return None


def is_final(error: OSError) -> bool:
    """Return whether a file can never be read, as opposed to a storage that does not answer, or denies it, now."""
    return error.errno in NEVER or getattr(error.__cause__, "status", None) in NEVER_STATUS


def report(ingest: Ingest, item: Item, error: OSError) -> None:
    """Report that an item cannot be read now, once in succession."""
    text = f"{item.name} cannot be read now, trying again: {error}"
    if text != ingest.trouble:
        ingest.say(text)
    ingest.trouble = text


def begin(
    name: str,
    split: str,
    chain: list[Generation],
    cache: storage.Cache | None,
    in_order: bool,
) -> tuple[set[str], dict[str, int | str]]:
    """Return the keys of a source's items that a chain has, and the source's offsets in it.

    Args:
        name: Name of the source.
        split: Path or URL of the split.
        chain: Its generations.
        cache: Where the samples files of a remote split are kept.
        in_order: Whether the source has offsets, so that keys are not needed.

    Raises:
        AppendError: If the chain has such keys, but not of this source, or a source with which it could have keys in common.
        ValueError: If a samples file is damaged.
        OSError: If it cannot be read.
    """
    offsets = {
        found: value
        for found, value in advance_of(chain)["offsets"].items()
        if found == name or found.startswith(f"{name}/")
    }
    # Keys are NAME_STEM: "2_a" of "cam" would have the key of "a" of "cam_2".
    for other in {found.partition("/")[0] for found in advance_of(chain)["offsets"]} - {name}:
        if other.startswith(f"{name}_") or name.startswith(f"{other}_"):
            raise AppendError(
                f"{split} has a source {other}, of whose name {name} is a part or the other way round, so that samples of both "
                "could have one key; choose another name: --name"
            )
    if offsets and in_order:
        return set(), offsets
    keys: set[str] = set()
    for each in chain:
        column = load_samples(split, each.raw, cache)["key"]
        keys.update(column.filter(pc.starts_with(column, f"{name}_")).to_pylist())
    if keys and not offsets:
        raise AppendError(
            f"{len(keys)} samples of {split} have keys that begin with {name}_, but no generation is of a source {name}; "
            "choose another name: --name"
        )
    return keys, offsets


def refusal(first: Generation) -> str | None:
    """Return why no folder, bucket or topic can be appended to a split, or None.

    Args:
        first: Its generation 0.
    """
    raw = first.raw
    return conflict(raw, raw | {"labels": None, "ignore_index": IGNORE_INDEX, "reading": None, "dtype": "uint8"})
