"""Untrusted images, shards and indexes are refused with a message, in bounded time and memory."""

import io
import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import xxhash
from PIL import Image

from deepskip.data_shards import tiles
from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.decoding import Limits, decode_image, decode_mask
from deepskip.data_shards.order import Slot
from deepskip.data_shards.scan import scan_tar
from tests.attacks import forked, images, indexes, tars

# These are our errors, which say what is wrong. All others are bugs.
NAMED = ("", "ValueError", "TooLarge", "BrokenShard", "BrokenIndex", "NewerIndex", "BadSample", "MissingIndex")
# This is the most memory that a hostile file may add.
MOST_MEGABYTES = 600
DAMAGES = 2000
IN_ONE_CHILD = 250


def settled(name: str, outcome: forked.Outcome) -> None:
    """Check that something hostile ended well."""
    assert not outcome.killed, f"{name}: killed by signal {outcome.killed}"
    assert outcome.error in NAMED, f"{name}: {outcome.error}: {outcome.said}"
    assert not outcome.error or outcome.said, f"{name}: {outcome.error} without a word"
    assert outcome.megabytes < MOST_MEGABYTES, f"{name}: {outcome.megabytes} MB"


def fuzzed(kind: str, damage: Callable[[random.Random], Callable[[], object]]) -> None:
    """Try DAMAGES seeds, many in each child; damage(rng) damages input, and returns a function that reads it."""

    def many(first: int) -> str:
        for seed in range(first, first + IN_ONE_CHILD):
            read = damage(random.Random(seed))
            try:
                read()
            except Exception as error:
                if type(error).__name__ not in NAMED or not str(error):
                    return f"seed {seed}: {type(error).__name__}: {error}"
        return ""

    for first in range(0, DAMAGES, IN_ONE_CHILD):
        outcome = forked.run(lambda first=first: many(first), seconds=2 * forked.HANG_SECONDS)
        settled(f"{kind} from seed {first}", outcome)
        assert outcome.said == "''", f"{kind}: {outcome.said}"


@pytest.mark.parametrize("name", images.CASES)
def test_an_image_that_claims_too_much(name: str) -> None:
    extension, data = images.CASES[name]()
    limits = Limits(32_000_000, 32_000_000 * 3 * 4)
    settled(name, forked.run(lambda: decode_image(extension, data, limits).shape))
    settled(name, forked.run(lambda: decode_mask(extension, data).shape))


def pictures() -> dict[str, list[bytes]]:
    """Return small images of each format, in several of its variants."""
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 255, (24, 31), np.uint8), rng.integers(0, 255, (24, 31, 3), np.uint8)
    made: dict[str, list[bytes]] = {"png": [], "jpg": [], "tif": [], "npy": [], "npz": []}

    def pillow(kind: str, picture: Image.Image, **options: object) -> bytes:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        return file.getvalue()

    shapes = [
        Image.fromarray(grey),
        Image.fromarray(colour),
        Image.fromarray(colour).quantize(),
        Image.fromarray(colour).convert("RGBA"),
    ]
    made["png"] = [pillow("PNG", shape) for shape in shapes]
    plain = [*shapes[:3], shapes[0].convert("1")]
    made["bmp"] = [pillow("BMP", shape) for shape in plain]
    made["gif"] = [pillow("GIF", shape, interlace=i % 2) for i, shape in enumerate([*plain, *plain])]
    made["jpg"] = [pillow("JPEG", shape.convert("RGB"), progressive=i > 1) for i, shape in enumerate(shapes)]
    for options in (
        {}, {"compression": "deflate"}, {"compression": "lzw", "predictor": True}, {"tile": (16, 16)}, {"compression": "jpeg"},
        {"compression": "zstd", "tile": (16, 16)}, {"bigtiff": True}, {"compression": "packbits"},
    ):  # fmt: skip
        file = io.BytesIO()
        tifffile.imwrite(file, colour, photometric="rgb", **options)
        made["tif"].append(file.getvalue())
    for metadata, options in (({"axes": "CYX"}, {"ome": True}), ({"axes": "ZYX"}, {"imagej": True})):
        file = io.BytesIO()
        tifffile.imwrite(file, np.stack([grey] * 5), metadata=metadata, photometric="minisblack", **options)
        made["tif"].append(file.getvalue())
    many = rng.integers(0, 9, (24, 31, 6))
    made["tiles"] = [tiles.encode(array, 16) for array in (colour, many.astype(np.int16), many.astype(np.float32))]
    for array in (colour, colour.astype(np.float32), grey):
        file = io.BytesIO()
        np.save(file, array)
        made["npy"].append(file.getvalue())
        file = io.BytesIO()
        np.savez_compressed(file, image=array)
        made["npz"].append(file.getvalue())
    return made


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "npy", "npz", "bmp", "gif", "tiles"])
def test_damaged_images(extension: str) -> None:
    whole = pictures()[extension]

    def damage(rng: random.Random) -> Callable[[], object]:
        data = bytearray(rng.choice(whole))
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            # Half of the changes are in the header.
            at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
            data[at] = rng.choice([0, 1, 255, 127, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))])
        cut = bytes(data) if rng.random() < 0.9 else bytes(data[: rng.randrange(len(data))])
        limits = Limits(10**6, 10**7)
        return lambda: decode_image(extension, cut, limits) if rng.random() < 0.5 else decode_mask(extension, cut)

    fuzzed(extension, damage)


