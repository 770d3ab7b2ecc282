"""The published benchmarks: sets are packed by their official split, runs are done once, and the table is by hand."""

import csv
import hashlib
import importlib
import json
import runpy
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import deepskip
from deepskip import checkpoint
from deepskip.config import Config
from deepskip.data_shards.index import load_index
from deepskip.jobs.bench.published import data, page, runs
from deepskip.jobs.bench.published.__main__ import main

# It imports nothing of DeepSkip.
check = SimpleNamespace(**runpy.run_path(str(page.FOLDER / "check.py")))

TRAIN, TEST = [f"a{i}" for i in range(7)], [f"b{i}" for i in range(4)]
TINY = {
    "model": {"base_channels": 4, "levels": 3},
    "data": {"crop": 32},
    "optim": {"steps": 3, "warmup_steps": 1, "global_batch_size": 2, "learning_rate": 0.02},
    "run": {"validate_every": 1},
    "cluster": {"gpu": False, "cpus_per_worker": 1},
}


@pytest.fixture(scope="module", autouse=True)
def small_set() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SETS, "sirst_v1", (len(TRAIN), len(TEST)))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two folders of grey images with bright targets, the second with one image, and a CSV of the split."""
    folders = tuple(tmp_path_factory.mktemp("set") for _ in range(2))
    rng = np.random.default_rng(0)
    for stem in [*TRAIN, *TEST, "unused"]:
        folder = folders[stem == "b3"]
        mask = np.zeros((40, 48), np.uint8)
        for _ in range(3):
            y, x = rng.integers(0, (36, 44))
            mask[y : y + 3, x : x + 4] = 255
        image = rng.normal(90, 20, mask.shape) + 0.6 * mask
        for name, values in (("images", image.clip(0, 255).astype(np.uint8)), ("masks", mask)):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(values).save(folder / name / f"{stem}.png")
    return folders[0], folders[1]


def write_split(folder: Path, val: list[str]) -> Path:
    rows = [f"{stem},{'val' if stem in val else 'train'}" for stem in TRAIN] + [f"{stem},test" for stem in TEST]
    (folder / "split.csv").write_text("\n".join(["stem,split", *rows]) + "\n")
    return folder / "split.csv"


def stems(part: Path) -> dict[str, list[str]]:
    found = {}
    for folder in sorted(path for path in part.iterdir() if path.is_dir()):
        index = load_index(folder)
        found[folder.name] = sorted(entry.key for entry in index.entries(range(index.num_samples)))
    return found


def test_parts_of_a_marked_split(images: tuple[Path, Path], tmp_path: Path) -> None:
    split = write_split(tmp_path, ["a2", "a5"])
    (tmp_path / "near.txt").write_text("a0\na5\n")
    data.pack("sirst_v1", images, split, tmp_path / "out", near_duplicates=tmp_path / "near.txt")
    fewer = [stem for stem in TRAIN if stem not in ("a2", "a5")]
    assert stems(tmp_path / "out" / "search") == {"train": fewer, "val": ["a2", "a5"]}
    assert stems(tmp_path / "out" / "official") == {"train": TRAIN, "val": ["a2", "a5"], "test": TEST}
    assert stems(tmp_path / "out" / "distinct") == {
        "train": [stem for stem in TRAIN if stem not in ("a0", "a5")], "val": ["a2"], "test": TEST,
    }  # fmt: skip


def test_validation_images_are_drawn_by_the_seed_from_lists(images: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "train_SIRST.txt").write_text("\n".join(TRAIN))
    (tmp_path / "test_SIRST.txt").write_text("\n".join(TEST))
    drawn = set()
    for seed in range(4):
        out = tmp_path / f"out-{seed}"
        data.pack("sirst_v1", images, tmp_path, out, val_share=0.3, seed=seed)
        parts = stems(out / "search")
        assert len(parts["val"]) == 2
        assert sorted(parts["train"] + parts["val"]) == TRAIN
        drawn.add(tuple(parts["val"]))
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stem,split\na0,train\nb0,test\n", "has 1 training and 1 test images; sirst_v1 has 7 and 4"),
        ("stem,split\na0,valid\n", "it needs stem,split with train, val or test"),
        (None, "does not exist"),
    ],
)
def test_splits_that_are_not_the_official_one(
    images: tuple[Path, Path], tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    split = tmp_path / "split.csv"
    if content:
        split.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["pack", "sirst_v1", "--folder", str(images[0]), "--split", str(split), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_done_once_and_its_metrics_are_scikit_images(
    images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.pack("sirst_v1", images, write_split(tmp_path, ["a2"]), tmp_path / "data")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    table = tmp_path / "table" / "runs.csv"
    arguments = ["run", "sirst_v1", "--data", str(tmp_path / "data"), "--recipe", str(tmp_path / "recipe.yaml"),
                 "--out", str(tmp_path / "runs"), "--table", str(table), "--seeds", "5"]  # fmt: skip
    main(arguments)
    (row,) = csv.DictReader(table.open())
    (folder,) = (tmp_path / "runs" / "sirst_v1-official").glob("deepskip-*/seed-5")
    checkpoint = folder / "checkpoints" / "step-00000003.pt"
    model = deepskip.load(checkpoint)
    found = check.score(
        TEST,
        lambda stem: check.reader(images[stem == "b3"] / "masks")(stem),
        lambda stem: model.predict(check.grey(images[stem == "b3"] / "images", stem)) == 1,
    )
    assert found["iou"] * found["pd"] > 0
    assert {name: float(row[name]) for name in found} == pytest.approx(found)
    assert (row["steps"], row["images"], row["seed"], row["network"]) == ("3", "4", "5", "deepskip")
    weights = torch.load(checkpoint, weights_only=True)["ema"]
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode() + values.contiguous().numpy().tobytes())
    assert row["weights_sha256"] == digest.hexdigest()
    assert str(tmp_path) not in row["command"]
    recipe = json.loads((table.parent / "recipes" / f"{row['recipe']}.json").read_text())
    assert (recipe["optim.steps"], recipe["data.crop"]) == (3, 32)

    # The row is enough, also after the run is gone.
    capsys.readouterr()
    record = (folder / "summary.json").read_bytes()
    main(arguments)
    assert "has this run" in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == 2
    # A process that died before the row was written is completed, and trains nothing again.
    table.unlink()
    main(arguments)
    assert (folder / "summary.json").read_bytes() == record
    assert list(csv.DictReader(table.open())) == [row]
    # Another network by the same recipe; trials are tested on validation images.
    main([*arguments, "--network", "plain_unet", "--part", "search"])
    other = list(csv.DictReader(table.open()))[-1]
    assert (other["recipe"], other["network"], other["images"]) == (row["recipe"], "plain_unet", "1")


def test_the_check_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three targets: two are found with a pixel too many, one is missed; and there is a false component of two pixels."""
    for name, rows in {"masks": ["##....", "......", "....#."], "predictions": ["###...", "......", "##..##"]}.items():
        (tmp_path / name).mkdir()
        picture = np.array([[255 * (letter == "#") for letter in row] for row in rows], np.uint8)
        Image.fromarray(np.pad(picture, ((0, 9), (0, 0)))).save(tmp_path / name / "b0.png")
        picture = np.zeros((12, 6), np.uint8)
        picture[11, 5] = 255 * (name == "masks")
        Image.fromarray(picture).save(tmp_path / name / "b1.png")
    (tmp_path / "test.txt").write_text("b0\nb1\n")
    words = ["--masks", str(tmp_path / "masks"), "--split", str(tmp_path / "test.txt")]
    check.main([*words, "--predictions", str(tmp_path / "predictions")])
    # 3 of 8 pixels, the mean of 3 / 7 and 0, 2 of 3 targets, 2 of 144 pixels
    assert capsys.readouterr().out == "iou 0.375, niou 0.214286, pd 0.666667, fa 0.0138889\n"


