"""A run notices that its data changed, and only then."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepskip.data_shards.command_line import main
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.index import load_index, save_index
from deepskip.data_shards.labels import Labels
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from deepskip.identity import changes, name_of, refusal


def packed(folder: Path, count: int = 8, first: int = 0, per_shard: int = 4) -> Path:
    made = [
        Sample(f"s{i}", np.full((8, 8, 2), 9 * i, np.uint8), np.eye(8, dtype=np.uint8))
        for i in range(first, first + count)
    ]
    write_shards(made, folder, num_classes=1, samples_per_shard=per_shard)
    return folder


def test_the_same_samples_are_the_same_data_wherever_they_lie(tmp_path: Path) -> None:
    one, other = (load_index(packed(tmp_path / name)) for name in ("a", "b"))
    assert identity_of(one) == identity_of(other)
    main(["index", str(tmp_path / "b"), "--workers", "1"])
    assert identity_of(load_index(tmp_path / "b")) == identity_of(one)
    # Sums in another order.
    assert identity_of(replace(one, std=tuple(np.nextafter(one.std, 0).tolist()))) == identity_of(one)
    save_index(replace(one, base="s3://elsewhere", source="x"), tmp_path / "a")
    assert identity_of(load_index(tmp_path / "a")) == identity_of(one)


def test_each_change_has_its_name(tmp_path: Path) -> None:
    index = load_index(packed(tmp_path / "a"))
    before = {"train": identity_of(index), "val": identity_of(index)}
    more = load_index(packed(tmp_path / "more", 12))
    cases = [
        (more, "samples 12 instead of 8, shards 3 instead of 2, other contents, other statistics"),
        (load_index(packed(tmp_path / "other", first=1)), "other contents, other statistics"),
        (load_index(packed(tmp_path / "cut", per_shard=6)), "other contents"),
        (load_index(packed(tmp_path / "cut_more", per_shard=3)), "shards 3 instead of 2, other contents"),
        (replace(index, mean=(1.0, 2.0)), "other statistics"),
        (replace(index, labels=Labels(True, 1, None)), "other reading"),
        (replace(index, ignore_index=7), "ignore_index 7 instead of 255"),
        (replace(index, num_classes=3), "num_classes 3 instead of 1"),
    ]
    names = set()
    for changed, words in cases:
        now = before | {"val": identity_of(changed)}
        assert changes(before, now) == f"val has {words}"
        names.add(name_of(now))
        # The name that the refusal prints, and no other, lets a run resume, if its network fits.
        said = refusal(before, now, None) or ""
        assert said.startswith(f"was trained on other data (val has {words})")
        assert refusal(before, now, name_of(before)) == said
        if "num_classes" in words:
            assert refusal(before, now, name_of(now)) == said
        else:
            assert said.endswith(f"--data.accept {name_of(now)}")
            assert refusal(before, now, name_of(now)) is None
    assert len(names) == len(cases)
    assert refusal(before, before, None) is None


@pytest.mark.parametrize(("tars", "words"), [("x", ""), ("y", "train has other tars")])
def test_what_an_earlier_version_recorded(tmp_path: Path, tars: str, words: str) -> None:
    now = {"train": identity_of(load_index(packed(tmp_path / "a"))) | {"tars": tars}}
    assert changes({"train": "x", "val": "z"}, now) == words
    # Ranks do not know that digest, and a later version may record more.
    assert changes({"train": "x"}, {"train": {k: v for k, v in now["train"].items() if k != "tars"}}) == ""
    assert changes({"train": now["train"] | {"bytes": 7}}, now) == ""
    # A record without an entry that this version knows is of a version that did not compare it.
    assert changes({"train": {"samples": 8}}, now) == ""
