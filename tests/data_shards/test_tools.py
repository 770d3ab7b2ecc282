"""Commands as a person types them: a pack that is killed and run again, info and plan."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from deepskip.data_shards.card import CARD, write_card
from deepskip.data_shards.command_line import main
from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.inspection import Contents, describe
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.stream import train_batches
from deepskip.data_shards.writer import write_shards

SLOW_PACK = """
import sys, time
from pathlib import Path
import numpy as np
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards

def samples():
    for i in range(6):
        if i == 5 and sys.argv[2] == "slow":
            print("nearly", flush=True)
            time.sleep(600)
        yield Sample(f"k{i}", np.full((8, 8, 3), i, np.uint8), np.zeros((8, 8), np.uint8))

write_shards(samples(), Path(sys.argv[1]), num_classes=1, samples_per_shard=2, source="same")
"""


@pytest.mark.slow
def test_a_killed_pack_leaves_no_split_and_the_next_one_clears_up(tmp_path: Path) -> None:
    target = tmp_path / "train"
    killed = subprocess.Popen([sys.executable, "-c", SLOW_PACK, str(target), "slow"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "nearly\n"
    # A second pack at the same time keeps its own half-written folder.
    beside = subprocess.run([sys.executable, "-c", SLOW_PACK, str(target), "fast"], check=True)
    assert beside.returncode == 0
    halves = [path for path in tmp_path.iterdir() if path != target]
    assert len(halves) == 1
    assert len(list(halves[0].glob("*.tar"))) == 3
    killed.kill()
    killed.wait()
    before = load_index(target)
    subprocess.run([sys.executable, "-c", SLOW_PACK, str(target), "fast"], check=True)
    assert load_index(target) == before
    (target / "index.json").unlink()
    target.rename(tmp_path / "gone")
    subprocess.run([sys.executable, "-c", SLOW_PACK, str(target), "fast"], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gone", "train"]
    assert load_index(target).shards == before.shards


def packed(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    made = []
    for i in range(23):
        mask = np.zeros((20, 20), np.uint8)
        mask[2:4, 3:8] = i % 3 > 0
        mask[10, 10] = 1
        made.append(Sample(f"k{i:02d}", rng.integers(0, 255, (20, 20, 3), np.uint8), mask))
    write_shards(made, tmp_path / "train", num_classes=1, samples_per_shard=5)
    return tmp_path / "train"


def test_plan_is_what_the_ranks_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path)
    for rank in range(3):
        main(["plan", str(folder / "index.json"), "--global-batch-size", "7", "--world-size", "3", "--rank", str(rank),
              "--epoch", "1", "--from-step", "1", "--steps", "5", "--seed", "4", "--window", "2"])  # fmt: skip
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        # An epoch has four steps.
        assert [(line["epoch"], line["step"]) for line in lines] == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
        stream = train_batches(Shards(folder, crops=Crops(20, 0, 4)), 4, 7, 5, rank, 3, window=2)
        for line, batch in zip(lines, stream, strict=False):
            taken = list(zip(batch["key"], batch["weight"].tolist(), strict=True))
            assert line["keys"] == [key for key, weight in taken if weight]
            assert line["repeats"] == [key for key, weight in taken if not weight]
    for option, value, allowed in (
        ("--rank", "3", "0 to 2"),
        ("--from-step", "4", "0 to 3"),
        ("--seed", "-1", "0 or more"),
        ("--window", "0", "1 or more"),
        ("--lanes", "9", "1 to 7"),
        ("--steps", "-1", "0 or more"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", str(folder), "--global-batch-size", "7", "--world-size", "3", option, value])
        assert f"error: {option} is {value}; it must be {allowed}" in capsys.readouterr().err


def test_info_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path)
    main(["info", str(folder)])
    text = capsys.readouterr().out
    # 15 of 23 images have a second object of 10 pixels next to that of 1 pixel. An image has 400 pixels.
    assert "23 samples in 5 shards" in text
    assert f"label 1 {(23 + 150) / 9200:.2%}" in text
    assert "objects    38, 0 images without any; median 1 pixels\n    1 to 15              38  ####" in text
    # At the bounds: 15 pixels are fewer than 16, and 16 are not.
    found = Contents([64], [64], np.bincount([0], minlength=256), [1, 15, 16, 63, 64, 255, 256, 1023, 1024, 4000])
    sizes = [line.split() for line in describe(load_index(folder), found).splitlines() if "#" in line]
    assert [line[:-1] for line in sizes] == [
        ["1", "to", "15", "2"], ["16", "to", "63", "2"], ["64", "to", "255", "2"], ["256", "to", "1023", "2"],
        ["1024", "and", "more", "2"],
    ]  # fmt: skip


def test_the_card_names_each_splits_shards_and_leaves_the_users_own_alone(tmp_path: Path) -> None:
    def named() -> list[dict[str, str]]:
        _, front, _ = (tmp_path / CARD).read_text().split("---\n")
        (config,) = yaml.safe_load(front)["configs"]
        return config["data_files"]

    pack_coins(tmp_path, {"val": 1})
    assert named() == [{"split": "validation", "path": "val/*.tar"}]
    # The splits of a data set may be packed one at a time.
    pack_coins(tmp_path, {"train": 1})
    assert named() == [{"split": "train", "path": "train/*.tar"}, {"split": "validation", "path": "val/*.tar"}]
    (tmp_path / CARD).write_text("# Ours\n")
    write_card(tmp_path)
    assert (tmp_path / CARD).read_text() == "# Ours\n"
    (tmp_path / CARD).unlink()
    (tmp_path / CARD).symlink_to(tmp_path / "elsewhere")
    write_card(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
