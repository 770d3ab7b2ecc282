"""Looks through tar shards that anyone may have written and says where each sample lies, or what is wrong with them."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import xxhash

from deepskip.data_shards.index import Member, SampleEntry
from deepskip.data_shards.sample import EXTENSIONS, BadSample

# larger files of a sample are refused; the index has 32 bits for a length
MAX_MEMBER = 2**31
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
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            for magic, kind in (
                (b"\x1f\x8b", "gzip"),
                (b"BZh", "bzip2"),
                (b"\xfd7zXZ\x00", "xz"),
                (b"(\xb5/\xfd", "zstd"),
            ):
                if start.startswith(magic):
                    raise BrokenShard(
                        f"{name} is a {kind} file; members are read by their place: unpack it to a plain .tar"
                    )
            with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
                for info in tar:
                    if info.isdir():
                        continue
                    folder, _, base = info.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    # what operating systems leave in archives
                    if base.startswith(".") or not suffix:
                        continue
                    key = f"{folder}/{stem}" if folder else stem
                    reason = refusal(info, found.samples.get(key, {}), suffix)
                    if reason and key not in spoilt:
                        spoilt.add(key)
                        found.bad.append(BadSample(name, key, reason))
                    found.samples.setdefault(key, {})[suffix] = (info.offset_data, info.size)
                end = tar.offset
            check_end(file, end, name, len(found.samples))
    except (FileNotFoundError, PermissionError) as error:
        raise BrokenShard(f"{name} cannot be opened: {error.strerror}") from error
    except (tarfile.TarError, ValueError, OverflowError) as error:
        done = f" after {len(found.samples)} samples" if found.samples else ""
        raise BrokenShard(f"{name} is cut off or damaged{done}: {error}") from error
    for key in spoilt:
        found.samples.pop(key, None)
    return found


def refusal(info: tarfile.TarInfo, members: dict[str, tuple[int, int]], suffix: str) -> str | None:
    """Says why a member cannot be taken, or None."""
    if not info.isreg() or info.issparse():
        return f"its .{suffix} is no plain file (a link, device or sparse file)"
    if info.size > MAX_MEMBER:
        return f"its .{suffix} has {info.size} bytes; at most {MAX_MEMBER} are read"
    if suffix in members:
        return f"has two members .{suffix}: the key occurs twice"
    return None


def check_end(file: BinaryIO, end: int, name: str, samples: int) -> None:
    """Raises BrokenShard unless all from byte `end` on, where tarfile stopped, is zeros, two blocks or more.

    tarfile takes a file that is cut between members, and one with a damaged header, for whole.
    """
    file.seek(end)
    zeros = 0
    while chunk := file.read(2**20):
        if chunk.strip(b"\0") and (zeros or len(chunk) >= tarfile.BLOCKSIZE):
            raise BrokenShard(
                f"{name} is damaged: after {samples} samples there is no header at byte {end}, yet data go on"
            )
        zeros += len(chunk)
    if zeros < 2 * tarfile.BLOCKSIZE:
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
