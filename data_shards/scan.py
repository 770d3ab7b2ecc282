"""Scan tar shards, which may be untrusted: find where each sample lies, or what is wrong."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import xxhash

from deepskip.data_shards import tar, tiles
from deepskip.data_shards.entries import Member, SampleEntry
from deepskip.data_shards.index_check import CONTROL
from deepskip.data_shards.sample import EXTENSIONS, BadSample

# Larger files are rejected, in bytes; the index has 32 bits for a length.
MAX_MEMBER = 2**31
# Longest name of a member, folders included; file systems allow no more.
MAX_NAME = 4096
# Names of image and mask after the key, in this project's data sets and in others.
KNOWN_PAIRS = (
    ({"image"}, {"mask"}),
    ({"image", "img", "input"}, {"mask", "seg", "segmentation", "label", "labels", "annotation", "target"}),
    ({"png", "jpg", "tif", "npy"}, {"mask", "seg", "segmentation", "label", "labels", "annotation"}),
    ({"jpg", "tif"}, {"png"}),
)


class BrokenShard(RuntimeError):
    """A shard that is missing, has changed since it was indexed, or is not a whole tar file."""


class UnreachedShard(BrokenShard):
    """A shard whose storage did not answer, or refused for now; later it may."""


@dataclass
class Scan:
    """Contents of one tar.

    Attributes:
        samples: For each key its members: (offset, length) in bytes by suffix, which is what follows the key's dot; in the
            order of the tar.
        bad: Samples that cannot be used.
    """

    samples: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)


def scan_tar(path: Path, name: str) -> Scan:
    """Read the headers of a tar file and return the places of its members.

    As in webdataset, the key is what precedes the first dot of a member's file name, with its folder. Nothing is unpacked,
    and no name is used as a path. Samples with a member that is rejected are listed as bad.

    Args:
        path: The tar file.
        name: Name of the shard in messages.

    Raises:
        BrokenShard: If the file cannot be opened or is not a whole plain tar: cut off, damaged between members, compressed.
    """
    found = Scan()
    spoilt: set[str] = set()
    try:
        if not path.is_file():
            raise BrokenShard(f"{name} is not a file" if path.exists() else f"{name} does not exist")
        with path.open("rb") as file:
            refuse_compressed(file.read(6), name)
            for entry in tar.walk(file.fileno()):
                if entry.kind == tar.END:
                    check_end(file, entry.offset, name, len(found.samples))
                elif entry.kind != tar.FOLDER:
                    note(found, spoilt, entry, name)
    except (FileNotFoundError, PermissionError) as error:
        raise BrokenShard(f"{name} cannot be opened: {error.strerror}") from error
    except tar.TarError as error:
        done = f"is damaged: after {len(found.samples)} samples" if found.samples else "is cut off or damaged:"
        raise BrokenShard(f"{name} {done} {error}") from error
    for key in spoilt:
        found.samples.pop(key, None)
    return found


def refuse_compressed(start: bytes, name: str) -> None:
    """Raise BrokenShard if a file's first bytes are those of a compressed file."""
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"(\xb5/\xfd", "zstd")):
        if start.startswith(magic):
            raise BrokenShard(f"{name} is a {kind} file; members are read at their offsets: unpack it to a plain .tar")


def note(found: Scan, spoilt: set[str], entry: tar.Entry, name: str) -> None:
    """Record a member of a sample, or why the sample cannot be used.

    Args:
        found: The scan, which is extended.
        spoilt: Keys of samples that cannot be used, which is extended.
        entry: The member.
        name: Name of the shard in messages.
    """
    shown = entry.name.decode(errors="backslashreplace")
    folder, _, base = shown.rpartition("/")
    stem, _, suffix = base.partition(".")
    # Files that operating systems leave in archives, such as .DS_Store.
    if base.startswith(".") or not suffix:
        return
    key = f"{folder}/{stem}" if folder else stem
    reason = refusal(entry, shown, found.samples.get(key, {}), suffix)
    if reason and key not in spoilt:
        spoilt.add(key)
        found.bad.append(BadSample(name, printable(key), reason))
    found.samples.setdefault(key, {})[suffix] = (entry.offset, entry.size)


def printable(text: str) -> str:
    """Return a name without terminal control characters, cut to the length of a line."""
    shown = CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
    return shown if len(text) <= MAX_NAME else f"{shown[:60]}... ({len(text)} letters)"


def refusal(entry: tar.Entry, shown: str, members: dict[str, tuple[int, int]], suffix: str) -> str | None:
    """Return why a member is rejected, or None.

    Args:
        entry: The member.
        shown: Its name as text.
        members: Members of the same sample that were found before.
        suffix: The suffix of its name.
    """
    if shown.encode(errors="replace") != entry.name:
        return "its name is not UTF-8"
    if CONTROL.search(shown) or len(shown) > MAX_NAME:
        return f"its name holds control characters, or more than {MAX_NAME} characters"
    if entry.kind != tar.FILE:
        return f"its .{suffix} is not a plain file (a link, device or sparse file)"
    if entry.size > MAX_MEMBER:
        return f"its .{suffix} has {entry.size} bytes; at most {MAX_MEMBER} are read"
    if suffix in members:
        return f"has two members .{suffix}: the key occurs twice"
    return None


