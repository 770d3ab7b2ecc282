"""`deepskip ingest`: what arrives in a folder or an object store is in the chain exactly once, whatever is killed."""

import io
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepskip.data_shards.appending import AppendError
from deepskip.data_shards.command_line import main
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.ingest import folder, items, loop
from deepskip.data_shards.ingest.files import Pairs
from deepskip.data_shards.ingest.items import Content, Item, Rules
from deepskip.data_shards.ingest.journal import Journal
from deepskip.data_shards.ingest.prefix import Prefix
from deepskip.data_shards.ingest.start import ingest
from deepskip.data_shards.inspection import verify
from deepskip.data_shards.manifest import Generation, advance_of
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.sources.split import PackError
from deepskip.data_shards.writer import write_shards
from deepskip.jobs import cli
from tests.data_shards.test_generations import die_at, in_child

LONG_AGO = 1e9


def picture(value: int, bands: int = 3) -> np.ndarray:
    rng = np.random.default_rng(value)
    return rng.integers(0, 255, (16, 20, bands), np.uint8)


def mask(value: int) -> np.ndarray:
    return (np.random.default_rng(value).random((16, 20)) > 0.8).astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, value: int, modified: float = LONG_AGO) -> None:
    """Write an image and its mask, which were last changed at a time, in seconds since 1970."""
    for kind, data in (("images", png(picture(value))), ("masks", png(255 * mask(value)))):
        # Under its own name a file is complete: one whose time changes while it is read would be read again much later.
        path = folder / kind / f".{value:03d}.part"
        path.write_bytes(data)
        os.utime(path, (modified + value, modified + value))
        path.rename(folder / kind / f"{value:03d}.png")


@pytest.fixture
def split(tmp_path: Path) -> str:
    """Pack a set of two samples, and make a folder `in` next to it."""
    made = [Sample(f"first-{value}", picture(value), mask(value)) for value in (900, 901)]
    write_shards(made, tmp_path / "data" / "train", num_classes=1)
    for kind in ("images", "masks"):
        (tmp_path / "in" / kind).mkdir(parents=True)
    return str(tmp_path / "data" / "train")


def check(split: str, values: list[int], name: str = "in") -> None:
    """Check that the chain has the samples of these values, each once and with the pixels that were written."""
    shards = Shards(split, normalize="none")
    keys = shards.index.keys(list(range(len(shards))))
    assert sorted(keys) == sorted(["first-900", "first-901", *(f"{name}_{value:03d}" for value in values)])
    for key, entry in zip(keys, shards.index.entries(list(range(len(keys)))), strict=True):
        value = int(key[-3:])
        image_HWC, mask_HW = shards.read(entry)[:2]
        np.testing.assert_array_equal(image_HWC, picture(value))
        np.testing.assert_array_equal(mask_HW, mask(value))


def journal_of(split: str) -> list[dict[str, Any]]:
    path = Path(split) / "refused.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def drain(tmp_path: Path, split: str, **options: Any) -> int:
    return ingest(
        f"folder:{tmp_path / 'in'}",
        split,
        **({"name": "in", "samples": 2, "idle_seconds": 0, "settle_seconds": 0.2} | options),
    )


def test_an_ingest_that_dies_at_any_step_takes_each_item_once(
    tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "TICK", 0.02)
    for value in range(3):
        put(tmp_path / "in", value)
    (tmp_path / "in" / "images" / "003.png").write_bytes(b"no image")
    shutil.copy(tmp_path / "in" / "masks" / "002.png", tmp_path / "in" / "masks" / "003.png")
    for kind in ("images", "masks"):
        os.utime(tmp_path / "in" / kind / "003.png", (LONG_AGO, LONG_AGO))
    moment, died, generations = 0, True, set()
    while died:
        copy = str(shutil.copytree(split, tmp_path / str(moment) / "train"))

        def work(copy: str = copy, moment: int = moment) -> None:
            die_at(moment)
            drain(tmp_path, copy)

        _, status = os.waitpid(in_child(work), 0)
        died = os.WIFSIGNALED(status)
        generations.add(len(load_index(copy).generations))
        drain(tmp_path, copy)
        check(copy, [0, 1, 2])
        assert list(verify(copy)) == []
        last = load_index(copy).generations[-1]
        assert (last.offsets, last.watermark) == ({"in": 3}, LONG_AGO + 2)
        assert [told["item"] for told in journal_of(copy)] == ["images/003.png"]
        # Every third step. It died before, between and after the two commits, and at last did not die.
        moment += 3
    assert generations == {1, 2, 3}
    assert moment > 20


