"""`deepskip append` takes the sources of `pack`; `info`, `order`, `verify`, `index` and `compact` know chains."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from deepskip.data_shards.command_line import main
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index


def write_folder(folder: Path, names: list[str], classes: int = 2) -> tuple[str, str]:
    """Write images and masks; return the options that name them."""
    rng = np.random.default_rng(len(names))
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, classes, (20, 24)).astype(np.uint8)).save(folder / "masks" / f"{name}.png")
    return str(folder / "images"), str(folder / "masks")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pack a set of five images, in three classes."""
    images, masks = write_folder(tmp_path / "first", list("abcde"), 3)
    command = ["pack", "folder", "--images", images, "--masks", masks, "--out", str(tmp_path / "data")]
    main([*command, "--split_name", "train", "--labels", "classes", "--longest_side", "12"])
    return tmp_path / "data"


def test_every_source_is_appended_as_it_would_be_packed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = write_folder(tmp_path / "second", ["f", "g"], 3)
    main(["append", str(data), "--images", images, "--masks", masks, "--offsets", '{"camera": 17}'])
    assert "generation 1 with 2 samples; 7 samples in all" in capsys.readouterr().out
    main(["append", str(data), "--images", images, "--masks", masks])
    assert "generation 1 was made of the same source; nothing is appended" in capsys.readouterr().out
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 255, (2, 3, 10, 12), np.uint8))
    np.save(tmp_path / "y.npy", rng.integers(0, 3, (2, 10, 12)))
    arrays = ["--images", str(tmp_path / "x.npy"), "--masks", str(tmp_path / "y.npy"), "--layout", "NCHW"]
    with pytest.raises(SystemExit):
        main(["append", str(data), *arrays])
    assert "preparation is" in capsys.readouterr().err
    square = {"image_id": 1, "iscrowd": 0, "area": 36, "segmentation": [[2, 2, 8, 2, 8, 8, 2, 8]]}
    coco = {
        "images": [{"id": 1, "file_name": "f.png", "height": 20, "width": 24}],
        "categories": [{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}],
        "annotations": [square | {"id": 1, "category_id": 5}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    command = ["append", str(data), "--images", images, "--annotations", str(tmp_path / "coco.json")]
    with pytest.raises(SystemExit):
        main(command)
    assert "name them in that of the data set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--categories", "cat,dog"])
    assert "1 samples have keys of generation 1 of" in capsys.readouterr().err
    main([*command, "--categories", "cat,dog", "--repeated_keys"])
    shards = Shards(data / "train", normalize="none")
    assert shards.index.keys(list(range(8))) == list("abcdefgf")
    last = shards.read(shards.index.entries([7])[0])
    # The longer side becomes 12 pixels, and a dog is of class 2.
    assert last[0].shape == (10, 12, 3)
    assert np.unique(last[1]).tolist() == [0, 2]
    main(["info", str(data)])
    said = capsys.readouterr().out
    assert "3 generations of 5, 2, 1 samples; watermark 20" in said
    assert "offsets camera 17" in said
    for count, keys in ((1, "abcde"), (2, "abcdefg"), (3, "abcdeffg")):
        main(["order", str(data / "train"), "--global-batch-size", "8", "--generations", str(count)])
        assert sorted(json.loads(capsys.readouterr().out)["keys"]) == list(keys)
    with pytest.raises(SystemExit):
        main(["index", str(data / "train")])
    assert "its index never changes" in capsys.readouterr().err