def test_damaged_tiles_with_an_honest_head() -> None:
    whole = pictures()["tiles"]

    def damage(rng: random.Random) -> Callable[[], object]:
        data = rng.choice(whole)
        head = tiles.read_head(lambda at, count: data[at : at + count], len(data), lambda *size: None)
        pieces = [bytearray(data[a:b]) for a, b in itertools.pairwise(head.ends.tolist())]
        for piece in rng.choices(pieces, k=rng.choice([1, 5])):
            piece[rng.randrange(len(piece))] = rng.choice([0, 1, 255, rng.randrange(256)])
        digests = np.array([xxhash.xxh3_64_intdigest(bytes(piece)) for piece in pieces], np.uint64)
        made = tiles.head_of(head.layout, np.array([len(piece) for piece in pieces]), digests) + b"".join(pieces)
        return lambda: decode_image("tiles", made, Limits(10**6, 10**7))

    fuzzed("tiles", damage)


@pytest.mark.parametrize("name", tars.CASES)
def test_a_tar_that_claims_too_much(name: str, tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    path.write_bytes(tars.CASES[name]())

    def scan() -> list[str]:
        found = scan_tar(path, "set.tar")
        assert "a" in found.samples
        return [str(bad) for bad in found.bad]

    outcome = forked.run(scan)
    settled(name, outcome)
    assert outcome.said == "[]" or "set.tar" in outcome.said
    assert "\x1b" not in outcome.said


def test_damaged_tars(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    whole = b"".join(tars.header(b"k%d.%s" % (i, kind)) + tars.DATA for i in range(6) for kind in (b"jpg", b"png"))
    whole += tars.pax(tars.record(b"path", b"long" * 50 + b".jpg")) + tars.header() + tars.DATA + tars.END

    def damage(rng: random.Random) -> Callable[[], object]:
        path.write_bytes(tars.damaged(whole, rng))
        return lambda: scan_tar(path, "set.tar")

    fuzzed("tar", damage)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coins")
    pack_coins(out, {"train": 6, "val": 2})
    return out / "train"


def use(folder: Path) -> int:
    """Use an index as a training does: its samples' keys, places and contents."""
    shards = Shards(folder)
    count = len(shards)
    keys = shards.index.keys(list(range(count)))
    shards[[Slot(0, 0, 1), Slot(0, count - 1, 1)]]
    return sum(map(len, keys))


def test_an_index_of_wrong_fields(packed: Path, tmp_path: Path) -> None:
    folder = indexes.Folder(Path(shutil.copytree(packed, tmp_path / "set")))
    cases = list(indexes.changed(folder.raw))
    assert len(cases) > 500

    def all_of(some: list[tuple[str, str]]) -> str:
        for name, text in some:
            folder.write(folder.samples, text=text)
            try:
                use(folder.folder)
            except Exception as error:
                if type(error).__name__ not in NAMED:
                    return f"{name}: {type(error).__name__}: {error}"
                if type(error).__name__ == "BrokenIndex" and "deepskip index" not in str(error):
                    return f"{name}: {error} says not what to do"
        return ""

    for first in range(0, len(cases), 100):
        outcome = forked.run(lambda first=first: all_of(cases[first : first + 100]))
        settled(str(cases[first][0]), outcome)
        assert outcome.said == "''", outcome.said


def test_samples_that_lie(packed: Path, tmp_path: Path) -> None:
    folder = indexes.Folder(Path(shutil.copytree(packed, tmp_path / "set")))
    assert use(folder.folder) > 0
    for name, samples in folder.lying():
        for honest in (True, False):
            folder.write(samples, honest)
            outcome = forked.run(lambda: use(folder.folder))
            settled(name, outcome)
            assert outcome.error == "BrokenIndex", f"{name}: {outcome.error} {outcome.said}"
            assert "deepskip index" in outcome.said
            assert honest or "sha256 differs" in outcome.said


def test_damaged_samples(packed: Path, tmp_path: Path) -> None:
    folder = indexes.Folder(Path(shutil.copytree(packed, tmp_path / "set")))

    def damage(rng: random.Random) -> Callable[[], object]:
        # The attacker has updated the SHA-256 too.
        folder.write(folder.damaged(rng))
        return lambda: use(folder.folder)

    fuzzed("samples", damage)
