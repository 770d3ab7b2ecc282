"""Progress reports of long work: the caller passes a function that wraps the items to process."""

from collections.abc import Callable, Iterable
from typing import Any

# Takes items and their total number, and yields the same items.
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def no_progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """Return the items without showing progress."""
    return items


def no_word(line: str) -> None:
    """Discard a message."""
