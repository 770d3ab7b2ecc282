import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from deepskip.data_shards.command_line import main
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.sources.coco import pack_coco
from deepskip.data_shards.sources.split import PackError

RNG = np.random.default_rng(0)


def runs(mask: np.ndarray) -> list[int]:
    """Return COCO's run lengths, computed by hand: column by column, zeros first."""
    flat = mask.T.ravel()
    lengths, value = [0], 0
    for pixel in flat:
        if pixel != value:
            lengths.append(0)
            value = pixel
        lengths[-1] += 1
    return lengths


def square(left: int, top: int, side: int) -> list[list[float]]:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


@pytest.fixture
def coco(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    names = ["a.png", "sub/b.c.png", "empty.jpg"]
    for name in names:
        Image.fromarray(RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8)).save(tmp_path / "images" / name)
    rows = np.zeros((20, 30), np.uint8)
    rows[3:5, 10:25] = 1
    crowd = np.zeros((20, 30), np.uint8)
    crowd[:, 28:] = 1
    return {
        "categories": [{"id": 7, "name": "cell"}, {"id": 3, "name": "dust"}],
        "images": [{"id": i, "file_name": name, "height": 20, "width": 30} for i, name in enumerate(names)],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 7, "segmentation": square(2, 4, 8), "iscrowd": 0},
            # This one is smaller and inside the first. It is visible whether it comes first or last.
            {"id": 2, "image_id": 0, "category_id": 3, "segmentation": square(4, 6, 2)},
            {"id": 3, "image_id": 1, "category_id": 3, "segmentation": {"size": [20, 30], "counts": runs(rows)}},
            {"id": 4, "image_id": 1, "category_id": 3, "iscrowd": 1,
             "segmentation": {"size": [20, 30], "counts": runs(crowd)}},
        ],
    }  # fmt: skip


def region(segmentation: Any) -> Any:
    return lambda coco: coco["annotations"][0].update(segmentation=segmentation)


def write(tmp_path: Path, coco: dict[str, Any]) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco))
    return path


def masks(folder: Path) -> dict[str, np.ndarray]:
    shards = Shards(folder)
    return {entry.key: shards.read(entry)[1] for entry in shards.index.entries(list(range(len(shards))))}


def test_polygons_runs_and_crowds_become_labels(tmp_path: Path, coco: dict[str, Any]) -> None:
    counts = pack_coco(tmp_path / "images", write(tmp_path, coco), tmp_path / "out", split_name="train")
    assert counts == {"train": 3}
    index = load_index(tmp_path / "out" / "train")
    # Classes are in the order of the ids: dust (3), cell (7).
    assert (index.num_classes, index.num_samples) == (3, 3)
    found = masks(tmp_path / "out" / "train")
    expected = {name: np.zeros((20, 30), np.uint8) for name in ("a", "sub__b_c", "empty")}
    expected["a"][4:12, 2:10] = 2
    expected["a"][6:8, 4:6] = 1
    expected["sub__b_c"][3:5, 10:25] = 1
    expected["sub__b_c"][:, 28:] = 255
    assert found.keys() == expected.keys()
    for key, mask in expected.items():
        np.testing.assert_array_equal(found[key], mask, err_msg=key)
    # The stored images are the original files.
    tar = tmp_path / "out" / "train" / "shard-000000.tar"
    stored = next(iter(webdataset.WebDataset(str(tar), shardshuffle=False)))["image.png"]
    assert stored == (tmp_path / "images" / "a.png").read_bytes()