def test_new_files_are_read_as_those_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, values in (("first", (0, 128, 255)), ("second", (0, 128, 200)), ("third", (3, 128, 255))):
        images, masks = write_folder(tmp_path / name, [f"{name}{number}" for number in range(3)])
        for path in Path(masks).iterdir():
            Image.fromarray(np.resize(np.array(values, np.uint8), (20, 24))).save(path)
    first, second, third = (str(tmp_path / name / "images") for name in ("first", "second", "third"))
    data = str(tmp_path / "data")
    options = ["--threshold", "100", "--ignore_label", "128", "--labels", "binary"]
    pack = ["pack", "folder", "--out", data, "--images", first, "--masks", first.replace("images", "masks")]
    main([*pack, *options, "--split_name", "train"])
    main(["append", data, "--images", second, "--masks", second.replace("images", "masks")])
    assert "masks are read with --labels binary --ignore_label 128 --threshold 100.0" in capsys.readouterr().out
    for image in Path(third).iterdir():
        image.with_stem(f"{image.stem}_mask").write_bytes((Path(third).with_name("masks") / image.name).read_bytes())
    command = ["ingest", "--from", f"folder:{third}", "--to", data, "--mask_suffix", "_mask", "--settle_seconds", "0"]
    main([*command, "--idle_seconds", "1"])
    shards = Shards(tmp_path / "data" / "train")
    assert len(shards) == 9
    for entry in shards.index.entries(list(range(9))):
        assert shards.read(entry)[1].ravel()[:3].tolist() == [0, 255, 1]
    # An option that is given holds, as for masks of another program.
    images, masks = write_folder(tmp_path / "fourth", ["x"], 8)
    main(["append", data, "--images", images, "--masks", masks, "--threshold", "4", "--ignore_label", "7"])
    shards = Shards(tmp_path / "data" / "train")
    drawn = np.asarray(Image.open(tmp_path / "fourth" / "masks" / "x.png"))
    expected = np.where(drawn == 7, 255, drawn >= 4)
    np.testing.assert_array_equal(shards.read(shards.index.entries([9])[0])[1], expected)
    # Another split of the set whose masks are read otherwise is reported.
    capsys.readouterr()
    main([*pack, "--labels", "binary", "--split_name", "val"])
    said = capsys.readouterr().out
    assert "warning: masks are read with --labels binary, those of" in said
    assert "train were with --labels binary --ignore_label 128 --threshold 100.0" in said
    with pytest.raises(SystemExit):
        main(["pack", "folder", "--out", data, "--images", images, "--masks", masks, "--split_name", "test"])
    assert "num_classes is 8, but 1 in" in capsys.readouterr().err


def test_arrays_shards_and_options_of_other_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = write_folder(tmp_path / "first", list("abcde"))
    for name in ("data", "foreign"):
        main(["pack", "folder", "--images", images, "--masks", masks, "--out", str(tmp_path / name)])
    data = str(tmp_path / "data")
    np.save(tmp_path / "x.npy", np.full((2, 10, 12, 3), 7, np.uint8))
    np.save(tmp_path / "y.npy", np.ones((2, 10, 12), np.uint8))
    main(["append", data, "--images", str(tmp_path / "x.npy"), "--masks", str(tmp_path / "y.npy")])
    for path in (tmp_path / "foreign" / "train").glob("index.json"):
        path.unlink()
    foreign = ["append", data, "--split_name", "val", "--shards", str(tmp_path / "foreign" / "train")]
    # What is validated is not trained on.
    with pytest.raises(SystemExit):
        main(foreign)
    assert "4 samples have keys of generation 0 of" in capsys.readouterr().err
    foreign.append("--repeated_keys")
    main(foreign)
    main(foreign)
    assert "generation 1 was made of the same source" in capsys.readouterr().out
    train, val = (load_index(tmp_path / "data" / name) for name in ("train", "val"))
    assert train.keys([4, 5]) == ["x_0", "x_1"]
    assert (train.num_samples, val.num_samples) == (6, 5)
    for options, words in (
        ([], "give either --images"),
        (["--images", images, "--shards", data], "give either --images"),
        (
            ["--images", images, "--masks", masks, "--layout", "NHWC"],
            "--layout belongs to arrays, but the source is fold",
        ),
        (["--images", str(tmp_path / "x.npy")], "give the array of the masks"),
        (
            ["--images", images, "--masks", masks, "--repeated_keys", "--offsets", '{"a": 1.5}'],
            "the generation.offsets is",
        ),
        (["--shards", str(tmp_path / "nowhere")], "nowhere does not exist"),
        (["--shards", str(tmp_path / "first" / "images")], "images holds no .tar files"),
        (["--images", images, "--masks", masks, "--offsets", "[1]"], "is not a JSON object"),
    ):
        with pytest.raises(SystemExit):
            main(["append", data, *options])
        assert words in capsys.readouterr().err
    # Nothing is left of what was refused.
    assert not list((tmp_path / "data" / "train").glob(".append*"))


