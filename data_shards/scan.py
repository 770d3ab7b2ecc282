"""Looks through tar shards that anyone may have written and says where each sample lies, or what is wrong with them."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import xxhash

from deepskip.data_shards import tar
from deepskip.data_shards.index import Member, SampleEntry
from deepskip.data_shards.index_check import CONTROL
from deepskip.data_shards.sample import EXTENSIONS, BadSample

# larger files of a sample are refused; the index has 32 bits for a length
MAX_MEMBER = 2**31
# letters of a member's name, folders included; file systems take no more
MAX_NAME = 4096
# what image and mask are called after the key, in data sets that name them by other words than ours
KNOWN_PAIRS = (
    ({"image"}, {"mask"}),
    ({"image", "img", "input"}, {"mask", "seg", "segmentation", "label", "labels", "annotation", "target"}),
    ({"png", "jpg", "tif", "npy"}, {"mask", "seg", "segmentation", "label", "labels", "annotation"}),
    ({"jpg", "tif"}, {"png"}),
)


class BrokenShard(RuntimeError):
    """A shard is gone, is no longer the file that was indexed, or is no whole tar file."""


@dataclass
class Scan:
    """What lies in one tar: for each key its members by suffix (what follows the key's dot), in the order of the tar."""

    samples: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)


def scan_tar(path: Path, name: str) -> Scan:
    """Reads the headers of a tar file and gives the places of its members: {key: {suffix: (offset, length)}}.

    The key is what stands before the first dot of a member's file name, with its folder, as for webdataset. Nothing is
    unpacked and no name is used as a path. Samples with a member that cannot be taken are listed as bad.
    Raises BrokenShard, by its name, for a file that is no whole plain tar: cut off, garbage between members, compressed.
    """
    found = Scan()
    spoilt: set[str] = set()
    try:
        if not path.is_file():
            raise BrokenShard(f"{name} is no file" if path.exists() else f"{name} does not exist")
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
    """Raises BrokenShard for a tar within a compressed file, by its first bytes."""
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"(\xb5/\xfd", "zstd")):
        if start.startswith(magic):
            raise BrokenShard(f"{name} is a {kind} file; members are read by their place: unpack it to a plain .tar")


def note(found: Scan, spoilt: set[str], entry: tar.Entry, name: str) -> None:
    """Notes a member of a sample, or why the sample cannot be taken."""
    shown = entry.name.decode(errors="backslashreplace")
    folder, _, base = shown.rpartition("/")
    stem, _, suffix = base.partition(".")
    # what operating systems leave in archives
    if base.startswith(".") or not suffix:
        return
    key = f"{folder}/{stem}" if folder else stem
    reason = refusal(entry, shown, found.samples.get(key, {}), suffix)
    if reason and key not in spoilt:
        spoilt.add(key)
        found.bad.append(BadSample(name, printable(key), reason))
    found.samples.setdefault(key, {})[suffix] = (entry.offset, entry.size)


def printable(text: str) -> str:
    """Shows a name so that it does nothing to a terminal, and is no longer than a line."""
    shown = CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
    return shown if len(text) <= MAX_NAME else f"{shown[:60]}... ({len(text)} letters)"


def refusal(entry: tar.Entry, shown: str, members: dict[str, tuple[int, int]], suffix: str) -> str | None:
    """Says why a member cannot be taken, or None. shown: its name as text."""
    if shown.encode(errors="replace") != entry.name:
        return "its name is no UTF-8"
    if CONTROL.search(shown) or len(shown) > MAX_NAME:
        return f"its name holds control characters, or more than {MAX_NAME} letters"
    if entry.kind != tar.FILE:
        return f"its .{suffix} is no plain file (a link, device or sparse file)"
    if entry.size > MAX_MEMBER:
        return f"its .{suffix} has {entry.size} bytes; at most {MAX_MEMBER} are read"
    if suffix in members:
        return f"has two members .{suffix}: the key occurs twice"
    return None


def check_end(file: BinaryIO, end: int, name: str, samples: int) -> None:
    """Raises BrokenShard unless all from byte `end` on, where its last member ends, is zeros, two blocks or more.

    Where the walk stopped there is no header, be it that the file was cut between members or that one is zeros.
    """
    file.seek(end)
    zeros = 0
    while chunk := file.read(2**20):
        if chunk.strip(b"\0") and (zeros or len(chunk) >= tar.BLOCK):
            raise BrokenShard(
                f"{name} is damaged: after {samples} samples there is no header at byte {end}, yet data go on"
            )
        zeros += len(chunk)
    if zeros < 2 * tar.BLOCK:
        raise BrokenShard(f"{name} is cut off after {samples} samples: it has no end mark")


def member_name(suffix: str) -> str:
    """Gives what a member is called whatever its format: "image" for image.png, "seg" for seg.tif, "jpg" for jpeg."""
    name, _, extension = suffix.rpartition(".")
    if name and extension.lower() in EXTENSIONS:
        return name
    return {"jpeg": "jpg", "tiff": "tif"}.get(suffix.lower(), suffix)


def choose_names(counts: Counter[str], samples: int) -> tuple[str, str]:
    """Finds what image and mask are called, from how often each name occurs in a number of samples.

    Raises ValueError that lists the names and says how to tell which are meant.
    """
    common = {name for name, count in counts.items() if 2 * count >= samples}
    for images, masks in KNOWN_PAIRS:
        image, mask = common & images, common & masks
        if len(image) == 1 and len(mask) == 1 and image != mask:
            return image.pop(), mask.pop()
    listed = ", ".join(f".{name} ({count})" for name, count in counts.most_common(10)) or "nothing"
    raise ValueError(
        f"cannot tell images from masks among the members of {samples} samples: {listed}. "
        "Name them: --image jpg --mask seg"
    )


def pick(members: dict[str, tuple[int, int]], wanted: str) -> tuple[str, int, int]:
    """Gives (suffix, offset, length) of the member called `wanted`; raises ValueError where there is none or are two."""
    found = [(suffix, *place) for suffix, place in members.items() if wanted in (suffix, member_name(suffix))]
    if len(found) != 1:
        has = ", ".join(f".{suffix}" for suffix in members)
        raise ValueError(f"has {'no' if not found else 'more than one'} member .{wanted}; it has {has}")
    return found[0]


def format_of(suffix: str, data: bytes) -> str:
    """Gives the format of a member: by its first bytes, which do not lie as names do, else by its extension."""
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
    raise ValueError(f"its .{suffix} is none of {', '.join(EXTENSIONS)}, by its first bytes")


def digest(parts: Iterable[bytes | bytearray | memoryview]) -> int:
    """Computes the xxh3_64 of byte strings one after the other."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.intdigest()


def sample_entry(
    key: str, members: dict[str, tuple[int, int]], names: tuple[str, str], descriptor: int
) -> tuple[SampleEntry, list[bytes]]:
    """Makes the index's entry of a sample, and gives it with the bytes of its image and mask.

    names: what the two are called. Raises ValueError that says why the sample cannot be taken.
    """
    kinds, contents = [], []
    for wanted in names:
        suffix, offset, length = pick(members, wanted)
        data = os.pread(descriptor, length, offset)
        kinds.append(Member(format_of(suffix, data), offset, length))
        contents.append(data)
    return SampleEntry(key, kinds[0], kinds[1], digest(contents)), contents
