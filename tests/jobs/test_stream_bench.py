"""The benchmarks of streams: their data, the committed generations and the tables, without a training."""

from pathlib import Path

import numpy as np

from deepskip.data_shards.index import load_index
from deepskip.jobs.bench import arrivals, drift, stream_picture
from deepskip.jobs.bench.drift import Row


def test_generations_that_share_a_shard_are_a_whole_chain(tmp_path: Path) -> None:
    writer = arrivals.prepared(tmp_path, 3)
    for _ in range(4):
        writer.commit()
    # The reader checks every manifest, digest and samples file.
    index = load_index(str(writer.split))
    assert [each.samples for each in index.generations] == [drift.SAMPLES, 3, 3, 3, 3]
    last = [index.shard(number) for number in range(1, len(index.shards))]
    assert len({shard.name for shard in last}) == 4
    inodes = {(writer.split / shard.name).stat().st_ino for shard in last}
    assert len(inodes) == 1


def test_inverted_discs_are_the_same_discs() -> None:
    for plain, inverted in zip(drift.discs(3, 1, False), drift.discs(3, 1, True), strict=True):
        assert plain.key == inverted.key
        np.testing.assert_array_equal(plain.mask_HW, inverted.mask_HW)
        bright, dark = plain.image_HWC[..., 0].astype(float), inverted.image_HWC[..., 0].astype(float)
        inside = plain.mask_HW > 0
        # What is clipped differs, and rounding by 1.
        assert np.abs(bright + dark - 255)[(bright > 0) & (bright < 255)].max() <= 1
        assert bright[inside].mean() > bright[~inside].mean() + 20


def test_the_verdict_names_every_alarm_and_the_recovery() -> None:
    scores = [0.8] * 9 + [0.1, 0.5, 0.75, 0.77]
    rows = [
        Row(7, number, number >= 10, 64, iou, 0.1, iou, {4: 4, 11: 10}.get(number))
        for number, iou in enumerate(scores, 1)
    ]
    assert drift.verdict(rows, 10) == (
        "seed 7: IoU 0.800 in the 5 generations before 10, 0.100 in 10, 95 % of it again in 13, 0.770 in 13; "
        "alarms: with generation 4 (began in 4), with generation 11 (began in 10)"
    )
    assert "not 95 % of it again" in drift.verdict(rows[:-1], 10)


def test_the_picture_in_the_docs_is_the_one_that_is_drawn() -> None:
    assert stream_picture.PICTURE.read_text(encoding="utf-8") == stream_picture.picture()


def test_stored_rows_are_read_back_and_drawn(tmp_path: Path) -> None:
    rows = [Row(s, g, g > 1, 64, g / 4, 0.25, 0.5, 2 if g == 2 else None) for s in (0, 1) for g in range(4)]
    drift.write(rows, tmp_path / "drift.csv")
    assert drift.stored(tmp_path / "drift.csv") == rows
    drift.main(["--redraw", "--begin", "2", "--out", str(tmp_path)])
    assert "contrast inverted" in (tmp_path / "drift.svg").read_text()
