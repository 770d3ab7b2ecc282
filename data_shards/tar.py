"""Walk over the blocks of a tar file, which may be untrusted: never past its end, and never without end.

The old format, ustar, GNU's long names and PAX headers are read. tarfile is not used: it follows negative sizes, reads
headers of any length into memory, and takes minutes for some of them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
ZEROS = bytes(BLOCK)
# Longest header in bytes that holds a long name or PAX records, and largest number of such headers before a member.
MAX_EXTENDED = 2**20
MAX_CHAIN = 8
# Most digits of a PAX record's length, and of a size.
MAX_DIGITS = 20
FILE, FOLDER, OTHER, END = "file", "folder", "other", "end"
KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"5": FOLDER}
# Links, devices and sparse files. POSIX says that a member of an unknown kind is a file.
SPECIAL = b"12346SDVMN"


class TarError(ValueError):
    """Bytes that are not a plain tar; the message says at which byte, and what is wrong."""


@dataclass(frozen=True)
class Entry:
    """One member of a tar, or its end.

    Attributes:
        name: Name as stored.
        kind: FILE, FOLDER, OTHER, or END for the end of the tar.
        offset: Offset of its first byte in the tar; for END that of the end.
        size: Number of bytes.
    """

    name: bytes
    kind: str
    offset: int
    size: int


def walk(descriptor: int) -> Iterator[Entry]:
    """Yield the members of an open tar, and at last an Entry of kind END.

    Args:
        descriptor: File descriptor of the tar.

    Raises:
        TarError: If the file is not a whole plain tar.
    """
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
            # These kinds have no contents, whatever size they declare.
            length = 0
        if length > total - start:
            raise TarError(f"the member at byte {at} claims {length} bytes, of which {max(0, total - start)} are there")
        plain = full_name(block) if name is None else name
        what = OTHER if sparse or kind in SPECIAL else FOLDER if plain.endswith(b"/") else KINDS.get(kind, FILE)
        yield Entry(plain, what, start, length)
        at, chain, name, size, sparse = start + rounded(length), 0, None, None, False


def check_sum(block: bytes, at: int) -> None:
    """Raise TarError if a header's checksum does not match its bytes, counted as unsigned or as signed numbers."""
    field = block[148:156].strip(b" \0")
    said = int(field, 8) if field and not field.strip(b"01234567") else -1
    others = block[:148] + block[156:]
    plain = sum(others) + 8 * 32
    if said not in (plain, plain - 256 * sum(byte > 127 for byte in others)):
        raise TarError(f"there is no header at byte {at}, but data follow")


def number(field: bytes, at: int) -> int:
    """Parse a number of a header: octal digits, or base 256 after a byte of 128.

    Args:
        field: The bytes of the number.
        at: Offset of the header, for messages.

    Raises:
        TarError: If it is not a number or is negative.
    """
    if field[0] == 128:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if field[0] == 255 or digits.strip(b"01234567"):
        raise TarError(f"the header at byte {at} has a number that is negative or invalid: {field!r}")
    return int(digits or b"0", 8)


def decimal(digits: bytes, at: int) -> int:
    """Parse the size in a PAX record.

    Raises:
        TarError: If it is not a decimal number, or has too many digits.
    """
    if not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise TarError(f"the header at byte {at} has an invalid size: {digits[:40]!r}")
    return int(digits)


def rounded(length: int) -> int:
    """Return the number of bytes that a member takes in whole blocks."""
    return -(-length // BLOCK) * BLOCK


def full_name(block: bytes) -> bytes:
    """Return the name in a header, with its prefix if there is one."""
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    # GNU stores other things in place of the prefix.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def pax(data: bytes, at: int) -> dict[bytes, bytes]:
    r"""Parse the records of a PAX header, "LENGTH KEY=VALUE\n" each.

    Args:
        data: Contents of the header.
        at: Offset of the header, for messages.

    Raises:
        TarError: If a record is not valid.
    """
    found: dict[bytes, bytes] = {}
    place = 0
    # Zeros fill the rest of the block.
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
    """Return the offset of the contents of GNU's sparse file, after its map, which may take several blocks."""
    goes_on = block[482]
    while goes_on:
        block = os.pread(descriptor, BLOCK, start)
        start += BLOCK
        # A missing block ends the map; the member then turns out to be cut off.
        goes_on = block[504] if len(block) == BLOCK else 0
    return start
