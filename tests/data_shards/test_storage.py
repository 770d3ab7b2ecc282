"""Remote shards come from a real S3 endpoint (moto's) and an HTTP server, through a cache shared by processes."""

import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepskip.data_shards import storage
from deepskip.data_shards.command_line import main
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Batch, Shards
from deepskip.data_shards.index import MissingIndex, load_index
from deepskip.data_shards.inspection import verify
from deepskip.data_shards.order import Slot
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.scan import BrokenShard
from deepskip.data_shards.storage import Cache, CacheFull, ChangedFile, StorageError
from deepskip.data_shards.stream import SmallCache, train_batches
from deepskip.data_shards.writer import write_shards


class Handler(SimpleHTTPRequestHandler):
    """Handler that serves a folder, after as many answers of 503 as it is told to send."""

    failures: dict[str, int]

    def do_GET(self) -> None:
        if self.failures.get("left", 0) > 0:
            self.failures["left"] -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def http(tmp_path: Path) -> Iterator[tuple[str, dict[str, int]]]:
    failures = {"left": 0}
    handler = type("Failing", (Handler,), {"failures": failures})
    (tmp_path / "www").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "www"))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", failures
        server.shutdown()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)


def packed(folder: Path, count: int = 40, per_shard: int = 8) -> Path:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        image = rng.integers(0, 255, (16, 16, 4)).astype(np.uint8)
        made.append(Sample(f"k{i:03d}", image, (image[..., 0] > 200).astype(np.uint8)))
    write_shards(made, folder, num_classes=1, samples_per_shard=per_shard)
    return folder


def stream(folder: str | Path, cache: Cache | None, workers: int = 0, window: int = 2) -> list[Batch]:
    shards = Shards(folder, "image", Crops(16, 0.5, 0), cache=cache)
    batches = train_batches(shards, 0, 4, 3, 0, 1, workers, window)
    return list(itertools.islice(batches, 15))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_from_s3_as_from_disk(tmp_path: Path, s3: Any, workers: int) -> None:
    folder = packed(tmp_path / "train")
    s3.put(str(folder), f"bucket/set{workers}/train", recursive=True)
    cache = Cache(tmp_path / "cache", 10**6)
    expected = stream(folder, None)
    found = stream(f"s3://bucket/set{workers}/train", cache, workers)
    for one, other in zip(expected, found, strict=True):
        assert one["key"] == other["key"]
        assert (one["image"] == other["image"]).all()
    # A second reader needs no network, since the copies are named by their contents.
    copies = {path.name for path in cache.folder.iterdir()}
    index = load_index(folder)
    assert {shard.sha256 for shard in index.shards} <= copies
    assert list(verify(f"s3://bucket/set{workers}/train", cache)) == []


