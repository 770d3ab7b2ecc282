"""Journal of what an ingest could not use: one JSON line for each item, with the reason."""

import json
import os
import time
from pathlib import Path
from typing import Any

from deepskip.data_shards import storage


class Journal:
    """Items that were refused, on disk and in memory, so that each is listed once.

    A line that a killed process left incomplete is removed. An item whose contents change is new, and so is every item if it is
    read with other options than those with which it was refused.

    Args:
        path: The file; it is made, or continued.
        source: Name of the source.
        options: Digest of the options with which items are read.

    Attributes:
        refused: Version of each item of this source that was refused with these options; if versions are numbers, the last.
        count: Number of items that this process refused.
    """

    def __init__(self, path: Path, source: str, options: str = "") -> None:
        self.path, self.source, self.options, self.count = path, source, options, 0
        self.refused: dict[str, str | int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        whole = 0
        # Another source may have the same journal.
        with storage.flock(self._file), path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    whole += len(line)
                    self._remember(line)
            self._file.truncate(whole)
        self._synced = True

    def _remember(self, line: bytes) -> None:
        try:
            told: dict[str, Any] = json.loads(line)
            if (told["source"], told.get("options", "")) == (self.source, self.options):
                self.refused[told["item"]] = told["version"]
        # A person may have edited the file.
        except (ValueError, KeyError, TypeError):
            return

    def has(self, item: str, version: str | int) -> bool:
        """Return whether an item is in the journal with this version, or with a later number."""
        before = self.refused.get(item)
        if isinstance(version, int) and isinstance(before, int):
            return version <= before
        return before == version

    def add(self, item: str, version: str | int, reason: str) -> bool:
        """Write an item, and return whether it is new.

        Args:
            item: Name of the item.
            version: What changes if its contents do.
            reason: Why it cannot be used.

        Raises:
            OSError: If the file cannot be written.
        """
        if self.has(item, version):
            return False
        told = {
            "time": time.time(), "source": self.source, "item": item, "version": version, "options": self.options,
            "reason": reason,
        }  # fmt: skip
        with storage.flock(self._file):
            self._file.write(json.dumps(told).encode() + b"\n")
            self._file.flush()
        self.refused[item] = version
        self.count += 1
        self._synced = False
        return True

    def sync(self) -> None:
        """Make all lines durable, before the offsets after their items are."""
        if not self._synced:
            os.fsync(self._file.fileno())
            self._synced = True

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        self._file.close()
