from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepskip.data_shards.command_line import main
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.sources.arrays import pack_arrays
from deepskip.data_shards.sources.split import PackError

RNG = np.random.default_rng(0)


def saved(tmp_path: Path, images: np.ndarray, masks: np.ndarray) -> tuple[Path, Path]:
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", masks)
    return tmp_path / "x.npy", tmp_path / "y.npy"


@pytest.mark.parametrize(("layout", "axes"), [("NHWC", (0, 1, 2, 3)), ("NCHW", (0, 3, 1, 2))])
def test_arrays_come_back_by_number(tmp_path: Path, layout: str, axes: tuple[int, ...]) -> None:
    images = RNG.integers(0, 4000, (12, 9, 7, 5)).astype(np.uint16)
    masks = RNG.integers(0, 3, (12, 9, 7)).astype(np.int32)
    files = saved(tmp_path, images.transpose(axes), masks)
    counts = pack_arrays(*files, tmp_path / "out", layout=layout, val_share=0.25)
    assert counts == {"train": 9, "val": 3}
    seen = {}
    for split in counts:
        shards = Shards(tmp_path / "out" / split)
        assert (shards.index.num_classes, shards.index.bands) == (3, 5)
        for entry in shards.index.entries(list(range(len(shards)))):
            seen[entry.key] = shards.read(entry)
    assert sorted(seen) == [f"{i:02d}" for i in range(12)]
    for key, (image, mask) in seen.items():
        np.testing.assert_array_equal(image, images[int(key)])
        np.testing.assert_array_equal(mask, masks[int(key)])


def test_npz_and_a_split_file_and_the_command_line(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "all.npz", images=RNG.random((3, 8, 8), np.float32), masks=np.eye(8, dtype=bool)[None].repeat(3, 0)
    )
    (tmp_path / "split.csv").write_text("stem,split\n0,val\n1,train\n2,train\n")
    main(["pack", "arrays", "--images", str(tmp_path / "all.npz"), "--masks", str(tmp_path / "all.npz"), "--layout", "NHW",
          "--out", str(tmp_path / "out"), "--split", str(tmp_path / "split.csv"), "--bands", "2"])  # fmt: skip
    shards = Shards(tmp_path / "out" / "train")
    assert shards.index.keys([0, 1]) == ["1", "2"]
    image, mask = shards.read(shards.index.entries([0])[0])
    assert image.shape == (8, 8, 2)
    np.testing.assert_array_equal(mask, np.eye(8))


@pytest.mark.parametrize(
    ("images", "masks", "options", "message"),
    [
        (np.zeros((2, 4, 4, 3)), np.zeros((3, 4, 4)), {}, r"has \(2, 4, 4, 3\) .*y\.npy \(3, 4, 4\)"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), {}, "they must be NHWC and"),
        (np.zeros((2, 4, 4, 3)), np.full((2, 4, 4), 0.5), {}, "mask 0 holds values that are not integers"),
        (np.zeros((2, 4, 4, 3)), np.full((2, 4, 4), -1), {}, r"labels below 0 in 0 \(-1\).* --ignore_label -1"),
        (
            np.zeros((2, 4, 4, 3)),
            np.full((2, 4, 4), np.inf),
            {},
            "mask 0 holds labels of dtype float64 that are too large",
        ),
        (np.zeros((2, 4, 4, 0)), np.zeros((2, 4, 4)), {}, r"has \(2, 4, 4, 0\)"),
        (np.full((2, 4, 4, 3), np.nan), np.zeros((2, 4, 4)), {}, "has values that are nan or infinite"),
        (
            np.zeros((2, 4, 4, 3)),
            np.full((2, 4, 4), 5),
            {"num_classes": 3},
            r"labels above num_classes - 1 = 2.*0 \(5\)",
        ),
        (np.array(["a"]), np.zeros((2, 4, 4)), {}, "has dtype <U1"),
        (np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4)), {"layout": "CHWN"}, "layout is 'CHWN'"),
    ],
)
def test_faults_are_named(tmp_path: Path, images: np.ndarray, masks: np.ndarray, options: Any, message: str) -> None:
    files = saved(tmp_path, images, masks)
    with pytest.raises(PackError, match=message):
        pack_arrays(*files, tmp_path / "out", **options)


def test_pickled_and_missing_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([print], dtype=object), allow_pickle=True)
    np.save(tmp_path / "y.npy", np.zeros((1, 4, 4)))
    with pytest.raises(PackError, match=r"x\.npy cannot be read: .*Python objects"):
        pack_arrays(tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "out")
    for content in (b"", b"PK\x03\x04"):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(PackError, match=r"x\.npy cannot be read"):
            pack_arrays(tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "out")
    with pytest.raises(PackError, match=r"z\.npy does not exist"):
        pack_arrays(tmp_path / "z.npy", tmp_path / "y.npy", tmp_path / "out")
