"""The audit of a run on a stream says which sample was trained in which step, and finds what is wrong."""

import csv
import json
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepskip
from deepskip import checkpoint
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.order import Slot
from deepskip.inference import build_segmenter
from deepskip.jobs import admissions, audit, cli
from deepskip.jobs.journal import read_measured
from deepskip.jobs.training import drift
from deepskip.training_step import TrainingStep
from tests.jobs.growing import begin, configured, grow


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Counter[str]]]:
    """Train on three generations, of which two come later; return the home, and the keys that each step really took."""
    home = tmp_path_factory.mktemp("audit")
    data = begin(home)
    seen: dict[int, Counter[str]] = defaultdict(Counter)
    step = TrainingStep.__call__

    def recorded(self: TrainingStep, batch: Any, *arguments: Any) -> Any:
        keys = [key for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True) if weight]
        seen[self.step + 1].update(keys)
        return step(self, batch, *arguments)

    settings: dict[str, Any] = {"run__checkpoint_every": 1, "run__keep_checkpoints": 100, "optim__learning_rate": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", recorded)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        deepskip.train(configured(home, "live", **settings))
        grow(data, 1, 7, watermark=time.time() - 100)
        deepskip.train(configured(home, "live", **settings))
        grow(data, 2, 5)
        deepskip.train(configured(home, "live", **settings))
        torch.set_num_threads(threads)
    return home, seen


def test_the_audit_has_what_the_steps_took(
    stream: tuple[Path, dict[int, Counter[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home, seen = stream
    cli.main(["audit", str(home / "runs" / "live"), "--out", str(tmp_path / "steps.csv")])
    assert capsys.readouterr().out == (
        "live: 22 samples of 3 generations, each trained exactly once in 8 steps; 5 replayed; 0 to come\n"
    )
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    found: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        found[int(row["step"])][row["key"]] += 1
    assert found == seen
    new = Counter(row["key"] for row in rows if row["replayed"] == "0")
    index = load_index(home / "data" / "train")
    assert new == Counter(index.keys(list(range(22))))
    assert {row["generation"] for row in rows if row["step"] == "4" and row["replayed"] == "0"} == {"1"}


def test_a_table_stays_until_the_next_is_whole(stream: tuple[Path, dict[int, Counter[str]]], tmp_path: Path) -> None:
    folder, table = stream[0] / "runs" / "live", tmp_path / "steps.csv"
    table.write_text("an earlier table")
    log = folder / admissions.FILE
    kept = log.read_bytes()
    log.write_bytes(b"".join(kept.splitlines(keepends=True)[:2]))
    with pytest.raises(SystemExit):
        cli.main(["audit", str(folder), "--out", str(table)])
    assert table.read_text() == "an earlier table"
    log.write_bytes(kept)
    cli.main(["audit", str(folder), "--out", str(table)])
    assert table.read_text().startswith("step,generation,sample,key,replayed")
    assert [each.name for each in tmp_path.iterdir()] == ["steps.csv"]


def test_the_audit_lists_what_is_wrong(
    stream: tuple[Path, dict[int, Counter[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stream[0] / "runs" / "live"
    log = folder / admissions.FILE
    kept, newest = log.read_bytes(), checkpoint.step_path(folder, 8)
    state = checkpoint.read(newest)
    lines = kept.splitlines(keepends=True)
    wrong = json.loads(lines[1]) | {"shards": [3, 4]}
    cases: list[tuple[bytes, int, str]] = [
        (b"".join(lines[:2]), 0, "is not the log of the checkpoint of step 8"),
        (
            lines[0] + json.dumps(wrong).encode() + b"\n" + lines[2],
            0,
            "generation 1 of .* is not the one that was admitted at",
        ),
        (
            kept.replace(b'"step": 6', b'"step": 5'),
            0,
            "generation 2 is admitted from step 5, but the segment before it ends",
        ),
        (kept, 1, r"have taken other samples than the order says \(fingerprint \d+ instead of \d+\)"),
    ]
    try:
        for text, more, words in cases:
            log.write_bytes(text)
            checkpoint.save(state | {"stream": state["stream"] | {"taken": state["stream"]["taken"] + more}}, newest)
            with pytest.raises(SystemExit) as ended:
                audit.main([str(folder)])
            assert ended.value.code == 1
            said = capsys.readouterr().out
            assert said.startswith("wrong: ")
            assert re.search(words, said), said
    finally:
        log.write_bytes(kept)
        checkpoint.save(state, newest)
    with pytest.raises(SystemExit) as ended:
        audit.main([str(folder.parent)])
    assert ended.value.code == 2
    assert "is no run" in capsys.readouterr().err


def test_samples_that_could_not_be_read_are_counted_apart(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = begin(tmp_path)
    grow(data, 1, 7)
    index = load_index(data / "train")
    [entry] = index.entries([12])
    shard = Path(index.shard_location(entry.shard))
    broken = bytearray(shard.read_bytes())
    broken[entry.image.offset + 40] ^= 255
    shard.write_bytes(broken)
    folder = tmp_path / "runs" / "live"
    folder.mkdir(parents=True)
    # The second generation comes later, and its broken sample may be replayed.
    sizes, chain = index.shard_sizes.tolist(), index.generations
    first = chain[0].shards
    log = [
        admissions.Entry(0, 0, sizes[:first], chain[0].digest),
        admissions.Entry(1, 3, sizes[first:], chain[1].digest),
    ]
    admissions.append(folder, log)
    settings = {"data__on_bad_sample": "skip", "data__when_idle": "replay", "optim__steps": 12}
    deepskip.train(configured(tmp_path, "live", **settings))
    capsys.readouterr()
    audit.main(["--run", str(folder)])
    said = capsys.readouterr().out
    assert said.startswith("live: 16 samples of 2 generations, each trained exactly once in 12 steps; ")
    assert said.endswith("; 0 to come; 1 could not be read\n")


def test_each_generation_is_measured_before_it_is_trained_on(stream: tuple[Path, dict[int, Counter[str]]]) -> None:
    """Compare the IoU of each sample with the model of the checkpoint at that step, on the whole images by numpy."""
    home, _ = stream
    folder = home / "runs" / "live"
    scores = {line["generation"]: line for line in map(json.loads, (folder / drift.SCORES).read_text().splitlines())}
    assert {number: line["step"] for number, line in scores.items()} == {1: 3, 2: 6}
    measured = {
        values["generation"]: (step, values)
        for kind, step, values, _ in read_measured(folder / "metrics.jsonl")
        if kind == "generation"
    }
    whole = Shards(home / "data" / "train")
    for number, samples in ((1, range(10, 17)), (2, range(17, 22))):
        step, values = measured[number]
        model = build_segmenter(checkpoint.read_model(checkpoint.step_path(folder, step)))
        tp = fp = fn = 0
        for place, sample in enumerate(samples):
            batch = whole[[Slot(0, sample, 1)]]
            with torch.no_grad():
                guess = model(batch["image"].float())[0, 0].numpy() > 0.5
            mask = batch["mask"][0].numpy() == 1
            own = [int(np.sum(one & other)) for one, other in ((guess, mask), (guess, ~mask), (~guess, mask))]
            expected = own[0] / sum(own) if sum(own) else 1.0
            assert scores[number]["iou"][place] == pytest.approx(expected, abs=1e-6)
            tp, fp, fn = tp + own[0], fp + own[1], fn + own[2]
        assert values["iou"] == pytest.approx(tp / (tp + fp + fn))
        assert (step, values["samples"]) == (scores[number]["step"], len(samples))
    assert 100 <= measured[1][1]["lag_seconds"] < 400
    # At the end of the run nothing is behind; after the first step of 5 samples, of which it takes 3, two are.
    behind = {step: values["samples_behind"] for kind, step, values, _ in read_measured(folder / "metrics.jsonl")
              if kind == "stream" and "samples_behind" in values}  # fmt: skip
    assert (behind[1], behind[3], behind[4], behind[7], behind[8]) == (6, 0, 4, 2, 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_drop_is_found_within_one_generation_and_a_rise_is_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    detector = drift.DriftDetector()

    def scores(mean: float) -> list[float]:
        return [float(score) for score in rng.normal(mean, 0.15, 64).clip(0, 1)]

    # It learns in 10 generations, and is good in 20.
    assert not any(detector.add(number, scores(min(0.8, number / 10))) for number in range(30))
    found = {number: drop for number in (30, 31) if (drop := detector.add(number, scores(0.4)))}
    assert found
    [(number, drop)] = found.items()
    assert number == 30
    assert drop.generation == 30
    assert (drop.before, drop.after) == (pytest.approx(0.8, abs=0.05), pytest.approx(0.4, abs=0.1))


def test_the_division_is_that_of_the_least_squares() -> None:
    scores, generations = [0.9, 0.8, 0.9, 0.8, 0.2, 0.2, 0.3, 0.2], [3, 3, 4, 4, 4, 5, 5, 6]

    def left(k: int) -> float:
        return float(np.var(scores[:k]) * k + np.var(scores[k:]) * (8 - k))

    # Between samples it would be the fourth place, and between generations it is the fifth.
    assert min(range(1, 8), key=left) == 4
    assert min((2, 5, 7), key=left) == 5
    found = drift.division(list(zip(generations, scores, strict=True)))
    assert found == (5, pytest.approx(3.6 / 5), pytest.approx(0.7 / 3))
    assert drift.division([(4, score) for score in scores]) == (4, pytest.approx(0.85), pytest.approx(0.225))


def test_without_river_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(drift.MissingRiver, match=r"pip install '\.\[stream\]'"):
        drift.DriftDetector()
