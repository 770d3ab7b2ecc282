"""Tar files that claim too much, never end, or hold odd names: name -> bytes."""

import random
from collections.abc import Callable

CASES: dict[str, Callable[[], bytes]] = {}
END = bytes(1024)
DATA = b"x" * 8 + bytes(504)


def octal(number: int) -> bytes:
    """Return a size in a header's octal form."""
    return b"%011o\0" % number


def binary(number: int) -> bytes:
    """Return a size in base 256, which may be negative or very large."""
    return b"\x80" + number.to_bytes(11, "big") if number >= 0 else b"\xff" + (number + 256**11).to_bytes(11, "big")


def header(name: bytes = b"a.image.png", size: bytes = octal(8), kind: bytes = b"0") -> bytes:
    """Return a header with its checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136], block[136:148], block[156:157] = size, octal(0), kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Pad data to whole blocks."""
    return data + bytes(-len(data) % 512)


def pax(body: bytes, kind: bytes = b"x") -> bytes:
    """Return a PAX header."""
    return header(b"PaxHeader", octal(len(body)), kind) + padded(body)


def record(key: bytes, value: bytes) -> bytes:
    """Return a PAX record, whose length includes its own digits."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest)
    while len(b"%d" % length + rest) != length:
        length = len(b"%d" % length + rest)
    return b"%d" % length + rest


GOOD = header() + DATA
AFTER = header(b"b.image.png") + DATA + END
WITH_SIZE = {
    "-512": binary(-512), "-1024": binary(-1024), "2**62": binary(2**62), "2**87": binary(2**87), "-2**80": binary(-(2**80)),
    "of letters": b"hello world\0", "of eights": b"88888888888\0", "with a sign": b"-0000001000\0",
}  # fmt: skip
for NAME, SIZE in WITH_SIZE.items():
    for KIND in (b"0", b"x", b"L", b"g", b"S"):
        CASES[f"size {NAME} of a member of kind {KIND.decode()}"] = lambda size=SIZE, kind=KIND: (
            GOOD + header(b"b.image.png", size, kind) + DATA + END
        )
for BYTES in (2**33, 2**36):
    for KIND in (b"x", b"L", b"K", b"g"):
        CASES[f"header of kind {KIND.decode()} and {BYTES} bytes"] = lambda size=BYTES, kind=KIND: (
            GOOD + header(b"p", binary(size), kind) + DATA + END
        )
RECORDS = {
    "size -512": record(b"size", b"-512"), "size -1024": record(b"size", b"-1024"),
    "size of 18 nines": record(b"size", b"9" * 18),
    "size of a million nines": record(b"size", b"9" * 10**6),
    "size nan": record(b"size", b"nan"), "size 1.5": record(b"size", b"1.5"),
    "length 0": b"0 a=b\n", "length -5": b"-5 a=b\n", "length of too many digits": b"9" * 400 + b" a=b\n",
    "length beyond": b"99999 a=b\n", "no key": b"5 abc\n", "digits alone": b"1" * 2**18, "a megabyte of digits": b"1" * 2**20,
    "hdrcharset and digits": b"hdrcharset=BINARY\n" + b"1" * 200_000, "many records": record(b"a", b"b") * 100_000,
    "sparse file": record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.realsize", b"9" * 15),
    "sparse map": record(b"GNU.sparse.map", b"1,2,3") + record(b"GNU.sparse.size", b"5"),
    "path with NUL": record(b"path", b"../../etc/pass\0wd.image.png"), "path not UTF-8": record(b"path", b"\xff\xfe.image.png"),
    "path of escape codes": record(b"path", b"\x1b]0;own\x07\x1b[2J.image.png"),
    "long path": record(b"path", b"a/" * 400_000 + b"b.image.png"),
}  # fmt: skip
for NAME, BODY in RECORDS.items():
    CASES[f"PAX header: {NAME}"] = lambda body=BODY: GOOD + pax(body) + AFTER
CASES |= {
    "chain of 5000 PAX headers": lambda: GOOD + pax(record(b"a", b"b")) * 5000 + AFTER,
    "chain of 5000 long names": lambda: GOOD + (header(b"L", octal(8), b"L") + DATA) * 5000 + AFTER,
    "PAX header and then the end": lambda: GOOD + pax(record(b"a", b"b")) + END,
    "PAX header and then nothing": lambda: GOOD + pax(record(b"a", b"b")),
    "sparse map that goes on": lambda: (
        GOOD + header(b"b.image.png", kind=b"S")[:482] + b"\1" + header()[483:] + DATA + END
    ),
    "hard link": lambda: GOOD + header(b"b.image.png", octal(0), b"1") + END,
    "hard link of 2**62 bytes": lambda: GOOD + header(b"b.image.png", binary(2**62), b"1") + END,
    "device": lambda: GOOD + header(b"b.image.png", octal(0), b"3") + END,
    "unknown kind": lambda: GOOD + header(b"b.image.png", kind=b"Z") + DATA + END,
    "no name": lambda: GOOD + header(b"") + DATA + END,
    "name not UTF-8": lambda: GOOD + header(b"\xff\xfe.image.png") + DATA + END,
    "name of escape codes": lambda: GOOD + header(b"\x1b[2J.image.png") + DATA + END,
    "fifty folders": lambda: GOOD + header(b"a/" * 40 + b"b.image.png") + DATA + END,
    "checksum of another": lambda: GOOD + header()[:148] + b"000000\0 " + header()[156:] + DATA + END,
    "sparse blocks without end": lambda: GOOD + _endless_sparse() + END,
}


def _endless_sparse() -> bytes:
    block = bytearray(header(b"b.image.png", kind=b"S"))
    block[482], block[148:156] = 1, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    more = bytearray(512)
    more[504] = 1
    return bytes(block) + bytes(more) * 20_000


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Damage bits, bytes, blocks, the end, or numbers of headers with their checksum corrected."""
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data))
        what = rng.randrange(6)
        if what == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at] = rng.choice([0, 255, 48, 56, 45, rng.randrange(256)])
        elif what == 2:
            del data[at:]
            return bytes(data)
        elif what == 3:
            data[at : at + rng.choice([1, 100, 512])] = b""
        elif what == 4:
            block = at // 512 * 512
            data[block:block] = data[block : block + 512]
        else:
            block = at // 512 * 512
            if data[block + 257 : block + 262] == b"ustar":
                data[block + 124 : block + 136] = rng.choice(
                    [binary(rng.randrange(-(2**70), 2**70)), octal(rng.randrange(2**30))]
                )
                data[block + 156] = rng.choice(b"0123456789xgLKSZ\0")
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % (sum(data[block : block + 512]) % 8**6)
        if not data:
            return b""
    return bytes(data)
