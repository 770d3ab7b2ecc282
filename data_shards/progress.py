"""How long work says how far it is: whoever starts it hands in what wraps the things it goes through."""

from collections.abc import Callable, Iterable
from typing import Any

# takes items and how many there are, gives them again
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


def no_progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    """Shows nothing."""
    return items


def no_word(line: str) -> None:
    """Says nothing."""