def test_chosen_categories_and_the_command_line(tmp_path: Path, coco: dict[str, Any]) -> None:
    path = write(tmp_path, coco)
    command = ["pack", "coco", "--images", str(tmp_path / "images"), "--annotations", str(path)]
    main([*command, "--out", str(tmp_path / "cells"), "--categories", "cell", "--split_name", "val"])
    found = masks(tmp_path / "cells" / "val")
    assert load_index(tmp_path / "cells" / "val").num_classes == 1
    assert {key: int(mask.sum()) for key, mask in found.items()} == {"a": 64, "sub__b_c": 0, "empty": 0}
    main([*command, "--out", str(tmp_path / "all"), "--binary", "--val_share", "0.3"])
    both = masks(tmp_path / "all" / "train") | masks(tmp_path / "all" / "val")
    assert int((both["a"] == 1).sum()) == 64
    assert int((both["sub__b_c"] == 1).sum()) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(file_name="../a.png"), r"lead out of .*: \.\./a\.png"),
        (lambda c: c["images"][0].update(file_name="/etc/passwd"), r"lead out of .*: /etc/passwd"),
        (lambda c: c["images"][0].update(file_name="none.png"), r"1 images are not in .*: none\.png"),
        (lambda c: c["images"][0].update(height=21), r"the mask of a is 21 x 30 \(height x width\), its image 20 x 30"),
        (lambda c: c["annotations"][0].update(image_id=9), "1 annotations of images that .* does not have: 1"),
        (lambda c: c["annotations"][0].update(category_id=9), "category ids that .* does not have: 9"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), r"a\.png has annotation 1 that is not a region"),
        (region({"size": [20, 30], "counts": [5, 5]}), "runs are negative or cover 10 pixels of 600"),
        (region({"size": [20, 30], "counts": [-5, 10, 595]}), "runs are negative"),
        (region({"size": [20, 30], "counts": "55"}), "runs are negative or cover 10 pixels of 600"),
        (region({"size": [20, 30], "counts": ""}), "compressed runs are cut off"),
        (region([[float("nan"), 1, 5, 1, 5, 5]]), "points far outside its image of 20 x 30"),
        (region([[1e9, 1, 5, 1, 5, 5]]), "points far outside"),
        (region([]), "no outline, only a box"),
        (lambda c: c["images"][1].update(id=0), "1 images have the same id as another"),
        (
            lambda c: c.update(categories=[{"id": i, "name": f"n{i}"} for i in range(255)]),
            "255 categories; a mask holds 254",
        ),
        (lambda c: c.pop("annotations"), "is not a COCO file of objects: KeyError"),
        (lambda c: c["annotations"][0].update(category_id=[7]), "is not a COCO file of objects: TypeError"),
        (lambda c: c["annotations"][0].update(image_id=[7]), "is not a COCO file of objects: TypeError"),
        (lambda c: c["annotations"][0].update(iscrowd="0"), "iscrowd is neither 0 nor 1 in annotations"),
        (
            lambda c: c["categories"][0].update(name=["cell"]),
            r"is not a COCO file of objects: TypeError.*is not a name",
        ),
        (lambda c: c["categories"][0].update(supercategory=["x"]), "is not a COCO file of objects: TypeError"),
        (lambda c: c["images"][0].update(height=float("inf")), "is not a COCO file of objects: OverflowError"),
        (lambda c: c.update(images=[]), "has no images"),
    ],
)
def test_faults_are_named(tmp_path: Path, coco: dict[str, Any], change: Any, message: str) -> None:
    change(coco)
    with pytest.raises(PackError, match=message):
        pack_coco(tmp_path / "images", write(tmp_path, coco), tmp_path / "out", split_name="train")
    assert not (tmp_path / "out" / "train").exists()


def test_splits_that_are_packed_one_by_one_have_the_same_classes(tmp_path: Path, coco: dict[str, Any]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    pack_coco(images, write(tmp_path, coco), out, split_name="train")
    # Another tool's file numbers the same categories the other way round, and does not name those that it has no objects of.
    coco["categories"] = [{"id": 7, "name": "dust"}, {"id": 3, "name": "cell"}]
    with pytest.raises(
        PackError, match=r"classes are 1 cell, 2 dust, but 1 dust, 2 cell in .*train; .*--categories 'dust,cell'"
    ):
        pack_coco(images, write(tmp_path, coco), out, split_name="val", categories=["cell", "dust"])
    pack_coco(images, write(tmp_path, coco), out, split_name="val")
    assert {key: np.unique(mask).tolist() for key, mask in masks(out / "val").items()} == {
        "a": [0, 1, 2], "sub__b_c": [0, 2, 255], "empty": [0]
    }  # fmt: skip
    assert masks(out / "val")["a"][5, 3] == 1
    coco["categories"], coco["annotations"] = [{"id": 7, "name": "cell"}], coco["annotations"][:1]
    pack_coco(images, write(tmp_path, coco), out, split_name="test")
    assert load_index(out / "test").num_classes == 3
    assert np.unique(masks(out / "test")["a"]).tolist() == [0, 2]
    shutil.rmtree(out / "test")
    with pytest.raises(PackError, match=r"num_classes is 1, but 3 in .*train; .*--binary"):
        pack_coco(images, write(tmp_path, coco), out, split_name="test", binary=True)
    # A binary set takes every object as foreground, whatever it is called.
    pack_coco(images, write(tmp_path, coco), tmp_path / "binary", split_name="train", binary=True)
    coco["categories"][0]["name"] = "fly"
    pack_coco(images, write(tmp_path, coco), tmp_path / "binary", split_name="val")
    np.testing.assert_array_equal(masks(tmp_path / "binary" / "val")["a"], masks(tmp_path / "binary" / "train")["a"])
    with pytest.raises(PackError, match="unknown categories: dust, cell; there are fly"):
        pack_coco(images, write(tmp_path, coco), out, split_name="test", categories=["dust", "cell"])
    with pytest.raises(
        PackError, match=r"the data set has the classes 1 dust, 2 cell, and .* has objects of others: fly"
    ):
        pack_coco(images, write(tmp_path, coco), out, split_name="test")
    assert not (out / "test").exists()


def test_odd_names_of_categories_do_not_break_the_index(tmp_path: Path, coco: dict[str, Any]) -> None:
    coco["categories"][0]["name"], coco["categories"][1]["name"] = "cell\tA\x1b[31m", ""
    pack_coco(tmp_path / "images", write(tmp_path, coco), tmp_path / "out", split_name="train")
    assert load_index(tmp_path / "out" / "train").classes == ["unnamed", "cell A [31m"]


def test_no_such_category_or_file(tmp_path: Path, coco: dict[str, Any]) -> None:
    with pytest.raises(PackError, match="unknown categories: boat; there are cell, dust"):
        pack_coco(tmp_path / "images", write(tmp_path, coco), tmp_path / "out", categories=["boat"])
    with pytest.raises(PackError, match="does not exist"):
        pack_coco(tmp_path / "images", tmp_path / "none.json", tmp_path / "out")


def test_compressed_runs(tmp_path: Path, coco: dict[str, Any]) -> None:
    # By hand, these are 44 zeros, 2 ones, 18 zeros, 2 + 0 ones and 18 + 516 zeros. A character holds five bits, counted
    # from '0'. A sixth bit, 32, means that more follow.
    coco["annotations"][0]["segmentation"] = {"size": [20, 30], "counts": "\\12b00T`0"}
    pack_coco(tmp_path / "images", write(tmp_path, coco), tmp_path / "out", categories=["cell"], split_name="test")
    expected = np.zeros((20, 30), np.uint8)
    expected[4:6, 2:4] = 1
    np.testing.assert_array_equal(masks(tmp_path / "out" / "test")["a"], expected)


def test_grey_among_colour_and_dots_in_a_split_file(tmp_path: Path, coco: dict[str, Any]) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "images" / "sub" / "b.c.png")
    path, split = write(tmp_path, coco), tmp_path / "split.csv"
    split.write_text("stem,split\na,train\nsub/b.c,train\nempty,val\n")
    with pytest.raises(PackError, match=r"\(1 bands: 1 images such as sub/b\.c, 3 bands: .*--bands N"):
        pack_coco(tmp_path / "images", path, tmp_path / "out", split=split)
    assert pack_coco(tmp_path / "images", path, tmp_path / "out", split=split, bands=3) == {"train": 2, "val": 1}
    with pytest.raises(PackError, match=r"split_name is '\.\./up'"):
        pack_coco(tmp_path / "images", path, tmp_path / "out", split_name="../up")


