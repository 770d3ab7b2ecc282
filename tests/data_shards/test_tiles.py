"""A crop of an image in tiles is that of the whole image, and reads only what it touches."""

import io
import tarfile
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import webdataset

from deepskip.data_shards import tiles
from deepskip.data_shards.command_line import main
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.decoding import TooLarge, decode_image
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.index import load_index
from deepskip.data_shards.inspection import verify
from deepskip.data_shards.order import Slot
from deepskip.data_shards.sample import BadSample, Sample
from deepskip.data_shards.writer import write_shards


def picture(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) * 200).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "side"),
    [
        ((40, 70, 3), np.uint8, 32), ((40, 70, 1), np.uint16, 16), ((33, 47, 7), np.int16, 32), ((33, 47, 2), np.float32, 256),
        ((20, 20, 300), np.float64, 256), ((5, 6, 4), np.uint8, 256), ((100, 90, 5), np.int32, 48), ((17, 1, 1), np.int8, 16),
    ],
)  # fmt: skip
def test_any_reader_of_tiff_and_any_window(shape: tuple[int, int, int], dtype: type, side: int) -> None:
    image = picture(*shape, dtype=dtype)
    data = tiles.encode(image, side)
    found = tifffile.imread(io.BytesIO(data)).reshape((shape[2], *shape[:2]) if shape[2] > 4 else shape)
    np.testing.assert_array_equal(np.moveaxis(found, 0, 2) if shape[2] > 4 else found, image)
    np.testing.assert_array_equal(decode_image("tif", data), image)
    np.testing.assert_array_equal(decode_image("tiles", data), image)
    reads: list[tuple[int, int]] = []

    def read(offset: int, count: int) -> bytes:
        reads.append((offset, count))
        return data[offset : offset + count]

    head = tiles.read_head(read, len(data), lambda *size: None)
    rng = np.random.default_rng(1)
    for _ in range(20):
        top, left = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        rows, columns = slice(top, rng.integers(top, shape[0]) + 1), slice(left, rng.integers(left, shape[1]) + 1)
        bands = rng.permutation(shape[2])[: rng.integers(1, shape[2] + 1)].tolist()
        for chosen in (None, bands):
            reads.clear()
            window = tiles.read_window(read, head, rows, columns, chosen)
            np.testing.assert_array_equal(
                window, image[rows, columns] if chosen is None else image[rows, columns][..., chosen]
            )
            assert (window.dtype, window.flags.c_contiguous) == (image.dtype, True)
        # Bytes of the tiles that the window touches, of the chosen planes, and no others.
        down, across = (
            range(part.start // edge, -(-part.stop // edge))
            for part, edge in ((rows, head.layout.tile_height), (columns, head.layout.tile_width))
        )
        planes = bands if shape[2] > 4 else [0]
        touched = [
            (plane * head.layout.grid[0] + y) * head.layout.grid[1] + x
            for plane in planes
            for y in down
            for x in across
        ]
        assert sum(count for _, count in reads) == sum(int(head.ends[tile + 1] - head.ends[tile]) for tile in touched)


def made(count: int, bands: int, dtype: type) -> list[Sample]:
    samples = []
    for i in range(count):
        H, W = 60 + 7 * i, 90 - 9 * i
        mask = (picture(H, W, seed=i) > 185).astype(np.uint8)
        mask[:3] = 255
        samples.append(Sample(f"s{i}", picture(H, W, bands, dtype=dtype, seed=i), mask))
    samples.append(Sample("exact", picture(40, 40, bands, dtype=dtype), np.eye(40, dtype=np.uint8)))
    return samples


@pytest.mark.parametrize(("bands", "dtype"), [(3, np.uint8), (7, np.int16), (7, np.float32)])
@pytest.mark.parametrize("paste", [0.0, 0.7])
def test_batches_are_those_of_the_set_in_one_piece(tmp_path: Path, bands: int, dtype: type, paste: float) -> None:
    for name, tile in (("whole", None), ("tiled", 32)):
        write_shards(made(5, bands, dtype), tmp_path / name, num_classes=1, tile=tile)
    assert load_index(tmp_path / "tiled").entries([0])[0].image.format == "tiles"
    assert list(verify(tmp_path / "tiled")) == []
    before = load_index(tmp_path / "tiled")
    for again in (False, True):
        if again:
            # The index can be made of the shards alone.
            main(["index", str(tmp_path / "tiled"), "--workers", "1", "--ignore_label", "255"])
            assert identity_of(load_index(tmp_path / "tiled"))["contents"] == identity_of(before)["contents"]
        for crops in (None, Crops(40, 0.5, 3, paste), Crops(75, 0.5, 3, paste)):
            for normalize in ("image", "dataset"):
                for chosen in (None, [bands - 1, "0-1"]):
                    whole, tiled = (
                        Shards(tmp_path / name, normalize, crops, bands=chosen) for name in ("whole", "tiled")
                    )
                    for epoch, i in ((0, 0), (0, 5), (1, 3), (2, 4)):
                        expected, found = (shards[[Slot(epoch, i, 1)]] for shards in (whole, tiled))
                        for key, values in expected.items():
                            np.testing.assert_array_equal(found[key], values)  # type: ignore[literal-required]


def test_pixels_without_a_value(tmp_path: Path) -> None:
    samples = made(2, 7, np.float32)
    samples[0].image_HWC[5:20, 5:20] = samples[1].image_HWC[3, 3, 2] = np.nan
    batches = []
    for name, tile in (("whole", None), ("tiled", 32)):
        write_shards(samples, tmp_path / name, num_classes=1, tile=tile)
        batches.append(Shards(tmp_path / name, crops=Crops(32, 0.5, 0))[[Slot(0, i, 1) for i in range(3)]])
    for key, values in batches[0].items():
        np.testing.assert_array_equal(batches[1][key], values)  # type: ignore[literal-required]


def test_pack_and_other_readers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = picture(3, 48, 40, 6, dtype=np.uint16), (picture(3, 48, 40) > 150).astype(np.uint8)
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", masks)
    arguments = ["pack", "arrays", "--images", str(tmp_path / "x.npy"), "--masks", str(tmp_path / "y.npy")]
    main([*arguments, "--out", str(tmp_path / "out"), "--val_share", "0.4", "--tile", "32"])
    found = {}
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*/*.tar"))]
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        found[sample["__key__"]] = np.moveaxis(tifffile.imread(io.BytesIO(sample["image.tif"])), 0, 2)
    np.testing.assert_array_equal([found[key] for key in sorted(found)], images)
    # A second packing finds the first, and one without tiles does not take it for its own.
    main([*arguments, "--out", str(tmp_path / "out"), "--val_share", "0.4", "--tile", "32"])
    for wrong, said in (("100", "is not a multiple of 16 from 16 to 4096"), ("48", "exists already")):
        with pytest.raises(SystemExit):
            main([*arguments, "--out", str(tmp_path / "out"), "--val_share", "0.4", "--tile", wrong])
        assert said in capsys.readouterr().err


def test_changed_bytes_are_found_where_they_are_read(tmp_path: Path) -> None:
    sample = Sample("a", picture(64, 64, 7), np.eye(64, dtype=np.uint8))
    write_shards([sample], tmp_path / "train", num_classes=1, tile=32)
    path = tmp_path / "train" / "shard-000000.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    data = bytearray(path.read_bytes())
    at = member.offset_data + member.size - 5
    data[at] ^= 1
    path.write_bytes(data)
    # The last tile of the last band.
    with pytest.raises(BadSample, match=r"sample a: tile 27 has other bytes than when it was indexed"):
        Shards(tmp_path / "train")[[Slot(0, 0, 1)]]
    assert Shards(tmp_path / "train", bands=["0-5"])[[Slot(0, 0, 1)]]["image"].shape == (1, 6, 64, 64)
    assert len(list(verify(tmp_path / "train"))) == 2
    data[at] ^= 1
    data[member.offset_data + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadSample, match=r"sample a: has a damaged head"):
        Shards(tmp_path / "train", bands=[0])[[Slot(0, 0, 1)]]


def test_a_tile_cannot_unpack_to_more_than_its_size() -> None:
    layout = tiles.Layout(16, 16, 1, np.dtype(np.uint8), 16, 16)
    for count, said in ((257, "does not decode"), (255, "has 255 bytes in place of 256")):
        piece = imagecodecs.zstd_encode(bytes(count))
        digest = np.array([tiles.xxhash.xxh3_64_intdigest(piece)], np.uint64)
        data = tiles.head_of(layout, np.array([len(piece)]), digest) + piece
        with pytest.raises(ValueError, match=said):
            decode_image("tiles", data)
    huge = tiles.Layout(2**20, 2**20, 1, np.dtype(np.uint8), 16, 16)
    data = tiles.head_of(huge, np.array([1]), np.array([0], np.uint64)) + b"x"
    with pytest.raises(TooLarge, match="1048576 x 1048576 pixels"):
        decode_image("tiles", data)
