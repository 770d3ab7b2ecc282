"""Untrusted shards: hostile and broken ones raise an error with their name, whole ones train."""

import io
import itertools
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from deepskip.data_shards.command_line import main
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.indexing import IndexingError, index_shards
from deepskip.data_shards.scan import BrokenShard, scan_tar
from deepskip.data_shards.stream import train_batches

RNG = np.random.default_rng(0)


def encoded(array: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def picture(size: int = 24) -> np.ndarray:
    return RNG.integers(0, 255, (size, size, 3)).astype(np.uint8)


def mask_of(image: np.ndarray) -> np.ndarray:
    return ((image[..., 0] > 128) * 255).astype(np.uint8)


def members(keys: list[str]) -> list[tuple[str, bytes]]:
    found = []
    for key in keys:
        image = picture()
        found += [(f"{key}.jpg", encoded(image, "JPEG")), (f"{key}.png", encoded(mask_of(image), "PNG"))]
    return found


def tar(path: Path, files: list[tuple[str, bytes]], **attributes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in attributes.items():
                setattr(info, key, value)
            out.addfile(info, io.BytesIO(data))
    return path


def test_shards_of_webdatasets_own_writer_train(tmp_path: Path) -> None:
    images = {f"{i:05d}": picture(20 + i % 3) for i in range(11)}
    with webdataset.ShardWriter(str(tmp_path / "a-%03d.tar"), maxcount=4, verbose=0) as writer:
        for key, image in images.items():
            writer.write({"__key__": key, "jpg": image, "png": mask_of(image), "json": {"caption": key}})
    main(["index", str(tmp_path), "--workers", "2"])
    index = load_index(tmp_path)
    assert [shard.samples for shard in index.shards] == [4, 4, 3]
    assert (index.num_samples, index.bands, index.num_classes, index.dtype) == (11, 3, 1, "uint8")
    batches = itertools.islice(train_batches(Shards(tmp_path, crops=Crops(16, 0.5, 0)), 0, 4, 0, 0, 1), 3)
    seen = []
    for batch in batches:
        # Foreground is 255 in the files and 1 in the batch.
        assert set(batch["mask"].unique().tolist()) <= {0, 1}
        seen += [key for key, weight in zip(batch["key"], batch["weight"], strict=True) if weight]
    assert sorted(seen) == sorted(images)
    entry = index.entries([5])[0]
    image, mask = Shards(tmp_path).read(entry)
    raw = next(iter(webdataset.WebDataset(str(tmp_path / "a-001.tar"), shardshuffle=False).slice(1, 2)))
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(raw["jpg"]))))
    np.testing.assert_array_equal(mask, mask_of(images[entry.key]) // 255)


def test_names_of_members_are_found_or_given(tmp_path: Path) -> None:
    image = picture()
    one = [("deep/er/k.img", encoded(image, "PNG")), ("deep/er/k.seg.tiff", encoded(mask_of(image), "TIFF"))]
    tar(tmp_path / "one" / "x.tar", [*one, ("deep/er/k.json", b"{}"), ("deep/er/._k.img", b"resource fork")])
    index = index_shards(str(tmp_path / "one"))
    entry = index.entries([0])[0]
    # The first bytes decide the format, whatever the name is.
    assert (entry.key, entry.image.format, entry.mask.format) == ("deep/er/k", "png", "tif")
    odd = [("k.left.png", encoded(image, "PNG")), ("k.right.png", encoded(mask_of(image), "PNG"))]
    tar(tmp_path / "odd" / "x.tar", odd)
    with pytest.raises(IndexingError, match=r"cannot tell images from masks.*\.left \(1\), \.right \(1\).*--image"):
        index_shards(str(tmp_path / "odd"))
    index = index_shards(str(tmp_path / "odd"), image="left")
    _, mask = Shards(tmp_path / "odd").read(index.entries([0])[0])
    np.testing.assert_array_equal(mask, mask_of(image) // 255)


def damage_cut_in_data(data: bytes) -> bytes:
    return data[: 512 + 100]


def damage_cut_between_members(data: bytes) -> bytes:
    return data[: data.index(b"k1.jpg")]


def damage_cut_in_header(data: bytes) -> bytes:
    return data[: data.index(b"k1.jpg") + 200]


def damage_zeroed_header(data: bytes) -> bytes:
    at = data.index(b"k1.jpg")
    return data[:at] + bytes(512) + data[at + 512 :]


def damage_garbage(data: bytes) -> bytes:
    at = data.index(b"k1.jpg")
    return data[:at] + b"\xa5" * 512 + data[at + 512 :]


def damage_gzip(data: bytes) -> bytes:
    return b"\x1f\x8b" + data


def damage_not_a_tar(data: bytes) -> bytes:
    return b"no tar at all" * 100


def damage_empty_file(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut_in_data, "is cut off or damaged"),
        (damage_cut_between_members, "is cut off after 1 samples: it has no end mark"),
        (damage_cut_in_header, "is cut off after 1 samples"),
        (damage_zeroed_header, r"is damaged: after 1 samples there is no header at byte \d+, but data follow"),
        (damage_garbage, "is damaged: after 1 samples there is no header"),
        (damage_gzip, "is a gzip file"),
        (damage_not_a_tar, "is cut off or damaged"),
        (damage_empty_file, "is cut off or damaged"),
    ],
)
def test_a_damaged_shard_is_named_or_left_out(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tar(tmp_path / "set" / "a.tar", members(["k0", "k1", "k2"]))
    broken = tmp_path / "set" / "b.tar"
    # Another key of the same length keeps the sizes of the headers.
    broken.write_bytes(damage(whole.read_bytes().replace(b"k2", b"k3")))
    with pytest.raises(BrokenShard, match=rf"b\.tar {message}"):
        scan_tar(broken, "b.tar")
    with pytest.raises(SystemExit) as stopped:
        main(["index", str(tmp_path / "set"), "--workers", "1"])
    assert stopped.value.code == 2
    assert "1 faults: b.tar" in capsys.readouterr().err
    assert not (tmp_path / "set" / "index.json").exists()
    main(["index", str(tmp_path / "set"), "--workers", "1", "--on_bad_sample", "skip"])
    assert [shard.name for shard in load_index(tmp_path / "set").shards] == ["a.tar"]
    faults = [json.loads(line) for line in (tmp_path / "set" / "bad_samples.jsonl").read_text().splitlines()]
    assert [fault["shard"] for fault in faults] == ["b.tar"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("bad.jpg", b"\xff\xd8\xff garbage"), members(["x"])[1]], r"bad: has no member \.png; it has \.jpg"),
        ([*members(["bad"]), *members(["bad"])], r"bad: has two members \.jpg: the key occurs twice"),
        ([("bad.jpg", b"\xff\xd8\xff garbage"), ("bad.png", b"\x89PNG")], "bad: the jpg file does not decode"),
        ([("bad.jpg", encoded(picture(9), "JPEG")), ("bad.png", encoded(picture(8)[..., 0], "PNG"))],
         r"the mask of bad is 8 x 8 \(height x width\), its image 9 x 9"),
        ([("bad.jpg", b"import os"), ("bad.png", encoded(picture(8)[..., 0], "PNG"))], "bad: the jpg file does not decode"),
        (members(["k0"]), "k0: the key is also in a.tar"),
        ([], "b.tar holds no samples"),
    ],
)  # fmt: skip
def test_a_bad_sample_is_named_or_left_out(tmp_path: Path, files: list[tuple[str, bytes]], message: str) -> None:
    tar(tmp_path / "a.tar", members(["k0", "k1"]))
    tar(tmp_path / "b.tar", files)
    with pytest.raises(IndexingError, match=message):
        index_shards(str(tmp_path), workers=1)
    index = index_shards(str(tmp_path), workers=1, on_bad_sample="skip")
    assert [key for key in index.keys(list(range(index.num_samples))) if key.startswith("k")] == ["k0", "k1"]