def test_only_complete_files_are_read_however_they_appear(tmp_path: Path, split: str) -> None:
    place, said = tmp_path / "in", []

    def arrive() -> Iterator[str]:
        # A rename within the folder, and one from elsewhere.
        put(tmp_path / "in", 2, time.time())
        (tmp_path / "out.png").write_bytes(png(picture(1)))
        (tmp_path / "out.png").rename(place / "images" / "001.png")
        for part in (place / "masks" / ".001.png.part", place / "images" / "000.png"):
            data = png(255 * mask(1)) if part.suffix == ".part" else png(picture(0))
            if part.suffix != ".part":
                (place / "masks" / "000.png").write_bytes(png(255 * mask(0)))
            with part.open("wb") as file:
                # Longer than a file may be without a change whose writing was not observed.
                for piece in (data[:100], data[100:200], data[200:]):
                    file.write(piece)
                    file.flush()
                    yield "writing"
        (place / "masks" / ".001.png.part").rename(place / "masks" / "001.png")

    def arrive_slowly() -> None:
        for _ in arrive():
            time.sleep(0.4)

    writer = threading.Thread(target=arrive_slowly)
    started = {"folder": False}

    def say(line: str) -> None:
        said.append(line)
        if not started["folder"]:
            started["folder"] = True
            # Events are observed by now, or will be before files settle.
            threading.Timer(0.3, writer.start).start()

    (place / "images" / "alone.png").write_bytes(png(picture(5)))
    drain(tmp_path, split, idle_seconds=2, samples=100, seconds=2, say=say)
    writer.join()
    check(split, [0, 1, 2])
    assert journal_of(split) == []
    assert "1 files wait" in said[-1]


