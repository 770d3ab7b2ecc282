"""index.json: what lies where in a folder of shards, and what a network must know of the data."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "index.json"
FORMAT = "deepskip-shards"
VERSION = 1


@dataclass(frozen=True)
class Member:
    """One file of a sample inside its tar: extension, first byte and length in bytes."""

    extension: str
    offset: int
    length: int


@dataclass(frozen=True)
class SampleEntry:
    """One sample: its key and the places of its image and mask."""

    key: str
    image: Member
    mask: Member


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: name beside the index, bytes, sha256 and samples in the order of the tar."""

    name: str
    bytes: int
    sha256: str
    samples: tuple[SampleEntry, ...]


@dataclass(frozen=True)
class Index:
    """A split: its shards and their common properties.

    bands: of every image. dtype: "uint8" when every image is, else "float32". num_classes: 1 for binary, else classes with
    background 0. ignore_index: label that takes no part. mean, std: of each band over all pixels of the split, in the
    images' own units. preparation: what was done to the source images, and must be done to new ones:
    "bands" and "longest_side", each a number or None.
    """

    shards: tuple[ShardEntry, ...]
    bands: int
    dtype: str
    num_classes: int
    ignore_index: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preparation: dict[str, int | None]

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(len(shard.samples) for shard in self.shards)


class MissingIndex(FileNotFoundError):
    """There are no shards, or no index of them, at the path."""


class BrokenIndex(ValueError):
    """The index cannot be read."""


def load_index(folder: Path) -> Index:
    """Reads a split's index; raises MissingIndex or BrokenIndex, which say what to do."""
    path = folder / FILE
    if not path.is_file():
        seen = (
            f"holds {len(list(folder.glob('*.tar')))} .tar files but no {FILE}" if folder.is_dir() else "does not exist"
        )
        raise MissingIndex(
            f"no shards at {folder}: it {seen}. Pack some: python -m data_shards pack folder --images DIR --masks DIR --out "
            f"{folder.parent}"
        )
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT or raw["version"] > VERSION:
            raise ValueError(f"it is {raw['format']} version {raw['version']}, this reads {FORMAT} up to {VERSION}")
        shards = tuple(_shard(shard) for shard in raw["shards"])
        return Index(
            shards, raw["bands"], raw["dtype"], raw["num_classes"], raw["ignore_index"],
            tuple(raw["mean"]), tuple(raw["std"]), raw["preparation"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenIndex(f"{path} cannot be read: {error!r}. Pack the shards again.") from error


def save_index(index: Index, folder: Path) -> None:
    """Writes a split's index whole or not at all."""
    raw: dict[str, Any] = {"format": FORMAT, "version": VERSION} | asdict(index)
    # a list a sample instead of names repeated a million times
    raw["shards"] = [
        {
            "name": shard.name,
            "bytes": shard.bytes,
            "sha256": shard.sha256,
            "samples": [
                [
                    s.key,
                    s.image.extension,
                    s.image.offset,
                    s.image.length,
                    s.mask.extension,
                    s.mask.offset,
                    s.mask.length,
                ]
                for s in shard.samples
            ],
        }
        for shard in index.shards
    ]
    temporary = folder / f".{FILE}.{os.getpid()}"
    with temporary.open("w") as file:
        json.dump(raw, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)


def _shard(raw: dict[str, Any]) -> ShardEntry:
    # names come from a file that anyone may have written: they must not lead out of the folder
    if "/" in raw["name"] or raw["name"].startswith("."):
        raise ValueError(f"shard name {raw['name']!r} is no plain file name")
    samples = tuple(SampleEntry(s[0], Member(*s[1:4]), Member(*s[4:7])) for s in raw["samples"])
    return ShardEntry(raw["name"], raw["bytes"], raw["sha256"], samples)


def file_sha256(path: Path) -> str:
    """Computes a file's sha256 as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> list[str]:
    """Compares every shard with the index, byte for byte; gives a line for each fault, so none when all is well."""
    faults = []
    for shard in load_index(folder).shards:
        path = folder / shard.name
        if not path.is_file():
            faults.append(f"{path} is gone")
        elif path.stat().st_size != shard.bytes:
            faults.append(f"{path} has {path.stat().st_size} bytes; the index says {shard.bytes}")
        elif file_sha256(path) != shard.sha256:
            faults.append(f"{path} has the right size but other contents than when it was indexed (sha256 differs)")
    return faults
