"""Begin an ingest where the chain of the data set ends, and run it until it is stopped."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepskip.data_shards import storage
from deepskip.data_shards.appending import AppendError
from deepskip.data_shards.index import load_first
from deepskip.data_shards.ingest import folder, kafka, prefix
from deepskip.data_shards.ingest.files import Pairs
from deepskip.data_shards.ingest.items import SPECIAL, Rules, Source
from deepskip.data_shards.ingest.journal import Journal
from deepskip.data_shards.ingest.loop import Ingest, begin, refusal, run
from deepskip.data_shards.ingest.pressure import Pressure
from deepskip.data_shards.manifest import read_chain
from deepskip.data_shards.progress import no_word
from deepskip.data_shards.sources.split import PackError

JOURNAL = "refused.jsonl"
FORMS = "folder:DIR, s3://BUCKET/PREFIX (or another object store) or kafka://HOST:PORT/TOPIC"


def ingest(
    origin: str,
    split: str,
    *,
    name: str | None = None,
    mask_suffix: str = "",
    paths_under: str | None = None,
    kafka_settings: Mapping[str, Any] | None = None,
    journal: Path | None = None,
    settle_seconds: float = 2.0,
    poll_seconds: float = 5.0,
    samples: int = 256,
    seconds: float = 60.0,
    idle_seconds: float | None = None,
    wait_for: Path | None = None,
    behind: int = 10_000,
    cache: storage.Cache | None = None,
    say: Callable[[str], None] = no_word,
    **options: Any,
) -> int:
    """Append what arrives at a source to a split, each item once, until SIGTERM, SIGINT or a time without anything new.

    Args:
        origin: The source: "folder:DIR", a URL of an object store, or "kafka://HOST:PORT/TOPIC".
        split: Path or URL of the split, which has an index.json.
        name: Name of the source in keys and offsets; None makes one that stays the same.
        mask_suffix: What follows the image's stem in the mask's, both in one folder; "" for folders images/ and masks/.
        paths_under: Folder or URL below which messages may name files.
        kafka_settings: Further settings of librdkafka.
        journal: File that lists what cannot be used; None takes refused.jsonl in the split, or in the current folder if the
            split is remote.
        settle_seconds: A file of a folder whose writing was not observed counts after this time without a change.
        poll_seconds: Seconds between listings of an object store.
        samples: Number of samples at which a generation is committed.
        seconds: Time after its first sample at which a generation is committed.
        idle_seconds: The ingest ends when nothing has come for this long; None never ends it.
        wait_for: Folder of a run that follows the split, to wait for while it is too far behind; None waits for none.
        behind: Number of samples that it may be behind.
        cache: Where the samples files of a remote split are kept.
        say: Called with each line to report.
        **options: As for `items.Rules`: labels, ignore_label, reading, values, tile, samples_per_shard.

    Returns:
        Number of samples that were committed.

    Raises:
        PackError: If the source or an option is not valid.
        AppendError: If the data set cannot take such samples, or another ingest of the same source runs.
        LostItems: If the source no longer has items that were never read.
        MissingIndex, BrokenIndex, BrokenChain: If there is no split, or it is damaged.
        OSError: If the data set or the source cannot be reached.
    """
    if samples < 1 or seconds < 0 or poll_seconds <= 0 or settle_seconds < 0:
        raise PackError("samples must be at least 1, poll_seconds above 0, and seconds and settle_seconds not below 0")
    generation, first = load_first(split, cache)
    if reason := refusal(generation):
        raise AppendError(f"images and masks cannot be appended to {split}: {reason}")
    chain = read_chain(split, [generation])
    kind, address = kind_of(origin)
    topic = None
    if kind == "kafka":
        brokers, _, asked = address.partition("/")
        topic = kafka.Topic(brokers, asked, name, paths_under, kafka_settings, say)
    name = name or (
        topic.name if topic else folder.name_of(Path(address)) if kind == "folder" else prefix.name_of(address)
    )
    if not name or SPECIAL.search(name):
        raise PackError(f"the name {name!r} of the source is empty or has a dot or slash, which have a meaning in keys")
    taken, offsets = begin(name, split, chain, cache, topic is not None)
    path = journal or (Path() if storage.is_remote(split) else storage.local(split)) / JOURNAL
    rules = Rules(first, **options)
    with contextlib.closing(Journal(path, name, rules.digest)) as listed:
        source: Source
        if topic is not None:
            topic.begin(offsets)
            source = topic
        else:
            pairs = Pairs(name, mask_suffix, taken, listed)
            source = (
                folder.WatchedFolder(Path(address), pairs, settle_seconds)
                if kind == "folder"
                else prefix.Prefix(address, pairs, poll_seconds, say)
            )
        before = f"{len(taken)} samples of it" if topic is None else ", ".join(f"{k} {v}" for k, v in offsets.items())
        say(f"{origin} is the source {name}; {split} has {before or 'nothing of it'}")
        if topic is None and listed.refused:
            say(f"{len(listed.refused)} items that these options refused before are skipped until they change: {path}")
        with contextlib.closing(source), stopping() as stop:
            pressure = None if wait_for is None else Pressure(wait_for, behind)
            return run(
                Ingest(name, split, source, rules, listed, chain, taken, offsets, stop, say, pressure),
                samples, seconds, idle_seconds,
            )  # fmt: skip


def kind_of(origin: str) -> tuple[str, str]:
    """Return "folder", "store" or "kafka", and the address of a source.

    Raises:
        PackError: If it is none of these.
    """
    if origin.startswith("folder:"):
        return "folder", origin.removeprefix("folder:")
    if origin.startswith("kafka://") and all(origin.removeprefix("kafka://").partition("/")):
        return "kafka", origin.removeprefix("kafka://")
    if storage.is_remote(origin) and not origin.startswith(("http://", "https://", "kafka://")):
        return "store", origin
    raise PackError(f"the source is {origin!r}; it must be {FORMS}")


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or SIGINT sets while the block runs; a second signal ends the process at once.

    In another thread than the main one it stays unset.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.signal(number, handle) for number in (int(signal.SIGTERM), int(signal.SIGINT))
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