def test_foreign_shards_on_s3_are_indexed_there(tmp_path: Path, s3: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(tmp_path / "train")
    for path in folder.glob("*.tar"):
        s3.put(str(path), f"bucket/foreign/train/{path.name}")
    with pytest.raises(MissingIndex, match=r"5 \.tar files but no index\.json.*deepskip index s3://bucket/foreign"):
        load_index("s3://bucket/foreign/train")
    main(["index", "s3://bucket/foreign/train", "--workers", "1"])
    assert "40 samples in 5 shards" in capsys.readouterr().out
    own, theirs = load_index(folder), load_index("s3://bucket/foreign/train")
    assert theirs.samples.equals(own.samples)
    assert (theirs.shards, theirs.num_classes, theirs.bands) == (own.shards, own.num_classes, own.bands)
    np.testing.assert_allclose(theirs.mean, own.mean, rtol=1e-12)
    main(["plan", "s3://bucket/foreign/train", "--global-batch-size", "16", "--steps", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["keys"]) for line in lines] == [16, 16]


def test_http_shards_with_the_index_elsewhere(
    tmp_path: Path, http: tuple[str, dict[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, failures = http
    packed(tmp_path / "www" / "train")
    (tmp_path / "www" / "train" / "index.json").unlink()
    names = "shard-{000000..000004}.tar"
    main(["index", f"{url}/train", "--shards", names, "--out", str(tmp_path / "val"), "--workers", "1"])
    cache = Cache(tmp_path / "cache", 10**6)
    failures["left"] = 3
    found = stream(tmp_path / "val", cache)
    assert failures["left"] == 0
    assert [batch["key"] for batch in found] == [batch["key"] for batch in stream(tmp_path / "val", cache)]


def test_tries_are_used_up(tmp_path: Path, http: tuple[str, dict[str, int]]) -> None:
    url, failures = http
    (tmp_path / "www" / "file").write_bytes(b"contents")
    failures["left"] = 2
    assert storage.read_bytes(f"{url}/file") == b"contents"
    failures["left"] = 1000
    with pytest.raises(StorageError, match=rf"{url}/file cannot be reached: {storage.TRIES} tries in .*503"):
        storage.read_bytes(f"{url}/file")
    failures["left"] = 0
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{url}/none")
    with pytest.raises(StorageError, match="not a URL that files can be at"):
        storage.read_bytes("nonsense://x/y")


def test_a_remote_shard_that_changed_or_is_gone(tmp_path: Path, s3: Any) -> None:
    folder = packed(tmp_path / "train")
    s3.put(str(folder), "bucket/changed/train", recursive=True)
    cache = Cache(tmp_path / "cache", 10**6)
    shards = Shards("s3://bucket/changed/train", cache=cache)
    data = bytearray((folder / "shard-000000.tar").read_bytes())
    data[600] ^= 1
    s3.pipe_file("bucket/changed/train/shard-000000.tar", bytes(data))
    s3.pipe_file("bucket/changed/train/shard-000001.tar", bytes(data[:-512]))
    s3.rm_file("bucket/changed/train/shard-000002.tar")
    for sample, message in ((0, "sha256 differs"), (8, "bytes where its index says"), (16, "cannot be opened")):
        with pytest.raises(BrokenShard, match=message):
            shards[[Slot(0, sample, 1)]]
    assert [path.name for path in cache.folder.iterdir() if path.suffix == ".part"] == []
    shards = Shards("s3://bucket/changed/train", "image", Crops(16, 0, 0), on_bad_sample="skip", cache=cache)
    batch = shards[[Slot(0, 16, 1), Slot(0, 24, 1)]]
    assert batch["weight"].tolist() == [0.0, 1.0]
    assert [report["key"] for report in batch["bad"]] == ["k016"]


def test_the_cache_is_bounded_and_drops_the_oldest(tmp_path: Path, http: tuple[str, dict[str, int]]) -> None:
    url, _ = http
    files = []
    for i in range(5):
        data = bytes([i]) * 1000
        (tmp_path / "www" / str(i)).write_bytes(data)
        files.append((f"{url}/{i}", 1000, hashlib.sha256(data).hexdigest()))
    cache = Cache(tmp_path / "cache", 3000)
    paths = []
    for i, file in enumerate(files[:3]):
        paths.append(cache.fetch(*file))
        os.utime(paths[i], (i, i))
    # The first is used again, so the second is now the oldest.
    cache.fetch(*files[0])
    held = paths[1].open("rb")
    cache.fetch(*files[3])
    left = {path.name for path in cache.folder.iterdir() if path.name != ".lock"}
    assert left == {files[i][2] for i in (0, 2, 3)}
    assert held.read() == bytes([1]) * 1000
    with pytest.raises(CacheFull, match="1000 bytes does not fit into the cache of 999"):
        Cache(tmp_path / "small", 999).fetch(*files[0])
    with pytest.raises(ChangedFile, match="1000 bytes where its index says 1001"):
        cache.fetch(files[4][0], 1001, "0" * 64)
    packed(tmp_path / "www" / "train")
    stream_of = train_batches(Shards(f"{url}/train", cache=Cache(tmp_path / "c", 10**5)), 0, 4, 0, 0, 1)
    with pytest.raises(
        SmallCache, match=r"two windows of 16 shards.*raise data\.cache_gb or lower data\.shuffle_window"
    ):
        next(stream_of)
    # A training that is under way may have lost machines: it continues.
    whole = train_batches(Shards(tmp_path / "www" / "train"), 0, 4, 1, 0, 1)
    resumed = train_batches(Shards(f"{url}/train", cache=Cache(tmp_path / "c", 10**5)), 0, 4, 1, 0, 1)
    with pytest.warns(UserWarning, match=r"two windows of 16 shards.*fetched more than once"):
        assert next(resumed)["key"] == next(whole)["key"]


def test_a_copy_that_lost_its_end_is_fetched_again(tmp_path: Path, http: tuple[str, dict[str, int]]) -> None:
    url, _ = http
    (tmp_path / "www" / "file").write_bytes(b"whole")
    file = f"{url}/file", 5, hashlib.sha256(b"whole").hexdigest()
    cache = Cache(tmp_path / "cache", 10)
    # As after a loss of power.
    cache.fetch(*file).write_bytes(b"")
    assert cache.fetch(*file).read_bytes() == b"whole"


def test_the_cache_must_hold_the_lanes_of_its_machine(tmp_path: Path, http: tuple[str, dict[str, int]]) -> None:
    url, _ = http
    folder = packed(tmp_path / "www" / "train", per_shard=2)
    size = (folder / "shard-000000.tar").stat().st_size

    def starts(lanes: int, rank: int, world_size: int, here: int, held: int) -> bool:
        shards = Shards(f"{url}/train", crops=Crops(16, 0, 0), cache=Cache(tmp_path / f"{rank}", held * size))
        stream = train_batches(shards, 0, 8, 0, rank, world_size, window=1, lanes=lanes, ranks_here=here, last_step=1)
        try:
            return len(list(stream)) == 1
        except ValueError as error:
            return "two windows of 1 shards in each of this machine's" not in str(error)

    # Two windows of a shard in each lane: 8 lanes alone, 4 of them on two machines, and 8 if both ranks are on one.
    for lanes, rank, world_size, here, needed in (
        (8, 0, 1, 1, 16),
        (8, 1, 2, 1, 8),
        (8, 1, 2, 2, 16),
        (8, 2, 3, 1, 10),
    ):
        assert not starts(lanes, rank, world_size, here, needed - 1)
        assert starts(lanes, rank, world_size, here, needed)


def test_a_copy_that_goes_before_it_is_opened_is_fetched_again(
    tmp_path: Path, http: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = http
    packed(tmp_path / "www" / "train")
    shards = Shards(f"{url}/train", cache=Cache(tmp_path / "cache", 10**6))
    fetch, fetched = shards.local_path, []

    def evicted_once(number: int) -> Path:
        path = fetch(number)
        fetched.append(path)
        if len(fetched) == 1:
            path.unlink()
        return path

    monkeypatch.setattr(shards, "local_path", evicted_once)
    assert shards[[Slot(0, 0, 1)]]["key"] == ["k000"]
    assert len(fetched) == 2


def fetch_all(files: list[tuple[str, int, str]], folder: str, result: str) -> None:
    cache = Cache(Path(folder), 4 * 10**6)
    for file in files:
        data = cache.fetch(*file).read_bytes()
        with Path(result).open("a") as out:
            out.write(f"{len(data)} {hashlib.sha256(data).hexdigest() == file[2]}\n")


def test_processes_share_the_cache_and_one_may_be_killed(tmp_path: Path, http: tuple[str, dict[str, int]]) -> None:
    url, _ = http
    rng = np.random.default_rng(0)
    files = []
    for i in range(12):
        data = rng.bytes(10**6)
        (tmp_path / "www" / str(i)).write_bytes(data)
        files.append((f"{url}/{i}", 10**6, hashlib.sha256(data).hexdigest()))
    context = multiprocessing.get_context("spawn")
    results = [tmp_path / f"result{i}" for i in range(3)]
    folder = tmp_path / "cache"
    # This is the part of a process that was killed, whose lock is gone.
    folder.mkdir()
    (folder / f"{'a' * 64}.3000000.part").write_bytes(b"half")
    workers = [
        context.Process(target=fetch_all, args=(files[::step], str(folder), str(result)))
        for step, result in zip((1, -1, 1), results, strict=True)
    ]
    for worker in workers:
        worker.start()
    while not results[0].exists():
        time.sleep(0.01)
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    for worker in workers[1:]:
        worker.join(60)
        assert worker.exitcode == 0
    for result in results[1:]:
        assert result.read_text().splitlines() == ["1000000 True"] * 12
    # The part of the killed process is removed.
    Cache(folder, 4 * 10**6).fetch(files[0][0], 10**6, files[0][2])
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert sum(sizes) <= 4 * 10**6
    assert not (folder / f"{'a' * 64}.3000000.part").exists()


def test_a_lock_does_not_stay_with_a_process_that_was_forked_meanwhile(tmp_path: Path) -> None:
    """Check what a loader process, forked while a shard is fetched, and all who need the shard would otherwise wait for."""
    with storage.lock_file(tmp_path / "lock") as file, storage.flock(file):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with (tmp_path / "lock").open("rb") as other, storage.flock(other, fcntl.LOCK_NB):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
