"""A split is a chain of generations: appends of many writers, killed at any moment, lose and double nothing."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from werkzeug.datastructures import Headers

from deepskip.data_shards import commit, storage
from deepskip.data_shards.appending import AppendError, append_split, staging
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.entries import FORMATS, SCHEMA, STORED
from deepskip.data_shards.identity import identity_of
from deepskip.data_shards.index import BrokenIndex, load_index, save_index
from deepskip.data_shards.inspection import verify
from deepskip.data_shards.order import Slot
from deepskip.data_shards.polling import ChainPoller
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.strays import remove, strays
from deepskip.data_shards.stream import train_batches
from deepskip.data_shards.writer import write_shards
from deepskip.identity import GROWING, beginning, generations


def sample(name: str, value: int) -> Sample:
    image = np.full((16, 16, 2), value, np.uint8)
    image[0, 0] = 255 - value
    return Sample(name, image, np.eye(16, dtype=np.uint8))


def packed(folder: Path, names: list[str], per_shard: int = 2, source: str | None = None) -> Path:
    made = [sample(name, sum(name.encode()) % 251) for name in names]
    write_shards(made, folder, num_classes=1, samples_per_shard=per_shard, source=source)
    return folder


def append(split: str, writer: str, number: int, count: int = 3, **options: Any) -> Any:
    with staging(split) as folder:
        names = [f"{writer}-{number}-{i}" for i in range(count)]
        return append_split(split, packed(folder / "train", names, source=f"{writer} {number}"), **options)


def write_many(split: str, writer: str, count: int, samples: int = 3) -> None:
    """Commit `count` generations, as one of several writers."""
    chain = None
    for number in range(count):
        chain = append(split, writer, number, samples, chain=chain, repeated_keys=True).chain


def two_writers(split: str, count: int, samples: int = 1) -> float:
    """Let two processes commit `count` generations each at once; return the seconds."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(split, name, count, samples)) for name in "ab"]
    started = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return time.monotonic() - started


def check_two_writers(split: str, count: int, cache: storage.Cache | None = None) -> None:
    """Check that each commit of `two_writers` is in the chain exactly once, and nothing else is there."""
    index = load_index(split, cache)
    assert Counter(each.raw["source"] for each in index.generations) == Counter(
        [None, *(f"{name} {number}" for name in "ab" for number in range(count))]
    )
    keys = index.keys(list(range(index.num_samples)))
    assert sorted(keys) == sorted(["first", *(f"{name}-{number}-0" for name in "ab" for number in range(count))])
    # Each writer's commits are in its order.
    for name in "ab":
        own = [each.raw["source"] for each in index.generations if str(each.raw["source"]).startswith(name)]
        assert own == [f"{name} {number}" for number in range(count)]
    assert strays(split) == []


def test_two_writers_on_a_file_system(tmp_path: Path) -> None:
    split = packed(tmp_path / "train", ["first"])
    two_writers(str(split), 20)
    check_two_writers(str(split), 20)
    assert list(verify(split)) == []


@pytest.fixture
def answers(s3: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Any], None]]:
    """Make moto keep conditional puts, and let a test change a request before it or after it.

    Moto by itself looks and then writes, so that of two writers at once both may succeed.
    """
    from moto.s3.responses import S3Response

    lock = threading.Lock()
    changes: dict[str, Callable[[Any], None]] = {}
    put = S3Response.put_object

    def locked(self: Any) -> Any:
        with lock:
            changes.get("before", lambda response: None)(self)
            answer = put(self)
            changes.get("after", lambda response: None)(self)
            return answer

    monkeypatch.setattr(S3Response, "put_object", locked)
    return changes


def uploaded(s3: Any, split: Path, name: str) -> str:
    s3.put(str(split), f"bucket/{name}/train", recursive=True)
    return f"s3://bucket/{name}/train"


def test_two_writers_on_an_object_store(tmp_path: Path, s3: Any, answers: Any) -> None:
    split = uploaded(s3, packed(tmp_path / "train", ["first"]), "two")
    cache = storage.Cache(tmp_path / "cache", 10**9)
    two_writers(split, 5)
    check_two_writers(split, 5, cache)
    assert list(verify(split, cache)) == []


def test_an_answer_that_is_lost_commits_once(tmp_path: Path, s3: Any, answers: Any) -> None:
    split = uploaded(s3, packed(tmp_path / "train", ["first"]), "lost")
    failures = []

    def fail(response: Any) -> None:
        if "manifest" in response.parse_key_name() and len(failures) < 2:
            failures.append(response.parse_key_name())
            raise OSError("the answer is lost")

    answers["after"] = fail
    assert append(split, "a", 0).generation.number == 1
    assert len(failures) == 1
    assert [each.number for each in load_index(split).generations] == [0, 1]


