"""A watched folder as a source: a file counts once it has its name for good, and its image or mask is there too."""

import contextlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from deepskip.data_shards import commit, storage
from deepskip.data_shards.ingest.files import IMAGES, MASKS, File, Pair, Pairs, extension, require_size, short_name
from deepskip.data_shards.ingest.items import Changed, Content, Item
from deepskip.data_shards.sources.split import PackError

# Seconds between listings of the whole folder: network file systems send no events, and a queue of events may overflow.
SCAN_SECONDS = 30.0
# Seconds without a change after which a file counts that was begun and never closed.
STALLED_SECONDS = 600.0
# Seconds between looks at files that are not ready.
TICK = 0.25
MARK = ".deepskip-source"
# What was last seen of a file.
WRITING, FINISHED, SEEN = "writing", "finished", "seen"


def name_of(folder: Path) -> str:
    """Return the name of a folder as a source, which it keeps when it is moved or mounted elsewhere.

    The name is in a file of the folder, since folders of several machines may have one path.

    Raises:
        PackError: If there is no such folder, or the file can neither be read nor written.
    """
    if not folder.is_dir():
        raise PackError(f"{folder} is not a folder")
    mark = folder / MARK
    try:
        if not mark.exists():
            commit.create(str(mark), short_name(folder.resolve().name, secrets.token_hex()).encode())
        name = mark.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(
            f"{mark} cannot be made or read ({error}). It holds the name of the source; choose one instead: --name"
        ) from error
    return name


