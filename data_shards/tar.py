"""Walks over the blocks of a tar file that anyone may have written: never further than the file, never without an end.

Read are the old form, ustar, GNU's long names and PAX headers. tarfile is not used: it follows sizes that are negative, reads
headers of any length into memory, and takes minutes for some of them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
ZEROS = bytes(BLOCK)
# bytes of a header that holds a long name or PAX records, and how many such may stand before a member
MAX_EXTENDED = 2**20
MAX_CHAIN = 8
# digits of a PAX record's length, and of a size
MAX_DIGITS = 20
FILE, FOLDER, OTHER, END = "file", "folder", "other", "end"
KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"5": FOLDER}
# links, devices and sparse files; what is none of them nor above is a file, as POSIX has it
SPECIAL = b"12346SDVMN"


class TarError(ValueError):
    """Bytes that are no plain tar; says at which byte, and what is wrong."""


@dataclass(frozen=True)
class Entry:
    """One member: its name as it stands, its kind, and where its bytes begin and how many they are. END is where the end is."""

    name: bytes
    kind: str
    offset: int
    size: int


def walk(descriptor: int) -> Iterator[Entry]:
    """Yields the members of an open file and at last an Entry of kind END; raises TarError for what is no whole tar."""
    total = os.fstat(descriptor).st_size
    if not total:
        raise TarError("it is empty")
    at = chain = 0
    name: bytes | None = None
    size: int | None = None
    sparse = False
    while True:
        block = os.pread(descriptor, BLOCK, at)
        if len(block) < BLOCK or block == ZEROS:
            if chain:
                raise TarError(f"the header at byte {at} is missing, after one that belongs to it")
            yield Entry(b"", END, at, 0)
            return
        check_sum(block, at)
        kind, length = block[156:157], number(block[124:136], at)
        start = at + BLOCK
        if length > total - start:
            raise TarError(f"the member at byte {at} claims {length} bytes, of which {max(0, total - start)} are there")
        if kind in (b"L", b"K", b"x", b"X", b"g"):
            chain += 1
            if length > MAX_EXTENDED or chain > MAX_CHAIN:
                raise TarError(f"the header at byte {at} has {length} bytes and is number {chain} before one member")
            data = os.pread(descriptor, length, start)
            if kind == b"L":
                name = data.partition(b"\0")[0]
            elif kind in (b"x", b"X"):
                records = pax(data, at)
                name = records.get(b"GNU.sparse.name", records.get(b"path", name))
                size = decimal(records[b"size"], at) if b"size" in records else size
                sparse |= any(key.startswith(b"GNU.sparse") for key in records)
            at = start + rounded(length)
            continue
        if kind == b"S":
            start = past_sparse_map(descriptor, block, start)
        length = length if size is None else size
        if kind in b"123456":
            # they have no bytes, whatever they say
            length = 0
        if length > total - start:
            raise TarError(f"the member at byte {at} claims {length} bytes, of which {max(0, total - start)} are there")
        plain = full_name(block) if name is None else name
        what = OTHER if sparse or kind in SPECIAL else FOLDER if plain.endswith(b"/") else KINDS.get(kind, FILE)
        yield Entry(plain, what, start, length)
        at, chain, name, size, sparse = start + rounded(length), 0, None, None, False


def check_sum(block: bytes, at: int) -> None:
    """Raises TarError where a header's checksum, in which bytes may have been counted with a sign, is not that of its bytes."""
    field = block[148:156].strip(b" \0")
    said = int(field, 8) if field and not field.strip(b"01234567") else -1
    others = block[:148] + block[156:]
    plain = sum(others) + 8 * 32
    if said not in (plain, plain - 256 * sum(byte > 127 for byte in others)):
        raise TarError(f"there is no header at byte {at}, yet data go on")


def number(field: bytes, at: int) -> int:
    """Reads a number of a header: octal digits, or base 256 behind a byte of 128; raises TarError for what is none."""
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if field[0] == 255 or digits.strip(b"01234567") or len(digits) > len(field):
        raise TarError(f"the header at byte {at} has a number that is negative or none: {field!r}")
    return int(digits or b"0", 8)


def decimal(digits: bytes, at: int) -> int:
    """Reads a size of a PAX record; raises TarError."""
    if not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise TarError(f"the header at byte {at} has a size that is none: {digits[:40]!r}")
    return int(digits)


def rounded(length: int) -> int:
    """Gives the bytes that a member takes: whole blocks."""
    return -(-length // BLOCK) * BLOCK


def full_name(block: bytes) -> bytes:
    """Gives a header's own name, behind its prefix where it has one."""
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    # GNU has other things in the prefix's place
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def pax(data: bytes, at: int) -> dict[bytes, bytes]:
    """Reads the records of a PAX header, "LENGTH KEY=VALUE\\n" each; raises TarError."""
    found: dict[bytes, bytes] = {}
    place = 0
    # what fills the block up
    while place < len(data) and data[place] != 0:
        blank = data.find(b" ", place, place + MAX_DIGITS)
        digits = data[place:blank] if blank > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[blank + 1 : place + length - 1].partition(b"=")
        if not equals or length < len(digits) + 3 or data[place + length - 1 : place + length] != b"\n":
            raise TarError(
                f"the header at byte {at} has records that cannot be read, from {data[place : place + 20]!r} on"
            )
        found[key] = value
        place += length
    return found


def past_sparse_map(descriptor: int, block: bytes, start: int) -> int:
    """Gives where the bytes of GNU's sparse file begin: its map may go on over further blocks."""
    goes_on = block[482]
    while goes_on:
        block = os.pread(descriptor, BLOCK, start)
        start += BLOCK
        # a block that is not there ends it; the member is then found to be cut off
        goes_on = block[504] if len(block) == BLOCK else 0
    return start