def test_what_other_tools_write(tmp_path: Path, coco: dict[str, Any]) -> None:
    said: list[str] = []
    for image in coco["images"]:
        image.update(width=30.0, height=20.0)
    # Roboflow's first category only names the group.
    coco["categories"] = [{"id": 0, "name": "cells", "supercategory": "none"},
                          {"id": 7, "name": "cell", "supercategory": "cells"}]  # fmt: skip
    flat = [2, 4, 10, 4, 10, 12, 2, 12]
    coco["annotations"] = [
        {"id": 1, "image_id": 0, "category_id": 7, "segmentation": flat},
        {"id": 2, "image_id": 0, "category_id": 7},
        {"id": 3, "image_id": 1, "category_id": 7, "segmentation": []},
        {"id": 4, "image_id": 1, "category_id": 7, "segmentation": [[1, 1, 5, 5]]},
        {"id": 5, "image_id": 1, "category_id": 7, "segmentation": None},
    ]
    path = write(tmp_path, coco)
    with pytest.raises(PackError, match=r"(?s)annotation 2 .*annotation 5 .*4 annotations.*--on_bad_annotation skip"):
        pack_coco(tmp_path / "images", path, tmp_path / "out", split_name="train")
    pack_coco(
        tmp_path / "images", path, tmp_path / "out", split_name="train", on_bad_annotation="skip", say=said.append
    )
    assert load_index(tmp_path / "out" / "train").num_classes == 1
    expected = np.zeros((20, 30), np.uint8)
    expected[4:12, 2:10] = 1
    found = masks(tmp_path / "out" / "train")
    np.testing.assert_array_equal(found["a"], expected)
    assert not found["sub__b_c"].any()
    assert "skipped, since it only groups others and has no annotations: category cells" in said
    assert any(line.startswith("skipped 4 annotations: ") for line in said)
    # A category that is requested by name is a class.
    pack_coco(
        tmp_path / "images", path, tmp_path / "two", split_name="train", on_bad_annotation="skip",
        categories=["cells", "cell"],
    )  # fmt: skip
    assert load_index(tmp_path / "two" / "train").num_classes == 3


def test_images_are_found_by_the_last_part_of_their_names(tmp_path: Path, coco: dict[str, Any]) -> None:
    for image, prefix in zip(coco["images"], ("/data/upload/1/3f2a9c01-", "../../media/", "C:\\x\\"), strict=True):
        image["file_name"] = prefix + image["file_name"].rpartition("/")[2]
    (tmp_path / "images" / "sub" / "b.c.png").rename(tmp_path / "images" / "b.c.png")
    path = write(tmp_path, coco)
    with pytest.raises(PackError, match="--by_basename"):
        pack_coco(tmp_path / "images", path, tmp_path / "out", split_name="train")
    pack_coco(tmp_path / "images", path, tmp_path / "out", split_name="train", by_basename=True)
    assert masks(tmp_path / "out" / "train").keys() == {"3f2a9c01-a", "b_c", "empty"}
