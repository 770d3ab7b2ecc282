import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from deepskip.data_shards import writer
from deepskip.data_shards.command_line import main
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.order import Slot
from deepskip.data_shards.sources.folder import PackError, pack_folder
from deepskip.data_shards.sources.split import read_split

SHARED = Path(os.environ.get("DEEPSKIP_DATA", Path(__file__).parents[3] / "shared" / "data"))
RNG = np.random.default_rng(0)


def picture(folder: Path, name: str, array: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, photometric="minisblack")
    else:
        Image.fromarray(array).save(path, quality=95) if path.suffix == ".jpg" else Image.fromarray(array).save(path)


def pairs(folder: Path, count: int = 5, top: int = 255) -> tuple[Path, Path]:
    for i in range(count):
        picture(folder / "images", f"a.{i}.png", RNG.integers(0, 256, (12, 10 + i, 3)).astype(np.uint8))
        mask = np.zeros((12, 10 + i), np.uint8)
        mask[2:5, 1 : i + 2] = top
        picture(folder / "masks", f"a.{i}.png", mask)
    return folder / "images", folder / "masks"


def split_of(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "split.csv"
    path.write_text("stem,split\n" + "".join(f"{stem},{split}\n" for stem, split in rows))
    return path


def test_packs_by_the_split_with_files_as_they_are(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path)
    split = split_of(tmp_path, [(f"a.{i}", s) for i, s in enumerate(["train", "val", "test", "train", "val"])])
    counts = pack_folder(images, masks, tmp_path / "out", split=split)
    assert counts == {"train": 2, "val": 2, "test": 1}
    shards = Shards(tmp_path / "out" / "train")
    assert shards.index.num_classes == 1
    item = shards[[Slot(0, 1, 1)]]
    assert item["key"] == ["a_3"]
    np.testing.assert_array_equal(item["image"][0].permute(1, 2, 0), np.asarray(Image.open(images / "a.3.png")))
    np.testing.assert_array_equal(item["mask"][0], np.asarray(Image.open(masks / "a.3.png")) // 255)
    entry = shards.index.entries([0])[0].image
    data = (tmp_path / "out" / "train" / shards.index.shards[0].name).read_bytes()
    assert data[entry.offset : entry.offset + entry.length] == (images / "a.0.png").read_bytes()


def test_a_random_split_is_seeded(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path)
    for name in ("one", "two"):
        assert pack_folder(images, masks, tmp_path / name, val_share=0.4, seed=3) == {"train": 3, "val": 2}
    one, two = (load_index(tmp_path / name / "val") for name in ("one", "two"))
    assert one == two


def test_many_kinds_of_files_in_one_folder(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    picture(images, "grey16.tif", RNG.integers(0, 60000, (9, 8)).astype(np.uint16))
    picture(images, "pages.tif", RNG.integers(0, 60000, (6, 9, 8)).astype(np.uint16))
    picture(images, "cube.npy", RNG.random((9, 8, 12)).astype(np.float32))
    picture(images, "photo.jpg", RNG.integers(0, 256, (9, 8, 3)).astype(np.uint8))
    for stem in ("grey16", "pages", "cube", "photo"):
        picture(masks, f"{stem}_mask.png", np.eye(9, 8, dtype=np.uint8) * 3)
    with pytest.raises(PackError, match=r"1 bands: 1 images such as grey16, 3 bands: .*12 bands.*--bands N"):
        pack_folder(images, masks, tmp_path / "out", mask_suffix="_mask")
    pack_folder(images, masks, tmp_path / "out", mask_suffix="_mask", bands=6, longest_side=8, val_share=0.5)
    for split in ("train", "val"):
        shards = Shards(tmp_path / "out" / split)
        assert shards.index.preparation == {"bands": 6, "longest_side": 8}
        for i in range(len(shards)):
            item = shards[[Slot(0, i, 1)]]
            assert tuple(item["image"].shape) == (1, 6, 8, 7)
            assert set(item["mask"].unique().tolist()) == {0, 1}


def test_an_npz_is_image_and_mask(tmp_path: Path) -> None:
    for i in range(2):
        cube = RNG.integers(-5, 3000, (7, 6, 20 + i)).astype(np.int16)
        np.savez(tmp_path / f"scene{i}.npz", cube=cube, mask=np.eye(7, 6, dtype=np.uint8), scale=1.0)
    pack_folder(tmp_path, tmp_path, tmp_path / "out", bands=10)
    item = Shards(tmp_path / "out" / "val")[[Slot(0, 0, 1)]]
    assert tuple(item["image"].shape) == (1, 10, 7, 6)
    np.testing.assert_array_equal(item["mask"][0], np.eye(7, 6))


def test_classes_and_an_ignored_label(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path, 4)
    for i in range(4):
        mask = np.full((12, 10 + i), i % 3, np.uint8)
        mask[0] = 11
        picture(masks, f"a.{i}.png", mask)
    pack_folder(images, masks, tmp_path / "out", ignore_label=11)
    shards = Shards(tmp_path / "out" / "train")
    assert shards.index.num_classes == 3
    assert set(torch_values(shards)) <= {0, 1, 2, 255}
    assert 255 in torch_values(shards)
    with pytest.raises(PackError, match=r"labels above num_classes - 1 = 1 in 1 masks: a\.2\.png \(2\)"):
        pack_folder(images, masks, tmp_path / "more", ignore_label=11, num_classes=2)
    pack_folder(images, masks, tmp_path / "binary", labels="binary", ignore_label=11)
    assert load_index(tmp_path / "binary" / "train").num_classes == 1


def torch_values(shards: Shards) -> set[int]:
    return {value for i in range(len(shards)) for value in shards[[Slot(0, i, 1)]]["mask"].unique().tolist()}


def test_what_does_not_pair_is_listed(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path)
    (masks / "a.1.png").rename(masks / "b.1.png")
    with pytest.raises(PackError) as error:
        pack_folder(images, masks, tmp_path / "out")
    assert "1 images without a mask" in str(error.value)
    assert "a.1" in str(error.value)
    assert "1 masks without an image" in str(error.value)
    assert "b.1" in str(error.value)
    (masks / "b.1.png").rename(masks / "a.1.png")
    picture(images, "a.1.jpg", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(PackError, match="have the same stem"):
        pack_folder(images, masks, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_bad_files_are_listed_at_once(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path)
    picture(masks, "a.0.png", np.zeros((3, 4), np.uint8))
    (images / "a.2.png").write_bytes(b"nothing")
    with pytest.raises(PackError) as error:
        pack_folder(images, masks, tmp_path / "out")
    assert "the mask of a.0 is 3 x 4 (height x width), its image 12 x 10" in str(error.value)
    assert "a.2.png the png file does not decode" in str(error.value)


def test_instance_numbers_are_told_from_classes(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path, 2)
    for i in range(2):
        picture(masks, f"a.{i}.png", (np.arange(12 * (10 + i)).reshape(12, 10 + i) * 9).astype(np.uint16))
    with pytest.raises(PackError, match="look like numbers of objects"):
        pack_folder(images, masks, tmp_path / "out")
    for i in range(2):
        picture(masks, f"a.{i}.png", (np.arange(12 * (10 + i)).reshape(12, 10 + i) % 22).astype(np.uint8))
    with pytest.raises(PackError, match="masks have 21 values other than 0: if they number objects, --labels binary"):
        pack_folder(images, masks, tmp_path / "out")
    for labels, classes in (("classes", 22), ("binary", 1)):
        packed = pack_folder(images, masks, tmp_path / labels, labels=labels)
        assert {load_index(tmp_path / labels / split).num_classes for split in packed} == {classes}


def test_splits_that_do_not_fit(tmp_path: Path) -> None:
    images, masks = pairs(tmp_path, 2)
    for rows, message in (
        ([("a.0", "train")], r"1 images are not in .*: a\.1"),
        ([("a.0", "train"), ("a.1", "val"), ("x", "val")], "1 stems in .* have no image: x"),
        ([("a.0", "train"), ("a.1", "dev")], "has splits dev; allowed are train, val, test"),
        ([("a.0", "train"), ("a.1", "train")], "needs at least one train and one val"),
        ([("a.0", "train"), ("a.0", "val"), ("a.1", "val")], "names 1 stems more than once"),
    ):
        with pytest.raises(PackError, match=message):
            pack_folder(images, masks, tmp_path / "out", split=split_of(tmp_path, rows))
    with pytest.raises(PackError, match="does not exist"):
        pack_folder(images, masks, tmp_path / "out", split=tmp_path / "none.csv")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = pairs(tmp_path)
    out = tmp_path / "out"
    main(["pack", "folder", "--images", str(images), "--masks", str(masks), "--out", str(out)])
    assert "train: 4 samples in 1 shards" in capsys.readouterr().out
    main(["verify", str(out)])
    main(["preview", str(out / "train"), "--out", str(tmp_path / "p.png")])
    assert Image.open(tmp_path / "p.png").size[0] == 4 * 192
    # The same command finds that its work is done.
    before = (out / "train" / "index.json").stat().st_mtime_ns
    main(["pack", "folder", "--images", str(images), "--masks", str(masks), "--out", str(out)])
    assert (out / "train" / "index.json").stat().st_mtime_ns == before
    shard = out / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(out)])
    assert stopped.value.code == 1
    with pytest.raises(SystemExit):
        main(["pack", "folder", "--images", str(images), "--masks", str(masks), "--out", str(out)])
    assert "but these shards changed: shard-000000.tar; remove it and pack again" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["pack", "folder", "--images", str(images), "--masks", str(masks), "--out", str(out), "--bands", "1"])
    assert stopped.value.code == 2
    assert "train exists already" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data sets are not on this machine")
def test_real_cubes_of_six_band_counts(tmp_path: Path) -> None:
    folder = SHARED / "hyperspectral"
    with pytest.raises(PackError, match="differ in their number of bands"):
        pack_folder(folder, folder, tmp_path / "out", split=folder / "split.csv")
    counts = pack_folder(folder, folder, tmp_path / "out", split=folder / "split.csv", bands=32)
    assert sum(counts.values()) == 15
    for split, count in counts.items():
        shards = Shards(tmp_path / "out" / split)
        assert (len(shards), shards.index.bands, shards.index.num_classes) == (count, 32, 1)
        assert all(shards[[Slot(0, i, 1)]]["mask"].any() for i in range(count))


def test_a_split_as_spreadsheets_write_it(tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text("stem,split\na,train\nb,val\n", encoding="utf-8-sig")
    assert read_split(tmp_path / "split.csv", ["a", "b"]) == {"train": ["a"], "val": ["b"]}
    (tmp_path / "short.csv").write_text("stem,split\na,train\nb\n")
    with pytest.raises(PackError, match=r"has splits .*; allowed are train, val, test"):
        read_split(tmp_path / "short.csv", ["a", "b"])
    for content, words in (
        ("stem,split\né,train\n".encode("utf-16"), "is not in UTF-8: save it as CSV UTF-8"),
        ("stem,split\né,train\n".encode("latin-1"), "is not in UTF-8: save it as CSV UTF-8"),
        (b'stem,split\na,"train\n' + 200_000 * b"x", "cannot be read as CSV: .*; is a quote not closed"),
    ):
        (tmp_path / "odd.csv").write_bytes(content)
        with pytest.raises(PackError, match=words):
            read_split(tmp_path / "odd.csv", ["a"])
    with pytest.raises(PackError, match=f"the split file {tmp_path} is not a file"):
        read_split(tmp_path, ["a"])


def test_options_and_folders_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = pairs(tmp_path)
    command = ["pack", "folder", "--images", str(images), "--out", str(tmp_path / "out")]
    for options, words in (
        (["--samples_per_shard", "0"], "argument --samples_per_shard: 0 is not 1 or more"),
        (["--longest_side", "-7"], "argument --longest_side: -7 is not 1 or more"),
        (["--bands", "0"], "argument --bands: 0 is not 1 or more"),
        (["--labels", "binary", "--num_classes", "300"], "num_classes is 300; it must be 1 to 255"),
        (["--labels", "classes", "--num_classes", "1"], "num_classes is 1, which means binary"),
        (["--masks", str(images)], "images would be their own masks: "),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--masks", str(masks), *options])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # A number that argparse would take for an option.
    main([*command, "--masks", str(masks), "--nodata", "-1e20", "--out", str(tmp_path / "numbers")])
    assert load_index(tmp_path / "numbers" / "train").preparation["nodata"] == -1e20
    # Hidden folders of others stay.
    (tmp_path / "out" / ".train.backup").mkdir(parents=True)
    main([*command, "--masks", str(masks)])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".train.backup", "README.md", "train", "val"]


def test_the_same_picture_in_two_splits_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = pairs(tmp_path)
    for folder in (images, masks):
        shutil.copy(folder / "a.0.png", folder / "copy.png")
    rows = [*((f"a.{i}", "train") for i in range(4)), ("a.4", "val"), ("copy", "val")]
    command = ["pack", "folder", "--images", str(images), "--masks", str(masks), "--out", str(tmp_path / "out")]
    main([*command, "--split", str(split_of(tmp_path, rows))])
    said = capsys.readouterr().out
    assert f"warning: 1 samples of {tmp_path}/out/val are also in {tmp_path}/out/train, byte by byte: copy." in said


def test_of_two_that_pack_at_once_the_later_one_finds_the_work_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, masks = pairs(tmp_path)
    publish, packed = writer.publish, []

    def slowly(temporary: Path, folder: Path) -> None:
        if not packed:
            packed.append(folder)
            pack_folder(images, masks, tmp_path / "out")
        publish(temporary, folder)

    monkeypatch.setattr(writer, "publish", slowly)
    assert pack_folder(images, masks, tmp_path / "out") == {"train": 4, "val": 1}
    shutil.rmtree(tmp_path / "out" / "train")

    def beside(temporary: Path, folder: Path) -> None:
        shutil.copytree(images, folder)
        publish(temporary, folder)

    monkeypatch.setattr(writer, "publish", beside)
    with pytest.raises(PackError, match="train exists already"):
        pack_folder(images, masks, tmp_path / "out")
