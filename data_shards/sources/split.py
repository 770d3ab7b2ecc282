"""Assign samples to splits, by a file or at random."""

import csv
import random
import re
from pathlib import Path

from deepskip.data_shards.labels import listed

SPLITS = ("train", "val", "test")


class PackError(ValueError):
    """Images and masks that do not make a data set; the message lists the files at fault."""


def split_stems(
    stems: list[str], split: Path | None, val_share: float, seed: int, split_name: str | None = None
) -> dict[str, list[str]]:
    """Assign stems to splits.

    Args:
        stems: Stems of the samples.
        split: CSV with columns stem,split, or None for a random split.
        val_share: Share of stems for validation in a random split, 0 to 1.
        seed: Seed of the random split.
        split_name: Split that all stems go into, or None.

    Returns:
        Stems by split.

    Raises:
        PackError: If the CSV does not fit the stems, `val_share` leaves a split empty, or `split_name` is unknown or comes with
            a CSV.
    """
    if split_name is not None:
        if split is not None or split_name not in SPLITS:
            raise PackError(
                f"split_name is {split_name!r}; it must be one of {', '.join(SPLITS)}, and without a split file"
            )
        return {split_name: stems}
    return read_split(split, stems) if split else draw_split(stems, val_share, seed)


def read_split(path: Path, stems: list[str]) -> dict[str, list[str]]:
    """Read a CSV with columns stem,split, and return the stems by split.

    Raises:
        PackError: If the file is missing or has wrong columns, or stems or splits are missing, repeated or unknown.
    """
    rows = [(row["stem"], row["split"]) for row in rows_of(path, "split", ("stem", "split"))]
    by_stem = dict(rows)
    faults = []
    if len(by_stem) != len(rows):
        faults.append(f"{path} names {len(rows) - len(by_stem)} stems more than once")
    if wrong := sorted(set(by_stem.values()) - set(SPLITS)):
        faults.append(f"{path} has splits {listed(wrong)}; allowed are {', '.join(SPLITS)}")
    if absent := sorted(set(stems) - by_stem.keys()):
        faults.append(f"{len(absent)} images are not in {path}: {listed(absent)}")
    if unknown := sorted(by_stem.keys() - set(stems)):
        faults.append(f"{len(unknown)} stems in {path} have no image: {listed(unknown)}")
    if not {"train", "val"} <= set(by_stem.values()):
        faults.append(f"{path} needs at least one train and one val")
    if faults:
        raise PackError("\n".join(faults))
    parts = {name: [stem for stem in stems if by_stem[stem] == name] for name in SPLITS}
    return {name: members for name, members in parts.items() if members}


def rows_of(path: Path, what: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Read a CSV file in UTF-8.

    Args:
        path: The file.
        what: What it is, for messages.
        columns: Columns that it needs.

    Returns:
        The rows, with a text for each column.

    Raises:
        PackError: If it is missing, is not such a file or lacks a column.
    """
    if not path.is_file():
        raise PackError(f"the {what} file {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        # Excel begins a file with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            if not set(columns) <= set(reader.fieldnames or ()):
                raise PackError(f"{path} has columns {reader.fieldnames}; it needs {','.join(columns)}")
            return list(reader)
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is not in UTF-8: save it as CSV UTF-8") from error
    except csv.Error as error:
        raise PackError(f"{path} cannot be read as CSV: {error}; is a quote not closed?") from error


def draw_split(stems: list[str], val_share: float, seed: int) -> dict[str, list[str]]:
    """Draw val_share of the stems, at least one, for validation; the others are for training.

    Raises:
        PackError: If one of the two splits would be empty.
    """
    if not 0 < val_share < 1 or len(stems) < 2:
        raise PackError(f"val_share is {val_share} of {len(stems)} images; it must leave one for train and one for val")
    drawn = random.Random(seed).sample(range(len(stems)), min(len(stems) - 1, max(1, round(val_share * len(stems)))))
    chosen = set(drawn)
    return {
        "train": [stem for i, stem in enumerate(stems) if i not in chosen],
        "val": [stem for i, stem in enumerate(stems) if i in chosen],
    }


def read_colours(path: Path) -> tuple[tuple[int, int, int, int], ...]:
    """Read a CSV with columns color,label, such as "#ff0000,1".

    Returns:
        Red, green, blue and label of each row.

    Raises:
        PackError: If the file is missing or has wrong columns, or a row is not valid; names the row.
    """
    found: dict[tuple[int, int, int], int] = {}
    for number, row in enumerate(rows_of(path, "colour", ("color", "label")), 2):
        colour, label = (row["color"] or "").strip().removeprefix("#"), (row["label"] or "").strip()
        if not re.fullmatch("[0-9a-fA-F]{6}", colour) or not re.fullmatch("[0-9]{1,3}", label) or int(label) > 255:
            raise PackError(f"{path}, line {number}: {row['color']},{row['label']} is not a row such as #ff0000,1")
        red, green, blue = bytes.fromhex(colour)
        if found.setdefault((red, green, blue), int(label)) != int(label):
            raise PackError(f"{path} gives #{colour} two labels, the second in line {number}")
    if not found:
        raise PackError(f"{path} has no rows")
    return tuple((*colour, label) for colour, label in found.items())