def test_the_place_of_a_target_beside_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(page.FOLDER)
    alignment = importlib.import_module("alignment")
    rows, columns = np.indices((40, 40))
    for down, right in ((0.0, 0.0), (0.75, -0.5), (-0.25, 1.0)):
        # The second one is cut by the border.
        image = sum(
            100 * np.exp(-((rows - y - down) ** 2 + (columns - x - right) ** 2) / 4) for y, x in ((20, 12), (37, 30))
        )
        mask = np.zeros((40, 40), bool)
        mask[18:23, 10:15] = mask[35:40, 28:33] = True
        found = list(alignment.distances(image + 7, mask))
        assert [area for area, *_ in found] == [25, 25]
        assert found[0][1:] == pytest.approx((down, right), abs=0.1)


def test_a_recipe_is_what_is_trained_by_and_new_settings_that_are_off_do_not_count() -> None:
    config = Config()
    before = runs.recipe_of(config)
    config.model.network, config.run.seed, config.data.path, config.run.storage = "acm", 3, "elsewhere", "there"
    assert runs.recipe_of(config) == before
    assert "augment.gamma" not in before
    config.augment.gamma = 0.2
    assert runs.recipe_of(config) == before | {"augment.gamma": 0.2}


def row_of(network: str, seed: int, iou: float, **changed: str) -> dict[str, str]:
    row = {
        "set": "nudt_sirst",
        "part": "official",
        "network": network,
        "model": "{}",
        "seed": str(seed),
        "recipe": "new",
    }
    row |= {"iou": str(iou), "niou": "0.5", "pd": "0.98", "fa": "4e-6", "parameters": "645521"}
    return row | changed