@pytest.mark.parametrize(("values", "known"), [((0, 255), False), ((0, 1), True), ((0, 1, 255), False)])
def test_a_value_of_255_in_shards_of_another_program_is_not_taken_for_ignored(
    values: tuple[int, ...], known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = write_folder(tmp_path / "first", list("abcde"))
    main(["pack", "folder", "--images", images, "--masks", masks, "--out", str(tmp_path / "data")])
    (tmp_path / "foreign").mkdir()
    mask = np.resize(np.array(values, np.uint8), (10, 12))
    with webdataset.TarWriter(str(tmp_path / "foreign" / "x.tar")) as writer:
        writer.write({"__key__": "x", "image.png": np.zeros((10, 12, 3), np.uint8), "mask.png": mask})
    command = ["append", str(tmp_path / "data"), "--shards", str(tmp_path / "foreign")]
    if known:
        main(command)
    else:
        with pytest.raises(SystemExit):
            main(command)
        assert "hold more than 0 and 1, and only an index that DeepSkip made would say" in capsys.readouterr().err
    assert load_index(tmp_path / "data" / "train").num_samples == 4 + known


def test_the_index_of_a_packed_split_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = write_folder(tmp_path / "first", list("abcde"))
    data = str(tmp_path / "data" / "train")
    main(
        ["pack", "folder", "--images", images, "--masks", masks, "--longest_side", "8", "--out", str(tmp_path / "data")]
    )
    before = (tmp_path / "data" / "train" / "index.json").read_bytes()
    main(["index", data])
    assert "was made by pack or append: it is kept" in capsys.readouterr().out
    for options in (["--num_classes", "300"], ["--on_bad_sample", "skip"]):
        with pytest.raises(SystemExit):
            main(["index", data, *options])
        assert "index.json was made by pack or append" in capsys.readouterr().err
    assert (tmp_path / "data" / "train" / "index.json").read_bytes() == before


def test_a_compacted_chain_has_the_same_samples(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, names in enumerate((["f", "g"], ["a", "h"])):
        images, masks = write_folder(tmp_path / str(number), names, 3)
        command = ["append", str(data), "--images", images, "--masks", masks, "--repeated_keys"]
        main([*command, "--watermark", str(100 - number), "--offsets", json.dumps({"one": number, f"n{number}": "x"})])
    main(["compact", str(data), "--out", str(tmp_path / "small"), "--samples_per_shard", "4"])
    before, after = (Shards(folder / "train", normalize="none") for folder in (data, tmp_path / "small"))
    assert [shard.samples for shard in after.index.shards] == [4, 4, 1]
    assert after.index.keys(list(range(9))) == [*"abcdefg", "a-2", "h"]
    for one, other in zip(before.index.entries(list(range(9))), after.index.entries(list(range(9))), strict=True):
        assert one.digest == other.digest
        for found, expected in zip(after.read(other), before.read(one), strict=True):
            np.testing.assert_array_equal(found, expected)
    for name in ("mean", "std", "percentiles", "num_classes", "dtype", "preparation", "labels", "reading"):
        assert getattr(before.index, name) == getattr(after.index, name)
    for name in ("mean", "std"):
        assert after.index.samples[name].combine_chunks().equals(before.index.samples[name].combine_chunks())
    # A writer resumes from the offsets of the chain, and appends to the new set as to the old one.
    [first] = after.index.generations
    assert (first.watermark, first.offsets) == (100.0, {"one": 1, "n0": "x", "n1": "x"})
    images, masks = write_folder(tmp_path / "last", ["z"], 3)
    main(["append", str(tmp_path / "small"), "--images", images, "--masks", masks])
    main(["verify", str(tmp_path / "small")])
    assert "every sample can be read" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compact", str(data), "--out", str(tmp_path / "small")])
    assert "exists already" in capsys.readouterr().err


def test_verify_lists_what_dead_writers_left(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stray = data / "train" / f"shard-{'0' * 32}-000000.tar"
    stray.touch()
    (data / "train" / ".append-x" / "train").mkdir(parents=True)
    main(["verify", str(data)])
    said = capsys.readouterr().out
    assert "2 files are not part of it" in said
    assert stray.name in said
    main(["verify", str(data), "--remove_strays"])
    assert "0 are removed" in capsys.readouterr().out
    assert stray.exists()
    main(["verify", str(data), "--remove_strays", "--older_than", "0"])
    assert "2 are removed" in capsys.readouterr().out
    main(["verify", str(data)])
    assert "not part" not in capsys.readouterr().out
    assert sorted(path.suffix for path in (data / "train").iterdir()) == [".arrow", ".json", ".tar"]


def test_a_tilde_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    # A shell leaves the tilde of --out=~/coins as it is.
    main(["pack", "coins", "--out=~/coins", "--train", "2", "--val", "1", "--test", "1"])
    main(["compact", "~/coins", "--out=~/joined"])
    main(["preview", "~/joined/train", "--out=~/sheet.png"])
    assert load_index(home / "joined" / "train").num_samples == load_index(home / "coins" / "train").num_samples == 2
    assert (home / "sheet.png").is_file()
    assert list(here.iterdir()) == []
