"""A Kafka topic as a source: messages of an image and its mask, or of their paths, in the order of each partition.

Offsets are kept in the data set alone, never in a consumer group: a message is in the chain if and only if its offset is.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from deepskip.data_shards import storage
from deepskip.data_shards.ingest.files import short_name
from deepskip.data_shards.ingest.items import MAX_FILE, Content, Item, LostItems

TICK = 0.25
# Seconds to wait for the brokers when the ingest begins.
ANSWER_SECONDS = 15.0
# Seconds between looks for new partitions.
PARTITIONS_SECONDS = 30.0
# Seconds before the next look if the brokers did not answer.
AGAIN_SECONDS = 5.0
# Kilobytes of messages that the client fetches ahead.
AHEAD_KB = 32768
# Milliseconds that a broker waits for more messages before it answers.
WAIT_MS = 100
# The first bytes of an image file, and its extension.
KINDS = (
    (b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"II*\x00", "tif"), (b"MM\x00*", "tif"),
    (b"II+\x00", "tif"), (b"MM\x00+", "tif"), (b"\x93NUMPY", "npy"), (b"PK\x03\x04", "npz"),
)  # fmt: skip


class Topic:
    """A topic whose messages are delivered in the order of each partition.

    Args:
        brokers: Addresses of brokers, HOST:PORT, separated by commas.
        topic: Name of the topic.
        name: Name of the source; None makes one of the topic and the cluster.
        paths_under: Folder or URL below which messages may name files; None refuses such messages.
        settings: Further settings of librdkafka, such as those of TLS and SASL.
        say: Called with a line when the brokers do not answer.

    Attributes:
        name: Name of the source in keys and offsets.
        waiting: 0, since a message is complete.
        partitions: Partitions that are read.

    Raises:
        ValueError: If there is no such topic, or a setting is wrong.
        OSError: If no broker answers.
    """

    def __init__(
        self,
        brokers: str,
        topic: str,
        name: str | None = None,
        paths_under: str | None = None,
        settings: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        import confluent_kafka

        self.topic, self.paths_under, self.say, self.waiting = topic, paths_under, say, 0
        self._kafka = confluent_kafka
        self._trouble = ""
        self._ended: set[int] = set()
        own = {
            "bootstrap.servers": brokers, "enable.auto.commit": False, "enable.auto.offset.store": False,
            "enable.partition.eof": True, "auto.offset.reset": "error", "queued.max.messages.kbytes": AHEAD_KB,
            "fetch.wait.max.ms": WAIT_MS,
            # A generation may take long to write, or the training to wait for.
            "max.poll.interval.ms": 86_400_000,
            # Errors are reported by poll.
            "log_level": 0, "error_cb": self._report,
        }  # fmt: skip
        try:
            self._consumer = confluent_kafka.Consumer({"group.id": "deepskip-ingest"} | dict(settings or {}) | own)
            found = self._consumer.list_topics(topic, timeout=ANSWER_SECONDS)
        except confluent_kafka.KafkaException as error:
            raise storage.StorageError(f"kafka://{brokers} cannot be used: {error.args[0]}. {self._trouble}") from error
        if found.topics[topic].error is not None:
            raise ValueError(f"kafka://{brokers} has no topic {topic}: {found.topics[topic].error}")
        self.name = name or short_name(topic, f"{found.cluster_id} {topic}")
        self._next: dict[int, int] = {}
        self.partitions: set[int] = set()
        # Whether the brokers did not answer when the partitions were last looked for.
        self._unassigned = False

    def begin(self, offsets: Mapping[str, int | str]) -> None:
        """Begin after the offsets of a chain; partitions without one begin with their first message.

        Args:
            offsets: Offsets of this source in the chain.
        """
        self._next = {int(name.rpartition("/")[2]): int(value) for name, value in offsets.items()}

    @property
    def behind(self) -> bool:
        """Return whether a partition may have more messages, or is not known yet."""
        return self._unassigned or not self.partitions <= self._ended

    def close(self) -> None:
        """Leave the brokers."""
        self._consumer.close()

    def again(self, item: Item, soon: bool) -> None:
        """Do nothing: messages are in order, and none is delivered twice."""

    def items(self) -> Iterator[Item | None]:
        """Yield the item of each message, and None after a short wait without any.

        Raises:
            LostItems: If the brokers no longer have messages that were never read.
            ValueError: If the brokers refuse the topic.
        """
        look = 0.0
        while True:
            if time.monotonic() >= look:
                self._assign()
                look = time.monotonic() + (AGAIN_SECONDS if self._unassigned else PARTITIONS_SECONDS)
            message = self._consumer.poll(TICK)
            if message is None:
                yield None
            elif (error := message.error()) is not None:
                self._judge(error, message)
            else:
                self._trouble = ""
                self._ended.discard(message.partition())
                yield self._item(message)

    def _assign(self) -> None:
        """Begin to read partitions that are new.

        Raises:
            LostItems: If the brokers do not have the messages after the offset of one.
        """
        try:
            found = self._consumer.list_topics(self.topic, timeout=ANSWER_SECONDS).topics[self.topic].partitions
            for partition in sorted(set(found) - self.partitions):
                place = self._kafka.TopicPartition(self.topic, partition, self._kafka.OFFSET_BEGINNING)
                if partition in self._next:
                    lowest, end = self._consumer.get_watermark_offsets(place, timeout=ANSWER_SECONDS)
                    if not lowest <= self._next[partition] <= end:
                        raise LostItems(self._lost(partition, f"it has {lowest} to {end}"))
                    place.offset = self._next[partition]
                self._consumer.incremental_assign([place])
                self.partitions.add(partition)
            self._unassigned = False
        except self._kafka.KafkaException as error:
            # Those that are known are read as soon as the brokers answer again.
            self._unassigned = True
            self._report(error.args[0])

    def _lost(self, partition: int, why: str) -> str:
        return (
            f"partition {partition} of {self.topic} has no offset {self._next.get(partition)}, where the data set ends: its "
            f"messages were removed before they were read, or the topic was made anew ({why}). To read what is there, as "
            "another source: --name"
        )

    def _report(self, error: Any) -> None:
        """Report that the brokers do not answer, once until they do."""
        if not self._trouble:
            self.say(f"the brokers of {self.topic} do not answer, trying again: {error}")
        self._trouble = str(error)

    def _judge(self, error: Any, message: Any) -> None:
        """Report an error that passes, and raise one that does not."""
        code, known = error.code(), self._kafka.KafkaError
        if code == known._PARTITION_EOF:
            self._ended.add(message.partition())
            return
        if code in (known._AUTO_OFFSET_RESET, known.OFFSET_OUT_OF_RANGE):
            raise LostItems(self._lost(message.partition(), str(error)))
        if error.fatal() or code in (
            known.TOPIC_AUTHORIZATION_FAILED,
            known.UNKNOWN_TOPIC_OR_PART,
            known._AUTHENTICATION,
        ):
            raise ValueError(f"the brokers refuse {self.topic}: {error}")
        self._report(error)

    def _item(self, message: Any) -> Item:
        partition, offset = message.partition(), message.offset()
        kind, milliseconds = message.timestamp()
        made = milliseconds / 1000 if kind != self._kafka.TIMESTAMP_NOT_AVAILABLE else time.time()
        self._next[partition] = offset + 1
        read = partial(contents, message.value(), message.headers() or [], self.paths_under)
        return Item(
            f"{self.name}_{partition}-{offset}", f"{self.topic}/{partition}", offset, made, read,
            (f"{self.name}/{partition}", offset + 1),
        )  # fmt: skip


def contents(value: bytes | None, headers: list[tuple[str, Any]], paths_under: str | None) -> tuple[Content, Content]:
    """Return the image and the mask of a message.

    It is the bytes of an image file, with those of the mask in a header "mask". Or it is a .npz with both. Or it is JSON with
    the paths of both, {"image": "a.png", "mask": "b.png"}.

    Args:
        value: Value of the message.
        headers: Its headers.
        paths_under: Folder or URL of the paths; None refuses them.

    Raises:
        ValueError: If it is none of these.
        OSError: If a file cannot be read.
    """
    if not value:
        raise ValueError("the message has no value")
    if value.lstrip()[:1] == b"{":
        return of_paths(value, paths_under)
    masks = [mask for name, mask in headers if name == "mask"]
    kind = kind_of(value, "value")
    if kind == "npz" and not masks:
        return Content("npz", value), Content("npz", value)
    if len(masks) != 1 or not masks[0]:
        raise ValueError(
            f"the message has {len(masks)} headers named mask; it must have one, with the bytes of the mask's file"
        )
    return Content(kind, value), Content(kind_of(masks[0], "header mask"), masks[0])


def of_paths(value: bytes, paths_under: str | None) -> tuple[Content, Content]:
    """Return the image and the mask that a message names.

    Raises:
        ValueError: If it is not valid, or a path leaves the folder.
        OSError: If a file cannot be read.
    """
    try:
        told = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the message begins as JSON, but is not: {error}") from error
    paths = [told.get("image"), told.get("mask")]
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError('the message must be JSON such as {"image": "a.png", "mask": "b.png"}')
    if paths_under is None:
        raise ValueError("the message names files, and no folder is given for them: --paths_under")
    image, mask = (content_at(paths_under, path) for path in paths)
    return image, mask


def content_at(folder: str, path: str) -> Content:
    """Read a file below a folder.

    Raises:
        ValueError: If the path leaves the folder, or the file is too large.
        OSError: If it cannot be read.
    """
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or ":" in path or "\\" in path or "\0" in path:
        raise ValueError(f"the path {path!r} is not one below the folder of --paths_under")
    location = storage.join(folder, path)
    size = storage.size(location)
    if size > MAX_FILE:
        raise ValueError(f"{path} has {size} bytes; at most {MAX_FILE} are read")
    return Content(parts.suffix[1:].lower(), storage.read_bytes(location))


def kind_of(data: bytes, what: str) -> str:
    """Return the extension of a file by its first bytes.

    Args:
        data: The file.
        what: What it is in messages.

    Raises:
        ValueError: If they are of no known kind.
    """
    for start, extension in KINDS:
        if data.startswith(start):
            return extension
    raise ValueError(f"the {what} begins with {data[:8]!r}; only PNG, JPEG, TIFF, .npy and .npz are read")