def check_end(file: BinaryIO, end: int, name: str, samples: int) -> None:
    """Raise BrokenShard unless at least two blocks of zeros, and nothing else, follow byte `end`.

    The walk over the members stopped there for lack of a header: the file may be cut between members, or a header may be zeros.

    Args:
        file: The open tar.
        end: Offset of the end of the last member.
        name: Name of the shard in messages.
        samples: Number of samples found, for messages.

    Raises:
        BrokenShard: If data follow, or the end mark is missing.
    """
    file.seek(end)
    zeros = 0
    while chunk := file.read(2**20):
        if chunk.strip(b"\0") and (zeros or len(chunk) >= tar.BLOCK):
            raise BrokenShard(
                f"{name} is damaged: after {samples} samples there is no header at byte {end}, but data follow"
            )
        zeros += len(chunk)
    if zeros < 2 * tar.BLOCK:
        raise BrokenShard(f"{name} is cut off after {samples} samples: it has no end mark")


def member_name(suffix: str) -> str:
    """Return the name of a member without its format: "image" for image.png, "seg" for seg.tif, "jpg" for jpeg."""
    name, _, extension = suffix.rpartition(".")
    if name and extension.lower() in EXTENSIONS:
        return name
    return {"jpeg": "jpg", "tiff": "tif"}.get(suffix.lower(), suffix)


def choose_names(counts: Counter[str], samples: int) -> tuple[str, str]:
    """Choose the member names of image and mask.

    Args:
        counts: How often each name occurs.
        samples: Number of samples that were counted.

    Returns:
        The names of image and mask.

    Raises:
        ValueError: If the choice is not clear; lists the names and the options that decide it.
    """
    common = {name for name, count in counts.items() if 2 * count >= samples}
    for images, masks in KNOWN_PAIRS:
        image, mask = common & images, common & masks
        if len(image) == 1 and len(mask) == 1 and image != mask:
            return image.pop(), mask.pop()
    listed = ", ".join(f".{name} ({count})" for name, count in counts.most_common(10)) or "nothing"
    raise ValueError(
        f"cannot tell images from masks among the members of {samples} samples: {listed}. "
        "Give their names: --image jpg --mask seg"
    )


def pick(members: dict[str, tuple[int, int]], wanted: str) -> tuple[str, int, int]:
    """Return (suffix, offset, length) of the member called `wanted`.

    Raises:
        ValueError: If there is no such member, or more than one.
    """
    found = [(suffix, *place) for suffix, place in members.items() if wanted in (suffix, member_name(suffix))]
    if len(found) != 1:
        has = ", ".join(f".{suffix}" for suffix in members)
        raise ValueError(f"has {'no' if not found else 'more than one'} member .{wanted}; it has {has}")
    return found[0]


def format_of(suffix: str, data: bytes) -> str:
    """Return the format of a member: by its first bytes if they are known, else by its extension.

    Raises:
        ValueError: If neither is known.
    """
    if tiles.is_tiled(data):
        return tiles.FORMAT
    for magic, name in (
        (b"\x89PNG", "png"),
        (b"\xff\xd8\xff", "jpg"),
        (b"II*\0", "tif"),
        (b"MM\0*", "tif"),
        (b"II+\0", "tif"),
        (b"MM\0+", "tif"),
        (b"\x93NUMPY", "npy"),
        (b"PK\x03\x04", "npz"),
    ):
        if data.startswith(magic):
            return name
    extension = suffix.rsplit(".", 1)[-1].lower()
    if extension in EXTENSIONS:
        return extension
    raise ValueError(f"its .{suffix} is not one of {', '.join(EXTENSIONS)}, by its first bytes")


def digest(parts: Iterable[bytes | bytearray | memoryview]) -> int:
    """Compute the xxh3_64 of the concatenation of byte strings."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


def sample_entry(
    key: str, members: dict[str, tuple[int, int]], names: tuple[str, str], descriptor: int
) -> tuple[SampleEntry, list[bytes]]:
    """Read a sample and make its entry in the index.

    Args:
        key: Key of the sample.
        members: (offset, length) of its members by suffix.
        names: Member names of image and mask.
        descriptor: File descriptor of the tar.

    Returns:
        The entry, and the contents of image and mask.

    Raises:
        ValueError: If a member is missing, ambiguous or of an unknown format.
    """
    kinds, contents = [], []
    for wanted in names:
        suffix, offset, length = pick(members, wanted)
        data = os.pread(descriptor, length, offset)
        kinds.append(Member(format_of(suffix, data), offset, length))
        contents.append(data)
    # The head holds the digest of each tile.
    checked = tiles.head_bytes(contents[0]) if kinds[0].format == tiles.FORMAT else contents[0]
    return SampleEntry(key, kinds[0], kinds[1], digest((checked, contents[1]))), contents