def test_what_is_left_out_counts_in_no_statistics(tmp_path: Path) -> None:
    def sample(key: str, value: int, label: int) -> list[tuple[str, bytes]]:
        image, mask = np.full((8, 8, 3), value, np.uint8), np.zeros((8, 8), np.uint8)
        mask[:2], mask[4:6, :5] = 1, label
        return [(f"{key}.jpg", encoded(image, "PNG")), (f"{key}.png", encoded(mask, "PNG"))]

    for folder in ("whole", "twice"):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "a.tar", sample("k0", 10, 1) + sample("k1", 20, 1))
    tar(tmp_path / "twice" / "b.tar", sample("k0", 250, 2) + sample("k1", 240, 2))
    whole = index_shards(str(tmp_path / "whole"), workers=1)
    index = index_shards(str(tmp_path / "twice"), workers=1, on_bad_sample="skip")
    assert (index.mean, index.std, index.percentiles) == (whole.mean, whole.std, whole.percentiles)
    assert (index.num_classes, index.num_samples) == (whole.num_classes, 2) == (1, 2)
    bad = tmp_path / "twice" / "bad_samples.jsonl"
    assert bad.read_text().count("the key is also in a.tar") == 2
    (tmp_path / "twice" / "b.tar").unlink()
    index_shards(str(tmp_path / "twice"), workers=1, on_bad_sample="skip")
    assert not bad.exists()