class WatchedFolder:
    """A folder whose files are delivered in pairs.

    Args:
        folder: The folder.
        pairs: How its files are paired.
        settle_seconds: A file whose writing was not observed counts after this time without a change.

    Attributes:
        waiting: Number of files that lack their image or mask, or are being written.
        behind: Whether pairs are complete, but may still be written.

    Raises:
        PackError: If the folder, or one of images/ and masks/ in it, does not exist.
    """

    def __init__(self, folder: Path, pairs: Pairs, settle_seconds: float) -> None:
        from watchdog.observers import Observer

        self.folder, self.pairs, self.settle_seconds = folder, pairs, settle_seconds
        self.waiting, self.behind = 0, False
        self.folders = [folder] if pairs.mask_suffix else [folder / IMAGES, folder / MASKS]
        for each in self.folders:
            if not each.is_dir():
                raise PackError(
                    f"{each} is not a folder; images and masks are in {IMAGES}/ and {MASKS}/, or all in {folder} with "
                    "--mask_suffix _mask"
                )
        # What is known of files from events, and what each version was first seen at.
        self.states: dict[str, str] = {}
        self.since: dict[str, tuple[str, float]] = {}
        self._events: dict[str, str] = {}
        self._lock, self._woken = threading.Lock(), threading.Event()
        self._next_scan = 0.0
        self._observer = Observer()
        try:
            for each in self.folders:
                self._observer.schedule(_Handler(self._record), str(each))
            self._observer.start()
        except OSError as error:
            raise storage.StorageError(
                f"{folder} cannot be watched: {error}; Linux limits such watches: sysctl fs.inotify.max_user_instances and "
                "fs.inotify.max_user_watches"
            ) from error

    def close(self) -> None:
        """Stop to watch the folder."""
        self._observer.stop()
        self._observer.join()

    def again(self, item: Item, soon: bool) -> None:
        """Take back an item: its files are listed again, in a moment or with the next listing."""
        self.pairs.flying.discard(item.key)
        if soon:
            self._next_scan = min(self._next_scan, time.monotonic() + max(TICK, self.settle_seconds))

    def items(self) -> Iterator[Item | None]:
        """Yield the item of each pair once its files are complete, and None after a short wait without any.

        Raises:
            OSError: If the folder cannot be listed.
        """
        while True:
            self._look()
            found = list(self.pairs.complete())
            pairs = [pair for pair in found if self._is_ready(pair.image) and self._is_ready(pair.mask)]
            self.behind = len(found) > len(pairs)
            self.waiting = self.pairs.lone() + 2 * (len(found) - len(pairs))
            for pair in pairs:
                self.pairs.deliver(pair)
                for file in (pair.image, pair.mask):
                    self.states.pop(file.place, None)
                    self.since.pop(file.place, None)
                yield Item(pair.key, pair.image.place, pair.version, pair.time, partial(self._read, pair))
            if not pairs:
                self._woken.wait(TICK)
                yield None

    def _record(self, path: str, state: str) -> None:
        """Record an event, in the observer's thread."""
        place = Path(path).relative_to(self.folder).as_posix()
        with self._lock:
            # A change is not forgotten for a later event of another kind.
            if state != SEEN or place not in self._events:
                self._events[place] = state
        self._woken.set()

    def _look(self) -> None:
        """Take up what events say, and list everything from time to time."""
        self._woken.clear()
        with self._lock:
            events, self._events = self._events, {}
        for place, state in events.items():
            role = self.pairs.role(place)
            if state != SEEN and role is not None and self.pairs.is_new(role[1]):
                self.states[place] = state
        self.pairs.committed()
        if time.monotonic() >= self._next_scan:
            started = time.monotonic()
            self.pairs.clear()
            places = self._places()
            # Of a folder of millions of files, most of the time is not spent on lists.
            self._next_scan = time.monotonic() + max(SCAN_SECONDS, 10 * (time.monotonic() - started))
            for known in (self.states, self.since):
                for gone in known.keys() - places:
                    del known[gone]
        else:
            # Files that are not ready may have changed.
            places = events.keys() | {file.place for pair in self.pairs.complete() for file in (pair.image, pair.mask)}
        # Of two images of one stem, the first in the alphabet counts.
        for place in sorted(places):
            role = self.pairs.role(place)
            if role is not None and self.pairs.is_new(role[1]):
                with contextlib.suppress(FileNotFoundError):
                    status = (self.folder / place).stat()
                    # A pipe would block.
                    if stat.S_ISREG(status.st_mode):
                        self.pairs.add(role, File(place, version_of(status), status.st_mtime, status.st_size))
                    else:
                        self.pairs.journal.add(place, version_of(status), "is not a file")

    def _places(self) -> set[str]:
        """List the folder.

        Raises:
            StorageError: If that fails.
        """
        try:
            if len(self.folders) == 1:
                return set(storage.names(self.folder))
            return {f"{each.name}/{entry}" for each in self.folders for entry in storage.names(each)}
        except OSError as error:
            raise storage.StorageError(f"{self.folder} cannot be listed any more: {error}") from error

    def _is_ready(self, file: File) -> bool:
        """Return whether nobody writes a file any more."""
        state = self.states.get(file.place, SEEN)
        version, first = self.since.setdefault(file.place, (file.version, time.monotonic()))
        if version != file.version:
            first = time.monotonic()
            self.since[file.place] = (file.version, first)
        if state == FINISHED:
            return True
        # The clock of a network file system may differ, so the time of its last change is no proof that it is recent.
        still = max(time.time() - file.modified, time.monotonic() - first)
        return still >= (STALLED_SECONDS if state == WRITING or file.size == 0 else self.settle_seconds)

    def _read(self, pair: Pair) -> tuple[Content, Content]:
        """Read the files of a pair.

        Raises:
            Changed: If one is not what it was when it was found.
            ValueError: If one is too large.
            OSError: If one cannot be read.
        """
        return self._content(pair.image), self._content(pair.mask)

    def _content(self, file: File) -> Content:
        require_size(file)
        with (self.folder / file.place).open("rb") as opened:
            data = opened.read()
            found = os.fstat(opened.fileno())
        if version_of(found) != file.version or len(data) != file.size:
            raise Changed
        return Content(extension(file), data)


class _Handler:
    """Receives watchdog's events.

    Args:
        record: Called with a path and what was seen of it.
    """

    def __init__(self, record: Any) -> None:
        self.record = record

    def dispatch(self, event: Any) -> None:
        """Record an event of a file."""
        if event.is_directory:
            return
        kind = event.event_type
        if kind == "moved":
            self.record(event.dest_path, FINISHED)
        elif kind in ("modified", "closed", "created"):
            self.record(event.src_path, {"modified": WRITING, "closed": FINISHED, "created": SEEN}[kind])


def version_of(status: os.stat_result) -> str:
    """Return what changes if a file does, or if another takes its name."""
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