def test_what_cannot_be_used_is_listed_and_taken_once_it_is_corrected(
    tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "in"
    for value in range(5):
        put(place, value)
    (place / "images" / "000.png").write_bytes(png(picture(0))[:200])
    (place / "images" / "001.png").write_bytes(png(picture(1)[..., 0]))
    (place / "masks" / "002.png").write_bytes(png(mask(2)[:8]))
    (place / "images" / "003.tif").write_bytes(b"any")
    # Masks that are no pictures, of which one fails in an unknown way.
    for value, array in ((5, np.zeros(3)), (6, np.zeros((2, 3, 4, 5))), (7, np.zeros((16, 20), [("a", "u1")]))):
        (place / "images" / f"{value:03d}.png").write_bytes(png(picture(value)))
        np.save(place / "masks" / f"{value:03d}.npy", array)
    put(place, 8)

    def sample_of(key: str, *read: Any) -> Sample:
        return items.sample_of(key, *read) if key != "in_008" else [][len(key)]

    monkeypatch.setattr(loop, "sample_of", sample_of)
    # A pipe, which would block whoever opens it.
    os.mkfifo(place / "images" / "009.png")
    (place / "masks" / "009.png").write_bytes(b"any")
    shutil.copy(place / "images" / "004.png", place / "images" / "a.b.png")
    shutil.copy(place / "masks" / "004.png", place / "masks" / "a.b.png")
    # Names that a tar of samples cannot hold: a control character, and bytes that are not UTF-8.
    for name in (b"c\n1.png", b"d\xfc2.png", b"d\xfd2.png"):
        for kind in ("images", "masks"):
            shutil.copy(place / kind / "004.png", os.fsencode(place / kind) + b"/" + name)
    time.sleep(0.3)
    for _ in range(2):
        drain(tmp_path, split)
        found = {told["item"]: told["reason"] for told in journal_of(split)}
        assert len(journal_of(split)) == len(found) == 9
    assert "does not decode" in found["images/000.png"]
    assert found["images/005.png"].startswith("has shape (3,); a mask is")
    assert found["images/006.png"].startswith("has shape (2, 3, 4, 5); a mask is")
    assert "a mask is (height, width), of integers" in found["images/007.png"]
    assert found["images/008.png"] == "cannot be read: IndexError('list index out of range')"
    assert found["images/009.png"] == "is not a file"
    assert "has 1 bands" in found["images/001.png"]
    assert "the mask of the image is 8 x 20" in found["images/002.png"]
    assert "has the stem of" in found.get("images/003.tif", found.get("images/003.png", ""))
    keys = load_index(split).keys(list(range(load_index(split).num_samples)))
    assert sorted(keys)[2:4] == ["in_003", "in_004"]
    # A dot would end the key.
    assert [key[:7] for key in sorted(keys)[4:]] == ["in_a_b-", "in_c_1-", "in_d_2-", "in_d_2-"]
    assert len(set(keys)) == 8
    assert list(verify(split)) == []
    for value in range(3):
        put(place, value, LONG_AGO + 100)
    assert drain(tmp_path, split) == 3
    assert drain(tmp_path, split) == 0
    assert load_index(split).generations[-1].offsets == {"in": 9}
    # Other options may take what was refused.
    put(place, 10)
    (place / "masks" / "010.png").write_bytes(
        png(mask(10) * np.random.default_rng(0).integers(1, 9, (16, 20), np.uint8))
    )
    time.sleep(0.3)
    assert drain(tmp_path, split) == 0
    assert "labels above num_classes" in journal_of(split)[-1]["reason"]
    said: list[str] = []
    assert drain(tmp_path, split, say=said.append) == 0
    assert "items that these options refused before are skipped until they change" in said[1]
    assert drain(tmp_path, split, labels="binary") == 1
    shards = Shards(split, normalize="none")
    entry = shards.index.entries([len(shards) - 1])[0]
    np.testing.assert_array_equal(shards.read(entry)[1], mask(10))


def test_two_ingests_of_one_source_never_double_an_item(tmp_path: Path, split: str) -> None:
    for value in range(2):
        put(tmp_path / "in", value)

    def overtake(line: str) -> None:
        if "is the source" in line:
            assert drain(tmp_path, split) == 2

    with pytest.raises(AppendError, match="Another ingest of in has committed"):
        drain(tmp_path, split, say=overtake)
    check(split, [0, 1])


def test_sigterm_commits_what_is_complete(tmp_path: Path, split: str) -> None:
    command = ["ingest", "--from", f"folder:{tmp_path / 'in'}", "--to", str(tmp_path / "data"), "--name", "in"]
    read, write = os.pipe()

    def work() -> None:
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w", buffering=1)

        def told(samples: Iterator[Sample], *args: Any, **options: Any) -> Any:
            return write_shards(
                (sys.stdout.write(f"packs {sample.key}\n") and sample for sample in samples), *args, **options
            )

        loop.write_shards = told
        main([*command, "--samples", "100", "--seconds", "1000"])

    child = in_child(work)
    with os.fdopen(read) as said:
        assert "is the source in" in said.readline()
        for value in range(3):
            put(tmp_path / "in", value)
        while "packs in_002" not in said.readline():
            pass
        assert len(load_index(split).generations) == 1
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == 0
    check(split, [0, 1, 2])
    assert len(load_index(split).generations) == 2


class Endless:
    """A source without end; after `good` items none can be read."""

    waiting, behind = 0, True

    def __init__(self, good: int = 10**9) -> None:
        self.good = good

    def items(self) -> Iterator[Item | None]:
        for value in range(10**9):
            image = png(picture(value)) if value < self.good else b"no image"
            files = Content("png", image), Content("png", png(mask(value)))
            yield Item(f"x_{value:03d}", "x", value, 1.0, lambda files=files: files, ("x/0", value + 1))

    def again(self, item: Item, soon: bool) -> None: ...

    def close(self) -> None: ...


def test_clock_and_signals_are_heard_while_all_items_are_refused(tmp_path: Path, split: str) -> None:
    index, said = load_index(split), list[str]()
    journal = Journal(tmp_path / "refused.jsonl", "x")
    state = loop.Ingest("x", split, Endless(1), Rules(index), journal, list(index.generations), set(), {})

    def hear(line: str) -> None:
        said.append(line)
        if "generation" in line:
            threading.Timer(0.3, state.stop.set).start()

    state.say = hear
    assert loop.run(state, samples=7, seconds=0.3) == 1
    check(split, [0], "x")
    assert "refused" in said[0]
    assert "refused" in said[-1]


def test_little_is_read_ahead(tmp_path: Path, split: str) -> None:
    delivered, ahead = [0], []

    class Counted(Endless):
        def items(self) -> Iterator[Item | None]:
            for item in super().items():
                delivered[0] += 1
                yield item

    journal = Journal(tmp_path / "refused.jsonl", "x")
    index = load_index(split)
    state = loop.Ingest("x", split, Counted(), Rules(index), journal, list(index.generations), set(), {})

    def look(line: str) -> None:
        found = load_index(split)
        ahead.append(delivered[0] - (found.num_samples - 2))
        # Offsets and samples are those of one moment.
        assert found.generations[-1].offsets == {"x/0": found.num_samples - 2}
        if len(ahead) == 3:
            state.stop.set()

    state.say = look
    assert loop.run(state, samples=7) == 21
    assert max(ahead) <= loop.AHEAD
    check(split, list(range(21)), "x")


def test_an_object_store_is_a_source(tmp_path: Path, split: str, s3: Any) -> None:
    for value in range(4):
        put(tmp_path / "in", value)
    (tmp_path / "in" / "images" / "003.png").write_bytes(b"no image")
    s3.put(str(tmp_path / "in"), "bucket/in", recursive=True)
    s3.put(split, "bucket/data/train", recursive=True)
    for to in (split, "s3://bucket/data/train"):
        options: dict[str, Any] = {
            "samples": 2,
            "idle_seconds": 0,
            "poll_seconds": 0.2,
            "journal": tmp_path / "j.jsonl",
        }
        options["name"] = "in" if to == split else "out"
        assert ingest("s3://bucket/in", to, **options) == 3
        assert ingest("s3://bucket/in", to, **options) == 0
    check(split, [0, 1, 2])
    index = load_index("s3://bucket/data/train")
    assert sorted(index.keys(list(range(5))))[2:] == ["out_000", "out_001", "out_002"]
    assert index.generations[-1].offsets == {"out": 3}
    assert [json.loads(line)["item"] for line in (tmp_path / "j.jsonl").read_text().splitlines()] == [
        "images/003.png"
    ] * 2
    # What is refused is not read at each listing.
    source = Prefix("s3://bucket/in", Pairs("in", "", set(), Journal(tmp_path / "j.jsonl", "in")), 0.0, print)
    assert len([item for item in itertools.islice(source.items(), 10) if item is not None]) < 10
    put(tmp_path / "in", 3)
    s3.put(str(tmp_path / "in" / "images" / "003.png"), "bucket/in/images/003.png")
    assert ingest("s3://bucket/in", split, **(options | {"name": "in"})) == 1
    check(split, [0, 1, 2, 3])


def test_a_folder_keeps_its_name_and_bad_input_is_explained(
    tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "in", 0)
    start, to = ["ingest", "--idle_seconds", "0", "--from"], ["--to", split]
    main([*start, f"folder:{tmp_path / 'in'}", *to])
    (tmp_path / "in").rename(tmp_path / "moved")
    main([*start, f"folder:{tmp_path / 'moved'}", *to])
    assert capsys.readouterr().out.endswith("0 samples committed\n")
    foreign = tmp_path / "foreign"
    shutil.copytree(split, foreign)
    raw = json.loads((foreign / "index.json").read_text())
    (foreign / "index.json").write_text(json.dumps(raw | {"ignore_index": 254}))
    for origin, place, options, words in (
        ("in", split, [], "it must be folder:DIR, s3://"),
        ("kafka://host:9092", split, [], "it must be folder:DIR, s3://"),
        ("http://host/in", split, [], "it must be folder:DIR, s3://"),
        (f"folder:{tmp_path / 'none'}", split, [], "is not a folder"),
        (f"folder:{tmp_path}", split, [], "images and masks are in images/ and masks/"),
        (f"folder:{tmp_path / 'moved'}", split, ["--name", "a.b"], "has a dot or slash"),
        (f"folder:{tmp_path / 'moved'}", split, ["--samples", "0"], "argument --samples: 0 is not 1 or more"),
        (f"folder:{tmp_path / 'moved'}", str(foreign), [], "ignore_index is 255, but 254 in generation 0"),
        (f"folder:{tmp_path / 'moved'}", str(tmp_path / "nothing"), [], "no shards at"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*start, origin, "--to", place, *options])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    # A name with which other samples begin.
    write_shards([Sample("cam_1", picture(1), mask(1))], tmp_path / "named", num_classes=1)
    with pytest.raises(SystemExit):
        main([*start, f"folder:{tmp_path / 'moved'}", "--to", str(tmp_path / "named"), "--name", "cam"])
    assert "choose another name: --name" in capsys.readouterr().err
    # A name that makes keys of another source's name: 2_a of cam is a of cam_2.
    start += [f"folder:{tmp_path / 'moved'}", "--to", str(tmp_path / "data" / "train"), "--name"]
    main([*start, "cam_2"])
    for name in ("cam", "cam_2_a"):
        with pytest.raises(SystemExit):
            main([*start, name])
        assert "has a source cam_2, of whose name" in capsys.readouterr().err
    start = start[:4]
    monkeypatch.setitem(sys.modules, "watchdog.observers", None)
    with pytest.raises(SystemExit):
        cli.main([*start, f"folder:{tmp_path / 'moved'}", *to])
    assert "pip install '.[ingest]' in the checkout" in capsys.readouterr().err


def test_a_clock_that_is_ahead_does_not_stay_in_the_chain(tmp_path: Path, split: str) -> None:
    put(tmp_path / "in", 0, time.time() + 1e9)
    drain(tmp_path, split)
    assert load_index(split).generations[-1].watermark == pytest.approx(time.time(), abs=60)
    # Such a watermark of an earlier version is not counted.
    chain = [
        *load_index(split).generations[:1],
        Generation(1, "", {"watermark": 1e12}),
        Generation(2, "", {"watermark": 5.0}),
    ]
    assert advance_of(chain)["watermark"] == 5.0


def test_a_slow_training_is_waited_for(tmp_path: Path, split: str) -> None:
    for value in range(6):
        put(tmp_path / "in", value)
    log = tmp_path / "admissions.jsonl"
    behind = []

    def look(line: str) -> None:
        if "generation" not in line:
            return
        admitted = len(log.read_bytes().splitlines()) if log.exists() else 0
        behind.append(sum(each.samples for each in load_index(split).generations[admitted:]))

    def admit() -> None:
        for number in range(4):
            time.sleep(0.5)
            with log.open("a") as file:
                file.write(f'{{"generation": {number}}}\n')

    training = threading.Thread(target=admit)
    training.start()
    assert drain(tmp_path, split, wait_for=tmp_path, behind=1, say=look) == 6
    training.join()
    # What was allowed, and one generation that was begun then.
    assert len(behind) == 3
    assert max(behind) <= 1 + 2
    check(split, list(range(6)))
    with pytest.raises(PackError, match="is not the folder of a run"):
        drain(tmp_path, split, wait_for=tmp_path / "none")


def test_slow_items_are_waited_for_before_an_ingest_is_idle(
    tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in range(3):
        put(tmp_path / "in", value)
    read = loop.read

    def slow(item: Item, rules: Rules) -> Sample:
        time.sleep(0.6)
        return read(item, rules)

    monkeypatch.setattr(loop, "read", slow)
    assert drain(tmp_path, split) == 3
    check(split, [0, 1, 2])
