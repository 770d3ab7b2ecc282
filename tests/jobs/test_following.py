"""A training follows a growing data set: each sample once, and the same losses as with the log and all data at once."""

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import deepskip
from deepskip import checkpoint
from deepskip.data_shards import polling, storage
from deepskip.data_shards.admission import Admission, StreamOrder
from deepskip.data_shards.appending import append_split
from deepskip.data_shards.index import load_index
from deepskip.jobs import admissions, audit, journal, report, runs, train
from deepskip.jobs.training import follower
from tests.jobs.growing import admitted, begin, command, configured, done, grow, losses, packed, started, wait_for


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def in_thread(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def at_once(home: Path, name: str, log: Path, **settings: Any) -> dict[int, float]:
    """Train with the admission log of another run, when all data is there; return the losses."""
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    shutil.copy(log / admissions.FILE, folder)
    deepskip.train(configured(home, name, **settings))
    assert admitted(folder) == admitted(log)
    return losses(folder)


def test_a_run_that_grows_stops_and_crashes_has_the_losses_of_one_that_gets_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = begin(tmp_path), tmp_path / "runs" / "live"
    settings = {"data__when_idle": "wait", "run__checkpoint_every": 4, "run__keep_checkpoints": 100}

    # 10 samples are 3 steps. Later segments take 3 new samples a step and replay one.
    def first_part() -> None:
        wait_for(lambda: done(folder) >= 3)
        grow(data, 1, 7)
        wait_for(lambda: done(folder) >= 6)
        # Nothing is new, so the ranks wait, and a signal is heard.
        os.kill(os.getpid(), signal.SIGTERM)

    writer = in_thread(first_part)
    with pytest.raises(SystemExit) as stopped:
        train.train_here(configured(tmp_path, "live", **settings), "live")
    writer.join()
    assert stopped.value.code == 143
    assert admitted(folder) == [(0, 0), (1, 3)]
    assert checkpoint.newest(folder)[0]["step"] == 6  # type: ignore[index]

    line = report.progress_line

    def crash(step: int, *arguments: Any) -> str:
        if step == 10:
            raise KeyboardInterrupt
        return line(step, *arguments)

    # Two generations at once make one segment of 4 steps, in which the run dies.
    grow(data, 2, 8)
    grow(data, 3, 4)
    monkeypatch.setattr(report, "progress_line", crash)
    with pytest.raises(KeyboardInterrupt):
        deepskip.train(configured(tmp_path, "live", **settings))
    monkeypatch.setattr(report, "progress_line", line)
    assert admitted(folder) == [(0, 0), (1, 3), (2, 6), (3, 6)]
    kept = checkpoint.newest(folder)[0]
    assert kept is not None
    assert (kept["step"], kept["stream"]["admissions"].tolist()) == (8, [[0, 0], [1, 3], [2, 6], [3, 6]])

    # What is appended meanwhile waits for the end of the segment.
    grow(data, 4, 2)
    summary = deepskip.train(configured(tmp_path, "live", data__when_idle="end"))
    assert admitted(folder)[4:] == [(4, 10)]
    assert summary["steps"] == 11
    found = losses(folder)
    assert sorted(found) == list(range(1, 12))
    assert found == at_once(tmp_path, "again", folder)
    ends = [checkpoint.newest(tmp_path / "runs" / name)[0] for name in ("live", "again")]
    left, right = (end["model"] for end in ends if end)
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    # A checkpoint has the log from before its first use.
    for path in checkpoint.step_paths(folder):
        state = checkpoint.read(path)
        known = [entry for entry in admitted(folder) if entry[1] < state["step"]]
        assert [tuple(entry) for entry in state["stream"]["admissions"].tolist()][: len(known)] == known

    # A finished run continues when there is more, and not before.
    assert deepskip.train(configured(tmp_path, "live", data__when_idle="end")) == summary
    grow(data, 5, 3)
    assert deepskip.train(configured(tmp_path, "live", data__when_idle="end"))["steps"] == 12
    assert admitted(folder)[5:] == [(5, 11)]


def test_while_it_is_idle_it_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = begin(tmp_path), tmp_path / "runs" / "live"
    settings = {"data__when_idle": "replay", "data__replay": 0.0, "run__log_every": 3, "optim__steps": 20}
    line = report.progress_line

    def grown(step: int, *arguments: Any) -> str:
        if step == 9:
            grow(data, 1, 5)
            time.sleep(0.3)
        return line(step, *arguments)

    monkeypatch.setattr(report, "progress_line", grown)
    deepskip.train(configured(tmp_path, "live", **settings))
    monkeypatch.setattr(report, "progress_line", line)
    # It looks every 3 steps after the first segment's 3.
    assert admitted(folder) in ([(0, 0), (1, 9)], [(0, 0), (1, 12)])
    # Loader processes begin anew with each segment.
    again = at_once(tmp_path, "again", folder, data__loader_workers=1, **settings)
    assert losses(folder) == again
    assert sorted(again) == [3, 5, 6, 9, 10, 12, 15, 18, 20]


def test_the_log_is_restored_from_the_checkpoint_and_other_logs_and_data_are_refused(tmp_path: Path) -> None:
    data, folder = begin(tmp_path), tmp_path / "runs" / "live"
    deepskip.train(configured(tmp_path, "live"))
    grow(data, 1, 5)
    settings = {"optim__steps": 4}
    deepskip.train(configured(tmp_path, "live", optim__schedule="constant"))
    log = folder / admissions.FILE
    kept = log.read_bytes()
    assert len(admissions.read(folder)) == 2
    # As after a crash: one line is lost, and so is the summary.
    log.write_bytes(kept.splitlines(keepends=True)[0])
    (folder / runs.SUMMARY).unlink()
    deepskip.train(configured(tmp_path, "live"))
    assert log.read_bytes() == kept
    (folder / runs.SUMMARY).unlink()
    log.write_bytes(kept.replace(b'"step": 3', b'"step": 4'))
    with pytest.raises(ValueError, match="line 2 is not what the newest checkpoint has"):
        deepskip.train(configured(tmp_path, "live"))
    log.write_bytes(kept + b"{}\n")
    with pytest.raises(ValueError, match="line 3 is not one that DeepSkip writes"):
        deepskip.train(configured(tmp_path, "live"))
    log.write_bytes(kept)
    manifest = data / "train" / "manifest" / "00000001.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"was trained on generation 1: .* has changed since"):
        deepskip.train(configured(tmp_path, "live"))
    with pytest.raises(ValueError, match="other settings"):
        deepskip.train(configured(tmp_path, "live", data__replay=0.5, **settings))
    # Two processes would each begin where the other one did.
    entry = admissions.Entry(1, 9, [1], "0" * 64)
    with pytest.raises(admissions.OtherLog, match="has 2 generations where this training knows 1"):
        admissions.append(folder, [entry])
    assert journal.whole_lines(log)[-1][0] == 2


def test_a_crash_between_the_log_and_its_use_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = begin(tmp_path), tmp_path / "runs" / "live"
    deepskip.train(configured(tmp_path, "live"))
    grow(data, 1, 7)

    def crash(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(follower, "extended", crash)
        with pytest.raises(KeyboardInterrupt):
            deepskip.train(configured(tmp_path, "live"))
    assert admitted(folder) == [(0, 0), (1, 3)]
    # The next entry was cut off, and its generation is admitted once more, after the segment that stands in the log.
    with (folder / admissions.FILE).open("ab") as log:
        log.write(b'{"generation": 2, "step"')
    grow(data, 2, 3)
    deepskip.train(configured(tmp_path, "live"))
    assert admitted(folder) == [(0, 0), (1, 3), (2, 6)]
    assert audit.audit(folder) == audit.Audit([], 20, 20, 4, 0, 7, 3, 0)
    assert losses(folder) == at_once(tmp_path, "again", folder)


def test_over_s3_and_through_an_outage(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, split = begin(tmp_path), "s3://bucket/data/train"
    s3.put(f"{data}/", "bucket/data/", recursive=True)
    settings: dict[str, Any] = {
        "data__path": "s3://bucket/data", "data__cache_dir": str(tmp_path / "cache"), "data__idle_seconds": 1.0,
    }  # fmt: skip
    asked: list[int] = []
    look = polling.following

    def unreachable(*arguments: Any) -> Any:
        asked.append(1)
        if len(asked) in (2, 3):
            raise storage.StorageError("no route to host")
        return look(*arguments)

    line = report.progress_line

    def grown(step: int, *arguments: Any) -> str:
        if step == 3:
            append_split(split, packed(tmp_path / "more", 100, 5))
        return line(step, *arguments)

    monkeypatch.setattr(polling, "following", unreachable)
    monkeypatch.setattr(report, "progress_line", grown)
    deepskip.train(configured(tmp_path, "live", **settings))
    monkeypatch.setattr(report, "progress_line", line)
    folder = tmp_path / "runs" / "live"
    assert admitted(folder) == [(0, 0), (1, 3)]
    said = capsys.readouterr().out
    assert said.count(f"cannot look for new generations of {split}, trying again: no route to host") == 1
    assert losses(folder) == at_once(tmp_path, "again", folder, **settings)
    # A manifest that continues no chain ends the run, with the reason.
    s3.pipe_file("bucket/data/train/manifest/00000002.json", b"{}")
    with pytest.raises(ValueError, match=r"00000002\.json cannot be read: it is not a manifest"):
        deepskip.train(configured(tmp_path, "live", data__when_idle="wait", **settings))


def test_settings_that_do_not_fit() -> None:
    for settings, words in (
        ({"data__follow": False, "data__replay": 0.0}, "optim.steps is null; only a training with data.follow"),
        ({"data__follow": False, "optim__steps": 5}, r"data\.replay is 0\.25; it needs data\.follow"),
        ({"optim__schedule": "cosine"}, "optim.steps is null and optim.schedule cosine"),
        ({"data__fixed_lanes": True}, r"data\.fixed_lanes is true"),
    ):
        with pytest.raises(ValueError, match=words):
            deepskip.train(configured(Path("nowhere"), "none", **settings))  # type: ignore[arg-type]


def test_two_ranks_under_torchrun(tmp_path: Path) -> None:
    """Check that ranks that wait longer than the collective timeout live, and that a killed rank changes nothing."""
    data, folder = begin(tmp_path), tmp_path / "runs" / "live"
    settings = {"cluster__collective_timeout": 3, "run__checkpoint_every": 3}

    def ranks(process: Any) -> list[psutil.Process]:
        assert process.poll() is None, process.communicate()[0]
        return sorted(psutil.Process(process.pid).children(), key=lambda each: each.pid)

    process = started(command(tmp_path, "live", 2, data__when_idle="wait", **settings))
    wait_for(lambda: done(folder) >= 3 or process.poll())
    time.sleep(5)
    grow(data, 1, 7)
    wait_for(lambda: done(folder) >= 6 or process.poll())
    for number in (2, 3, 4):
        grow(data, number, 7)
    wait_for(lambda: done(folder) >= 8 or process.poll())
    ranks(process)[1].kill()
    text = process.communicate(timeout=60)[0]
    assert process.returncode, text

    process = started(command(tmp_path, "live", 2, data__when_idle="wait", **settings))
    assert process.stdout is not None
    for line in process.stdout:
        waits = re.match(r"step (\d+)  waiting", line)
        if waits and len(admitted(folder)) == 5 and int(waits[1]) > admitted(folder)[-1][1]:
            break
    # Only one rank is asked, while both wait.
    ranks(process)[1].terminate()
    text = process.communicate(timeout=60)[0]
    assert process.returncode, text
    assert "as requested; its checkpoint is written" in text, text

    found = losses(folder)
    assert [generation for generation, _ in admitted(folder)] == [0, 1, 2, 3, 4]
    assert sorted(found) == list(range(1, max(found) + 1))
    assert audit.audit(folder).trained == 38
    # The fp32 sums of one rank are in another order.
    assert found == pytest.approx(at_once(tmp_path, "one", folder), rel=1e-4)
    again = tmp_path / "runs" / "two"
    again.mkdir()
    shutil.copy(folder / admissions.FILE, again)
    process = started(command(tmp_path, "two", 2))
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0, text
    assert losses(again) == found


def test_a_stream_reads_the_samples_of_its_order(tmp_path: Path) -> None:
    """Check the keys that are read against the order and the whole index, computed anew, and that memory is bounded."""
    from deepskip.data_shards.dataset import Shards
    from deepskip.data_shards.growing import stream_batches
    from deepskip.data_shards.manifest import read_chain
    from deepskip.data_shards.window import extended, shortened, window_of

    data = begin(tmp_path)
    split = str(data / "train")
    shards = Shards(split)
    shards.index = window_of(shards.index)
    order = StreamOrder(5, [Admission(0, 0)], [[3, 3, 3, 1]], 4, 2, 2, 0.25, 2)
    for number in range(1, 7):
        grow(data, number, 2 + number)
    chain = read_chain(split, list(load_index(split, generations=1).generations))
    whole = load_index(split)
    seen: list[str] = []
    step = 0
    while True:
        for batch in stream_batches(shards, order, step, order.next_step, 0, 1):
            expected = [slot.sample for slot in order.slots(step, 0, 1)]
            assert batch["sample"] == expected
            assert batch["key"] == whole.keys(expected)
            mean, _ = whole.statistics_of(expected)
            assert np.array_equal(batch["mean"].numpy(), mean)
            pixels = [image.permute(1, 2, 0).double().mean((0, 1)) for image in batch["image"]]
            assert np.allclose(torch.stack(pixels).numpy(), mean, atol=1e-3)
            seen += [key for key, epoch, weight in zip(batch["key"], batch["epoch"], batch["weight"], strict=True)
                     if weight and epoch < 2**30]  # fmt: skip
            step += 1
        new = chain[len(order) : len(order) + 2]
        if not new:
            break
        shards.index = shortened(extended(shards.index, new), new[0].number - 2)  # type: ignore[arg-type]
        order.admit(
            [Admission(each.number, step) for each in new],
            [[shard["samples"] for shard in each.raw["shards"]] for each in new],
        )
        # Of the generations before, only those that can be replayed stay.
        assert shards.index.parts[0].generations.stop > new[0].number - 2  # type: ignore[attr-defined]
    assert sorted(seen) == sorted(whole.keys(list(range(whole.num_samples))))
