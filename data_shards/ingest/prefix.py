"""A prefix of an object store as a source: it is listed from time to time, and objects appear whole."""

import time
from collections.abc import Callable, Iterator
from functools import partial

from deepskip.data_shards import storage
from deepskip.data_shards.ingest.files import File, Pair, Pairs, extension, require_size, short_name
from deepskip.data_shards.ingest.items import Content, Item
from deepskip.data_shards.strays import time_of

TICK = 0.25


def name_of(url: str) -> str:
    """Return the name of a prefix as a source."""
    return short_name(storage.name(url), url.rstrip("/"))


class Prefix:
    """A prefix whose objects are delivered in pairs.

    Args:
        url: URL of the prefix, such as s3://bucket/prefix.
        pairs: How its objects are paired.
        poll_seconds: Seconds between listings.
        say: Called with a line when the prefix cannot be listed, or is empty.

    Attributes:
        waiting: Number of objects that lack their image or mask.
        behind: Whether the prefix could not be listed.
    """

    def __init__(self, url: str, pairs: Pairs, poll_seconds: float, say: Callable[[str], None]) -> None:
        self.url, self.pairs, self.poll_seconds, self.say = url.rstrip("/"), pairs, poll_seconds, say
        self.fs, self.path = storage.filesystem(self.url)
        self.waiting, self.behind, self._said = 0, False, ""

    def close(self) -> None:
        """Do nothing, since nothing is watched."""

    def again(self, item: Item, soon: bool) -> None:
        """Take back an item: its objects are listed again."""
        self.pairs.flying.discard(item.key)

    def items(self) -> Iterator[Item | None]:
        """Yield the item of each pair that is new, and None after a short wait without any."""
        while True:
            started = time.monotonic()
            self._list()
            took = time.monotonic() - started
            self.waiting = self.pairs.lone()
            for pair in list(self.pairs.complete()):
                self.pairs.deliver(pair)
                yield Item(pair.key, pair.image.place, pair.version, pair.time, partial(self._read, pair))
            end = time.monotonic() + max(self.poll_seconds, took)
            while (left := end - time.monotonic()) > 0:
                yield None
                time.sleep(min(TICK, left))

    def _list(self) -> None:
        """List what is new; if the store does not answer, or has nothing, that is reported once."""
        self.pairs.committed()
        self.pairs.clear()
        try:
            entries = storage.with_retries(self.url, lambda: self.fs.find(self.path, detail=True))
        except FileNotFoundError:
            entries = {}
        except OSError as error:
            self._report(f"{self.url} cannot be listed, trying again: {error}")
            self.behind = True
            return
        self.behind = False
        self._report("" if entries else f"{self.url} has no files yet")
        for path, told in entries.items():
            place = path[len(self.path) :].lstrip("/")
            role = self.pairs.role(place)
            if role is not None and self.pairs.is_new(role[1]):
                modified, size = time_of(told), int(told.get("size") or 0)
                version = str(told.get("ETag") or told.get("etag") or f"{modified}-{size}")
                self.pairs.add(role, File(place, version, modified, size))

    def _report(self, text: str) -> None:
        if text and text != self._said:
            self.say(text)
        self._said = text

    def _read(self, pair: Pair) -> tuple[Content, Content]:
        """Read the objects of a pair.

        Raises:
            ValueError: If one is too large.
            OSError: If one cannot be read.
        """
        return self._content(pair.image), self._content(pair.mask)

    def _content(self, file: File) -> Content:
        require_size(file)
        return Content(extension(file), storage.read_bytes(storage.join(self.url, file.place)))
