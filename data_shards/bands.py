"""Choose some of the bands of images: which are meant, and a view of an index that has only those."""

from collections.abc import Sequence
from dataclasses import replace

from deepskip.data_shards.index import Index


class BandError(ValueError):
    """A choice of bands that images do not allow; the message says which band, and why."""


def chosen_bands(choice: Sequence[int | str], bands: int) -> tuple[int, ...]:
    """Return the numbers of the bands that a choice means, in its order.

    Args:
        choice: Band numbers from 0, and ranges such as "10-40" that include both ends.
        bands: Number of bands of the images.

    Raises:
        BandError: If the choice is empty, is not of numbers and ranges, or names a band twice or one that images lack.
    """
    found: list[int] = []
    seen: set[int] = set()
    for part in choice:
        first, dash, last = str(part).strip().partition("-")
        if isinstance(part, bool) or not is_number(first) or (dash and not is_number(last)):
            raise BandError(f"{part!r} is not a band, such as 5, or a range of bands, such as 10-40")
        low, high = int(first), int(last if dash else first)
        if low > high:
            raise BandError(f"the range {part} ends before it begins")
        if high >= bands:
            raise BandError(f"there is no band {high}: the images have {bands} bands, 0 to {bands - 1}")
        for band in range(low, high + 1):
            if band in seen:
                raise BandError(f"band {band} is named twice")
            seen.add(band)
            found.append(band)
    if not found:
        raise BandError("no band is named; null takes all")
    return tuple(found)


def is_number(text: str) -> bool:
    """Return whether a text is a whole number of up to nine digits."""
    return text.isascii() and text.isdigit() and len(text) < 10


def choose_bands(index: Index, choice: Sequence[int | str] | None) -> Index:
    """Return an index whose images have only the chosen bands.

    Its statistics are those of the chosen bands. Its preparation says which they are ("chosen") and of how many ("of").

    Args:
        index: The index of a split.
        choice: Band numbers and ranges, as in `chosen_bands`; None returns the index itself.

    Raises:
        BandError: If the images do not have these bands.
    """
    if choice is None:
        return index
    chosen = chosen_bands(choice, index.bands)
    return replace(
        index,
        bands=len(chosen),
        mean=tuple(index.mean[band] for band in chosen),
        std=tuple(index.std[band] for band in chosen),
        percentiles=None
        if index.percentiles is None
        else tuple(tuple(row[band] for band in chosen) for row in index.percentiles),
        preparation={**index.preparation, "chosen": list(chosen), "of": index.bands},
        chosen=chosen,
    )


def shown_bands(chosen: Sequence[int]) -> str:
    """Return band numbers as text, with ranges: "0, 5, 10-40"."""
    parts: list[list[int]] = []
    for band in chosen:
        if parts and band == parts[-1][1] + 1:
            parts[-1][1] = band
        else:
            parts.append([band, band])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
