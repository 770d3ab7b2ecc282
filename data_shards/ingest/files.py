"""Files of a folder or an object store that are images and masks: which belong together, and which are new."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from deepskip.data_shards.ingest.items import MAX_FILE, key_of
from deepskip.data_shards.ingest.journal import Journal
from deepskip.data_shards.sample import EXTENSIONS

IMAGES, MASKS = "images", "masks"


class File(NamedTuple):
    """A file of a source.

    Attributes:
        place: Its path below the source, with slashes.
        version: What changes if its contents do.
        modified: When it was last written, in seconds since 1970.
        size: Its size in bytes.
    """

    place: str
    version: str
    modified: float
    size: int


class Pair(NamedTuple):
    """An image and its mask."""

    stem: str
    key: str
    image: File
    mask: File

    @property
    def version(self) -> str:
        """Return what changes if the contents of one of them do."""
        return f"{self.image.version} {self.mask.version}"

    @property
    def time(self) -> float:
        """Return when the later of them was written."""
        return max(self.image.modified, self.mask.modified)


@dataclass
class Pairs:
    """Pairs the files of a source by stem, and knows which were delivered.

    Attributes:
        name: Name of the source, with which keys begin.
        mask_suffix: What follows the image's stem in the mask's, both in one folder; "" for folders images/ and masks/.
        taken: Keys that are in the chain.
        journal: Items that were refused.
        flying: Keys that were delivered and are not yet in the chain.
        images: Images that were not delivered, by stem.
        masks: Masks, likewise.
    """

    name: str
    mask_suffix: str
    taken: set[str]
    journal: Journal
    flying: set[str] = field(default_factory=set)
    images: dict[str, File] = field(default_factory=dict)
    masks: dict[str, File] = field(default_factory=dict)

    def role(self, place: str) -> tuple[str, str] | None:
        """Return "images" or "masks" and the stem of a file, or None if it is neither.

        Args:
            place: Path of the file below the source, with slashes.
        """
        path = PurePosixPath(place)
        if path.name.startswith(".") or path.suffix[1:].lower() not in EXTENSIONS:
            return None
        if self.mask_suffix:
            if len(path.parts) != 1:
                return None
            is_mask = path.stem.endswith(self.mask_suffix)
            return (MASKS, path.stem.removesuffix(self.mask_suffix)) if is_mask else (IMAGES, path.stem)
        return (path.parts[0], path.stem) if len(path.parts) == 2 and path.parts[0] in (IMAGES, MASKS) else None

    def is_new(self, stem: str) -> bool:
        """Return whether the item of a stem was not delivered yet."""
        key = key_of(self.name, stem)
        return key not in self.taken and key not in self.flying

    def add(self, role: tuple[str, str], file: File) -> None:
        """Add a file that is new, or another version of one.

        A second image or mask of a stem is refused.

        Args:
            role: What `role` returned for it.
            file: The file.
        """
        kind, stem = role
        known = self.images if kind == IMAGES else self.masks
        before = known.setdefault(stem, file)
        if before.place != file.place:
            self.journal.add(
                file.place, file.version, f"has the stem of {before.place}; a sample has one image and one mask"
            )
            return
        known[stem] = file

    def complete(self) -> Iterator[Pair]:
        """Yield the pairs that are complete and were not refused, the oldest first."""
        found = [
            Pair(s, key_of(self.name, s), self.images[s], self.masks[s]) for s in self.images.keys() & self.masks.keys()
        ]
        for pair in sorted(found, key=lambda pair: (pair.time, pair.stem)):
            if not self.journal.has(pair.image.place, pair.version):
                yield pair

    def lone(self) -> int:
        """Return the number of files that lack their image or mask."""
        return len(self.images.keys() ^ self.masks.keys())

    def deliver(self, pair: Pair) -> None:
        """Record that a pair was delivered."""
        self.flying.add(pair.key)
        del self.images[pair.stem], self.masks[pair.stem]

    def committed(self) -> None:
        """Forget the keys that are in the chain now."""
        self.flying -= self.taken

    def clear(self) -> None:
        """Forget the files that were not delivered, before they are listed again."""
        self.images.clear()
        self.masks.clear()


def require_size(file: File) -> None:
    """Raise ValueError if a file is too large to be held in memory."""
    if file.size > MAX_FILE:
        raise ValueError(f"{file.place} has {file.size} bytes; at most {MAX_FILE} are read")


def extension(file: File) -> str:
    """Return the extension of a file, in lower case and without a dot."""
    return PurePosixPath(file.place).suffix[1:].lower()


def short_name(text: str, identity: str) -> str:
    """Return a source's name for keys and offsets: a readable part, and a digest of what tells it from others.

    Args:
        text: The readable part.
        identity: What no other source has.
    """
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[-40:] or "source"
    return f"{plain}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