def test_a_store_that_ignores_the_condition_is_refused(
    tmp_path: Path, s3: Any, answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = uploaded(s3, packed(tmp_path / "train", ["first"]), "ignoring")
    monkeypatch.setattr(commit, "_refusing", set())

    def ignore(response: Any) -> None:
        response.headers = Headers([each for each in response.headers.items() if each[0] != "If-None-Match"])

    answers["before"] = ignore
    with pytest.raises(storage.StorageError, match="ignores conditional writes"):
        append(split, "a", 0)
    assert s3.ls("bucket/ignoring/train", refresh=True, detail=False) == s3.ls("bucket/ignoring/train", detail=False)
    assert len(load_index(split).generations) == 1


def test_a_denial_is_the_end_of_a_chain_only_if_the_rest_is_readable(
    tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the right to list, S3 denies a file that does not exist; with expired credentials it denies every file."""
    split = uploaded(s3, packed(tmp_path / "train", ["first"]), "denied")
    (first,) = load_index(split).generations
    allowed, read = ["index.json"], storage.read_bytes

    def answer(location: str) -> bytes:
        if not location.endswith(tuple(allowed)):
            raise PermissionError("The provided token has expired.")
        return read(location)

    monkeypatch.setattr(storage, "read_bytes", answer)
    said: list[str] = []
    poller = ChainPoller(split, first.raw, first, 0.0, said.append)
    poller.look()
    allowed.clear()
    with pytest.raises(storage.StorageError, match=r"access is denied .*token has expired.*Check the credentials"):
        poller.look()
    poller.start()
    while not said:
        time.sleep(0.01)
    assert poller.looks == 0
    poller.close()
    assert "trying again" in said[0]


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = packed(tmp_path / "train", ["first"])

    def link(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(storage.StorageError, match="without hard links"):
        append(str(split), "a", 0)
    monkeypatch.undo()
    # The shards are left: after an error of the last step, a commit may have happened.
    assert len(strays(str(split))) == 3
    assert len(load_index(split).generations) == 1


def in_child(work: Callable[[], None]) -> int:
    """Run in a fork, which ends without cleaning up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def die_at(moment: int) -> None:
    """Make this process kill itself before one of the calls that make files durable or visible."""
    passed = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if passed[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            passed[0] += 1
            return call(*args, **kwargs)

        return called

    for name in ("fsync", "link", "rename", "replace", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_writer_that_dies_at_any_step_leaves_whole_generations(tmp_path: Path) -> None:
    base = packed(tmp_path / "base", ["first"])
    moment, died, counts = 0, True, Counter[tuple[int, bool]]()
    while died:
        split = Path(shutil.copytree(base, tmp_path / str(moment)))

        def work(split: Path = split, moment: int = moment) -> None:
            die_at(moment)
            append(str(split), "w", 0)

        _, status = os.waitpid(in_child(work), 0)
        died = os.WIFSIGNALED(status)
        committed = len(load_index(split).generations) == 2
        assert list(verify(split)) == []
        # The same command once more appends what is missing, and only that.
        repeated = append(str(split), "w", 0).repeated
        assert repeated == committed
        left = strays(str(split))
        counts[len(left), committed] += 1
        check_finished(split, [f"w-0-{i}" for i in range(3)])
        moment += 1
    # It died before and after the commit, with and without shards in place, and at last did not die.
    assert {committed for _, committed in counts} == {False, True}
    assert len({number for number, _ in counts}) > 3
    assert moment > 10


def check_finished(split: Path, names: list[str]) -> None:
    """Check that each sample is there once and whole, and that what dead writers left can be removed."""
    index = load_index(split)
    assert sorted(index.keys(list(range(index.num_samples)))) == sorted(["first", *names])
    assert list(verify(split)) == []
    left = strays(str(split))
    assert remove(left, hours=1) == []
    assert remove(left, hours=-1) == left
    assert strays(str(split)) == []
    assert list(verify(split)) == []
    known = {"index.json", "manifest", *(shard.name for shard in index.shards)}
    known |= {each.raw["samples"]["file"] for each in index.generations}
    assert {path.name for path in split.iterdir()} == known


def test_writers_killed_at_random_moments(tmp_path: Path) -> None:
    split = packed(tmp_path / "train", ["first"])
    rng = np.random.default_rng(0)
    for _ in range(5):
        children = [in_child(lambda name=name: write_many(str(split), name, 6)) for name in "ab"]
        for child in children:
            time.sleep(rng.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            load_index(split)
    for name in "ab":
        write_many(str(split), name, 6)
    # Strays for certain, whenever the kills came.
    (split / f"shard-{'0' * 32}-000000.tar").touch()
    check_finished(split, [f"{name}-{number}-{i}" for name in "ab" for number in range(6) for i in range(3)])


def chain_of(folder: Path) -> Path:
    """Make a chain of generations of 5, 3, 4 and 1 samples."""
    split = packed(folder, [f"first-{i}" for i in range(5)])
    for number, count in enumerate((3, 4, 1)):
        append(
            str(split), "later", number, count, watermark=100.0 + number, offsets={"topic": number, f"f{number}": "x"}
        )
    return split


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_chain_is_one_split(tmp_path: Path, world_size: int, lanes: int) -> None:
    shards = Shards(chain_of(tmp_path / "train"), crops=Crops(16, 0.0, 0))
    names = [f"first-{i}" for i in range(5)] + [f"later-{n}-{i}" for n, c in enumerate((3, 4, 1)) for i in range(c)]
    assert shards.index.keys(list(range(13))) == names
    found: dict[int, list[str]] = {0: [], 1: []}
    for rank in range(world_size):
        for batch in train_batches(shards, 7, 4, 0, rank, world_size, window=2, lanes=lanes, last_step=8):
            for i, key in enumerate(batch["key"]):
                value = sum(key.encode()) % 251
                image = batch["image"][i].numpy()
                assert (image[:, 0, 0] == 255 - value).all()
                assert (image[:, 1:] == value).all()
                pixels = np.array([value] * 255 + [255 - value], np.float64)
                np.testing.assert_allclose(batch["mean"][i], [pixels.mean()] * 2, rtol=1e-6)
                np.testing.assert_allclose(batch["std"][i], [pixels.std()] * 2, rtol=1e-5)
                if batch["weight"][i]:
                    found[batch["epoch"][i]].append(key)
    # Each sample once an epoch, whatever its generation.
    assert sorted(found[0]) == sorted(found[1]) == sorted(names)


def test_the_beginning_of_a_chain_is_the_set_that_it_was(tmp_path: Path) -> None:
    split = packed(tmp_path / "train", [f"first-{i}" for i in range(5)])
    states = [load_index(split)]
    for number in range(3):
        append(str(split), "later", number)
        states.append(load_index(split))
    identities = [identity_of(index) for index in states]
    assert "generations" not in identities[0]
    for number, index in enumerate(states):
        part = load_index(split, generations=number + 1)
        assert part.samples.equals(index.samples)
        assert part.shards == index.shards
        assert identity_of(part) == identities[number]
        assert generations(identities[number]) == number + 1
        # Statistics, by which images are normalised, are those of generation 0.
        assert {key: value for key, value in identities[number].items() if key not in GROWING} == {
            key: value for key, value in identities[0].items() if key not in GROWING
        }
        for later in identities[number:]:
            assert beginning({"train": identities[number]}, {"train": later}) == {"train": identities[number]}
        for earlier in identities[:number]:
            assert beginning({"train": identities[number]}, {"train": earlier}) == {"train": earlier}
    with pytest.raises(BrokenIndex, match="has 4 generations where 5 are needed"):
        load_index(split, generations=5)
    other = packed(tmp_path / "other", [f"other-{i}" for i in range(5)])
    append(str(other), "later", 0)
    now = {"train": identity_of(load_index(other))}
    assert beginning({"train": identities[0]}, now) == now


def test_a_broken_chain_is_an_error(tmp_path: Path) -> None:
    split = chain_of(tmp_path / "train")
    path = split / "manifest" / "00000002.json"
    text = path.read_text()
    raw = json.loads(text)
    cases = [
        (json.dumps(raw | {"watermark": 7.5}), "00000003.json is generation 3 of another chain"),
        (json.dumps(raw | {"number": 3}), "00000002.json is generation 3 of another chain"),
        (json.dumps(raw | {"previous": "0" * 64}), "00000002.json is generation 2 of another chain"),
        (json.dumps(raw | {"watermark": "now"}), "it.watermark is 'now'; it must be seconds since 1970, or null"),
        (json.dumps(raw | {"offsets": {"topic": 1.5}}), "it.offsets is"),
        (json.dumps(raw | {"commit": "../x"}), "it.commit is '../x'"),
        (json.dumps(raw | {"version": 2}), "it has version 2; this reads 1. Install a later"),
        (json.dumps(raw | {"bands": 3, "mean": [0] * 3, "std": [1] * 3, "percentiles": None}), "bands is 3, but 2 in"),
        (json.dumps(raw | {"shards": [raw["shards"][0]] * 2}), "00000002.json names a shard twice"),
        (text[:99], "00000002.json cannot be read"),
        ("[" * 9999, "00000002.json cannot be read"),
    ]
    for changed, words in cases:
        path.write_text(changed)
        with pytest.raises(BrokenIndex) as error:
            load_index(split)
        assert words in str(error.value)
    path.unlink()
    with pytest.raises(BrokenIndex, match=r"00000002\.json is missing, and later generations are not"):
        load_index(split)
    path.write_text(text)
    assert load_index(split).num_samples == 13
    with pytest.raises(ValueError, match=r"its index never changes; make a new set.*deepskip compact"):
        save_index(load_index(split), split)
    shutil.copy(split / raw["samples"]["file"], split / "kept")
    (split / raw["samples"]["file"]).write_bytes(b"x")
    with pytest.raises(BrokenIndex, match=r"a generation of .* cannot be read"):
        load_index(split)
    index = json.loads((split / "index.json").read_text())
    (split / "index.json").write_text(json.dumps(index | {"source": "x"}))
    with pytest.raises(BrokenIndex, match=r"00000001\.json is generation 1 of another chain"):
        load_index(split)


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    split = packed(tmp_path / "train", ["first"])
    zeros, eye = np.zeros((16, 16, 2), np.uint8), np.eye(16, dtype=np.uint8)
    cases: list[tuple[np.ndarray, int, str]] = [
        (zeros[..., :1], 1, "bands is 1, but 2 in generation 0"),
        (zeros, 3, "num_classes is 3, but 1 in generation 0"),
        (zeros + 0.5, 1, "its images are float32, but uint8 in generation 0"),
        (zeros, 1, "1 samples have keys of generation 0 of .*: first. To append them nevertheless: --repeated_keys"),
    ]
    for number, (image, num_classes, words) in enumerate(cases):
        image = image if image.dtype == np.uint8 else image.astype(np.float32)
        write_shards([Sample("first", image, eye)], tmp_path / str(number), num_classes=num_classes)
        with pytest.raises(AppendError, match=words):
            append_split(str(split), tmp_path / str(number))
    assert sorted(path.suffix for path in split.iterdir()) == [".arrow", ".json", ".tar"]
    assert append_split(str(split), tmp_path / "3", repeated_keys=True).generation.number == 1
    # A float set takes bytes, and pixels without a value only if it has some.
    floats = tmp_path / "floats"
    write_shards([Sample("f", zeros.astype(np.float32) + 0.5, eye)], floats, num_classes=1)
    append(str(floats), "bytes", 0)
    empty = zeros.astype(np.float32)
    empty[0, 0, 0] = np.nan
    write_shards([Sample("nan", empty, eye)], tmp_path / "nan", num_classes=1)
    with pytest.raises(AppendError, match="images have pixels without a value"):
        append_split(str(floats), tmp_path / "nan")
    append(str(tmp_path / "nan"), "bytes", 0)
    shards = Shards(tmp_path / "nan")
    assert [shards.read(entry)[0].shape for entry in shards.index.entries([0, 1, 2, 3])] == [(16, 16, 2)] * 4


def test_two_writers_of_one_source_append_it_once(tmp_path: Path) -> None:
    split = str(packed(tmp_path / "train", ["first"]))
    late = packed(tmp_path / "late", ["w-0-0", "w-0-1", "w-0-2"], source="w 0")
    stale = append_split(split, packed(tmp_path / "x", ["x"])).chain[:1]
    append(split, "w", 0)
    # It committed number 1 of a chain that has grown by two since it was read.
    original = commit.create
    tried = []
    try:
        commit.create = lambda location, data: tried.append(location) or original(location, data)  # type: ignore[func-returns-value]
        found = append_split(split, late, chain=stale)
    finally:
        commit.create = original
    assert (found.generation.number, found.repeated, len(tried)) == (2, True, 0)
    assert strays(split) == []


def test_an_older_set_can_grow(tmp_path: Path) -> None:
    split = packed(tmp_path / "train", ["first"])
    index = load_index(split)
    # It has no statistics of images, and lists its formats in another order.
    table = index.samples.select(SCHEMA.names)
    formats = ("jpg", *reversed([each for each in FORMATS if each != "jpg"]))
    for name in ("image_format", "mask_format"):
        codes = [formats.index(STORED[code]) for code in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), SCHEMA.field(name), pa.array(codes, pa.uint8()))
    save_index(replace(index, samples=table, formats=formats), split)
    append(str(split), "later", 0)
    shards = Shards(split, crops=Crops(16, 0.0, 0))
    assert not shards.index.has_statistics
    keys = ["first", *(f"later-0-{i}" for i in range(3))]
    batch = shards[[Slot(0, number, 1) for number in range(4)]]
    assert batch["key"] == keys
    assert batch["image"][:, 0, 1, 1].tolist() == [sum(key.encode()) % 251 for key in keys]
    assert list(verify(split)) == []