def test_the_table_by_hand() -> None:
    ious = [0.90, 0.92, 0.91]
    rows = [row_of("deepskip", 0, 0.1, recipe="old"), *(row_of("deepskip", i, iou) for i, iou in enumerate(ious))]
    rows += [row_of("deepskip", 0, 0.3, part="search"), row_of("deepskip", 0, 0.8, part="distinct")]
    rows += [row_of("acm", 0, 0.7, set="sirst_v1", parameters="397655")]
    lines = page.results(rows).splitlines()
    spread = 100 * statistics.stdev(ious)
    assert lines[2] == "| **ACM, trained here** | 0.40 M | 0 / 1 | - | 70.0 / 50.0 / 98.0 / 4.0 | A |"
    assert f"| **DeepSkip** | 0.65 M | 3 / 0 | 91.0 ± {spread:.1f} / 50.0 / 98.0 / 4.0 | - | ours |" in lines
    assert "| **DeepSkip, no near-duplicates** | 0.65 M | 1 / 0 | 80.0 / 50.0 / 98.0 / 4.0 | - | ours |" in lines
    assert "| DNA-Net | 4.70 M | - | 94.2 / - / 99.3 / 2.4 | 74.8 / - / 93.5 / 38.3 | A |" in lines
    assert not any("30.0" in line or "10.0" in line for line in lines)


def test_the_trials_by_hand(tmp_path: Path) -> None:
    recipes = {"first": {"a": 1, "b": 2}, "second": {"a": 1, "b": 3, "c": True}}
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(recipe))
    rows = [
        row_of("deepskip", 0, 0.5, part="search", recipe="first", steps="30"),
        row_of("deepskip", 0, 0.9, recipe="first"),
    ]
    rows += [row_of("plain_unet", 0, 0.6, part="search", recipe="second", steps="30")]
    rows += [row_of("deepskip", 1, 0.52, part="search", recipe="first", steps="30")]
    spread = 100 * statistics.stdev([0.50, 0.52])
    assert page.trials(rows, tmp_path).splitlines()[2:] == [
        f"| NUDT-SIRST | - | 30 | 2 | 51.0 ± {spread:.1f} / 50.0 / 98.0 / 4.0 |",
        "| NUDT-SIRST | DeepSkip without deep skips: `b: 3`, `c: True` | 30 | 1 | 60.0 / 50.0 / 98.0 / 4.0 |",
    ]


@pytest.mark.parametrize("name", ["nudt-sirst", "sirst-v1"])
def test_the_stored_weights_are_those_of_a_row(name: str) -> None:
    state = checkpoint.load_for_inference(page.FOLDER / f"{name}.safetensors")
    (row,) = [row for row in runs.read_rows(page.RUNS) if row["weights_sha256"] == runs.weights_digest(state["model"])]
    assert (row["set"], row["part"], row["network"]) == (name.replace("-", "_"), "official", "deepskip")
    # Prediction prepares images as the training did.
    assert state["config"]["data"]["normalize"] == "image"


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    text, rows = page.PAGE.read_text(), runs.read_rows(page.RUNS)
    assert page.filled(text, rows) == text
    assert page.FIGURE.is_file()
    main(["page", "--out", str(tmp_path)])
    assert (tmp_path / "results.md").read_text().strip() in text
    assert "<svg" in (tmp_path / "iou.svg").read_text()
