"""Look for the generations that are appended to a split, in a thread, so that no training step waits for a storage."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from deepskip.data_shards.manifest import BrokenChain, Generation, following

# Fields of a manifest that reading its samples needs.
NEEDED = ("samples", "shards", "formats", "bands", "watermark")
# Generations that are found and not taken yet; more are not read, so that memory is bounded while they come too fast.
MOST_FOUND = 10_000


class ChainPoller:
    """Find the generations after one that is known, and keep those until they are taken.

    A storage that cannot be reached is asked again; a warning is given once for each outage.

    Args:
        split: Path or URL of the split.
        first: Fields of generation 0.
        last: The newest generation that is known.
        seconds: Time between two looks.
        warn: Function that is called with a warning, in the thread.

    Attributes:
        samples: Number of samples that are found and not taken.
        looks: Number of looks that are complete.
    """

    def __init__(
        self, split: str, first: dict[str, Any], last: Generation, seconds: float, warn: Callable[[str], None]
    ) -> None:
        self.split, self.first, self.last, self.seconds, self.warn = split, first, last, seconds, warn
        self.samples = self.looks = 0
        self._found: deque[Generation] = deque()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._fault: BrokenChain | None = None
        self._unreachable = False
        self._thread = threading.Thread(target=self._poll, name="deepskip-poll", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, which may still wait for a storage."""
        self._closed.set()

    def take(self, most: int) -> list[Generation]:
        """Return the next generations, or [] if nothing with a sample was found.

        Args:
            most: Largest number of generations.

        Raises:
            BrokenChain: If what follows cannot be read; after all before it were taken.
        """
        with self._lock:
            if not self.samples:
                if self._fault is not None:
                    raise self._fault
                return []
            taken: list[Generation] = []
            # A segment has one sample at least.
            while self._found and (len(taken) < most or not sum(each.samples for each in taken)):
                taken.append(self._found.popleft())
            self.samples -= sum(each.samples for each in taken)
            return taken

    def look(self) -> None:
        """Look once for further generations.

        Raises:
            BrokenChain: If a manifest cannot be read.
            OSError: If the storage cannot be reached.
        """
        new: list[Generation] = []
        try:
            for generation in following(self.split, self.first, self.last, MOST_FOUND - len(self._found)):
                self.last = trimmed(generation)
                new.append(self.last)
        finally:
            # What is there at the same time is taken together.
            with self._lock:
                self._found += new
                self.samples += sum(each.samples for each in new)

    def _poll(self) -> None:
        while not self._closed.is_set():
            try:
                self.look()
                self._unreachable, self.looks = False, self.looks + 1
            except BrokenChain as error:
                self._fault = error
                return
            except OSError as error:
                if not self._unreachable:
                    self.warn(f"cannot look for new generations of {self.split}, trying again: {error}")
                self._unreachable = True
            self._closed.wait(self.seconds)


def trimmed(generation: Generation) -> Generation:
    """Return a generation with only the fields that reading its samples needs."""
    raw = {name: generation.raw[name] for name in NEEDED if name in generation.raw}
    return Generation(generation.number, generation.digest, raw)