def test_links_and_special_files_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [("k.jpg", b""), ("k.png", b"")], type=tarfile.SYMTYPE, linkname="/etc/passwd")
    found = scan_tar(tmp_path / "a.tar", "a.tar")
    assert found.samples == {}
    assert [(fault.key, fault.reason[:28]) for fault in found.bad] == [("k", "its .jpg is not a plain file")]
    path = tar(tmp_path / "b.tar", [("../../../etc/k.jpg", b"x"), ("/abs/k.jpg", b"x")])
    # Such names are only keys. No file is ever created from them.
    assert list(scan_tar(path, "b.tar").samples) == ["../../../etc/k", "/abs/k"]


def png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2**24), 9))
        + chunk(b"IEND", b"")
    )


BOMB_CHECK = """
import resource, sys
from pathlib import Path
from deepskip.data_shards.indexing import index_shards, IndexingError
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
try:
    index_shards(sys.argv[1], workers=1)
except IndexingError as error:
    print(error)
"""


def test_bombs_do_not_take_the_memory(tmp_path: Path) -> None:
    small = encoded(picture(8)[..., 0], "PNG")
    npz = io.BytesIO()
    np.savez_compressed(npz, image=np.zeros((20000, 20000), np.uint8))
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)})
    pickled = io.BytesIO()
    np.save(pickled, np.array([print], dtype=object), allow_pickle=True)
    bombs = {"png": png_bomb(60_000), "npz": npz.getvalue(), "npy": npy.getvalue(), "pickle": pickled.getvalue()}
    assert len(bombs["png"]) < 50_000
    files = []
    for name, data in bombs.items():
        files += [(f"{name}.image", data), (f"{name}.mask", small)]
    tar(tmp_path / "a.tar", files)
    result = subprocess.run(
        [sys.executable, "-c", BOMB_CHECK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "png: the png file does not decode: has 60000 x 60000 pixels; at most" in result.stdout
    assert "npy: the npy file does not decode: claims shape (1000000, 1000000)" in result.stdout
    assert "pickle: the npy file does not decode: claims shape (1,) of object" in result.stdout
    assert "npz: the npz file does not decode: has 20000 x 20000 pixels" in result.stdout


def test_bands_that_differ_and_labels(tmp_path: Path) -> None:
    image = picture()
    grey = [("g.jpg", encoded(image[..., 0], "JPEG")), ("g.png", encoded(mask_of(image) // 255 * 3, "PNG"))]
    tar(tmp_path / "a.tar", [*members(["k0"]), *grey])
    with pytest.raises(IndexingError, match=r"1 bands: 1 images such as g, 3 bands: 1 images such as k0.*--bands N"):
        index_shards(str(tmp_path), workers=1)
    with pytest.raises(IndexingError, match="values up to 255"):
        index_shards(str(tmp_path), workers=1, bands=3, labels="classes")
    index = index_shards(str(tmp_path), workers=1, bands=3, ignore_label=3)
    assert (index.bands, index.num_classes) == (3, 1)
    shards = Shards(tmp_path)
    assert [set(np.unique(shards.read(e)[1]).tolist()) for e in index.entries([0, 1])] == [{0, 1}, {0, 255}]
    assert all(shards.read(e)[0].shape == (24, 24, 3) for e in index.entries([0, 1]))
