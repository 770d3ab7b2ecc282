import io
import itertools
import tarfile
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import webdataset

from deepskip.data_shards import dataset, storage
from deepskip.data_shards import stream as streams
from deepskip.data_shards.crops import Crops, Item, pasted, random_crop
from deepskip.data_shards.dataset import BrokenShard, Shards
from deepskip.data_shards.entries import SCHEMA
from deepskip.data_shards.index import BrokenIndex, Index, MissingIndex, load_index, save_index
from deepskip.data_shards.inspection import verify
from deepskip.data_shards.order import Slot
from deepskip.data_shards.sample import BadSample, Sample
from deepskip.data_shards.storage import Cache
from deepskip.data_shards.stream import ReadAhead, read, train_batches, whole_images
from deepskip.data_shards.writer import write_shards


def samples(count: int, bands: int = 3, size: int = 20, dtype: type = np.uint8) -> list[Sample]:
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        image = rng.integers(0, 200, (size, size + i % 3, bands)).astype(dtype)
        made.append(Sample(f"s{i:03d}", image, (image[..., 0] > 150).astype(np.uint8)))
    return made


def packed(folder: Path, made: list[Sample], **options: int) -> Index:
    return write_shards(made, folder, num_classes=1, samples_per_shard=4, **options)


def test_samples_come_back_whole_and_the_index_is_what_was_written(tmp_path: Path) -> None:
    made = samples(10, bands=5, dtype=np.int16)
    index = packed(tmp_path / "train", made)
    assert load_index(tmp_path / "train") == index
    assert list(verify(tmp_path / "train")) == []
    assert [shard.samples for shard in index.shards] == [4, 4, 2]
    pixels = np.concatenate([s.image_HWC.reshape(-1, 5) for s in made]).astype(np.float64)
    np.testing.assert_allclose(index.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(index.std, pixels.std(0), rtol=1e-9)
    shards = Shards(tmp_path / "train", "dataset")
    for i, sample in enumerate(made):
        item = shards[[Slot(0, i, 1)]]
        assert item["key"] == [sample.key]
        np.testing.assert_array_equal(item["image"][0], sample.image_HWC.transpose(2, 0, 1))
        np.testing.assert_array_equal(item["mask"][0], sample.mask_HW)
        np.testing.assert_allclose(item["mean"][0], index.mean, rtol=1e-6)


def test_any_other_webdataset_reader_reads_them(tmp_path: Path) -> None:
    made = samples(6)
    packed(tmp_path / "train", made)
    urls = [str(path) for path in sorted((tmp_path / "train").glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [item["__key__"] for item in read] == [sample.key for sample in made]
    for item, sample in zip(read, made, strict=True):
        np.testing.assert_array_equal(item["image.png"], sample.image_HWC)
        np.testing.assert_array_equal(item["mask.png"][..., 0], sample.mask_HW)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = (packed(tmp_path / name, samples(5)) for name in ("a", "b"))
    assert [shard.sha256 for shard in one.shards] == [shard.sha256 for shard in other.shards]


def test_a_packing_that_fails_leaves_nothing(tmp_path: Path) -> None:
    made = samples(6)
    made[5] = Sample("s005", made[5].image_HWC, made[5].mask_HW[1:])
    with pytest.raises(ValueError, match="sample s005: the image is"):
        packed(tmp_path / "train", made)
    assert list(tmp_path.iterdir()) == []
    packed(tmp_path / "train", samples(2))
    with pytest.raises(FileExistsError, match="exists already"):
        packed(tmp_path / "train", samples(2))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("s000", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)), "s000 occurs twice"),
        (
            Sample("a/b", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)),
            "'a/b' is empty or has a dot or slash",
        ),
        (
            Sample("b", np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.uint8)),
            "b has 2 bands, but those before it have 3",
        ),
        (
            Sample("c", np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 2, np.uint8)),
            "c has label 2; .* the highest is 1",
        ),
    ],
)
def test_samples_that_do_not_fit(tmp_path: Path, sample: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed(tmp_path / "train", [*samples(1), sample])


def test_a_shard_that_cannot_be_reached_is_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Sample(f"s{i}", np.full((16, 16, 3), i, np.uint8), np.zeros((16, 16), np.uint8)) for i in range(3)]
    write_shards(made, tmp_path / "train", num_classes=1)
    shards, slots, now, tries = (
        Shards(tmp_path / "train", "none", on_bad_sample="skip"),
        [Slot(0, i, 1) for i in range(3)],
        100.0,
        [],
    )

    def unreachable(number: int) -> Path:
        tries.append(number)
        raise storage.Unreached("the storage does not answer")

    monkeypatch.setattr(dataset.time, "monotonic", lambda: now)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "local_path", unreachable)
        assert len(shards[slots]["bad"]) == 3
    assert len(shards[slots]["bad"]) == 3
    assert len(tries) == 1
    now += dataset.UNREACHED_SECONDS
    assert shards[slots]["bad"] == []


def test_missing_and_broken_indexes(tmp_path: Path) -> None:
    with pytest.raises(MissingIndex, match=r"does not exist or cannot be listed.*pack folder"):
        load_index(tmp_path / "nowhere")
    packed(tmp_path / "train", samples(2))
    path = tmp_path / "train" / "index.json"
    text = path.read_text()
    path.unlink()
    with pytest.raises(MissingIndex, match=r"holds 1 \.tar files but no index"):
        load_index(tmp_path / "train")
    path.write_text(text.replace('"version": 3', '"version": 4'))
    # "Make a new one" would lose what that version added.
    with pytest.raises(BrokenIndex, match=r"index\.json has version 4; this reads up to 3\. Install a later DeepSkip"):
        load_index(tmp_path / "train")
    for broken in (text[:50], "{}", text.replace("deepskip-shards", "else"), text.replace("shard-000000", "../../etc")):
        path.write_text(broken)
        with pytest.raises(BrokenIndex, match=r"index\.json cannot be read"):
            load_index(tmp_path / "train")


def test_verify_and_reading_name_the_shard_that_changed(tmp_path: Path) -> None:
    index = packed(tmp_path / "train", samples(12))
    gone, cut, flipped = (tmp_path / "train" / shard.name for shard in index.shards)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-512])
    data = bytearray(flipped.read_bytes())
    start = index.entries([8])[0].image.offset
    data[start : start + 8] = bytes(8)
    flipped.write_bytes(data)
    faults = list(verify(tmp_path / "train"))
    # The third shard is at fault, and the sample in it.
    assert len(faults) == 4
    assert [
        word in fault
        for word, fault in zip(
            ("No such file", "where its index says", "sha256 differs", "s008: has other bytes"), faults, strict=True
        )
    ]
    shards = Shards(tmp_path / "train")
    with pytest.raises(BrokenShard, match=r"shard-000001\.tar has .* bytes where its index says"):
        shards[[Slot(0, 4, 1)]]
    # Loader processes say the same.
    for workers in (0, 1):
        with pytest.raises(BrokenShard, match=r"shard-000000\.tar cannot be opened"):
            list(read(shards, iter([[Slot(0, 0, 1)]]), workers))
        with pytest.raises(
            BadSample, match=r"shard-000002\.tar: sample s008: has other bytes than when it was indexed"
        ) as caught:
            list(read(shards, iter([[Slot(0, 8, 1)]]), workers))
        assert caught.value.key == "s008"


def test_samples_that_are_not_what_the_index_says(tmp_path: Path) -> None:
    index = packed(tmp_path / "train", samples(2))
    with tarfile.open(tmp_path / "train" / index.shards[0].name) as tar:
        assert len(tar.getmembers()) == 4
    plain = index.samples.select(SCHEMA.names)
    save_index(
        replace(index, bands=4, mean=(0.0,) * 4, std=(1.0,) * 4, percentiles=None, samples=plain), tmp_path / "train"
    )
    with pytest.raises(BadSample, match="has 3 bands; the index says 4"):
        Shards(tmp_path / "train")[[Slot(0, 0, 1)]]
    made = samples(1)
    mask = made[0].mask_HW.copy()
    mask[0, 0] = 2
    write_shards([Sample("x", made[0].image_HWC, mask)], tmp_path / "val", num_classes=3)
    with pytest.raises(BadSample, match="sample x: has label 2; with 2 classes the highest is 1"):
        Shards(tmp_path / "val", num_classes=2)[[Slot(0, 0, 1)]]


def numbered(epoch: list[int], sample: list[int]) -> dict[str, Any]:
    """Stand in for the random draws of a batch's samples."""
    return {"draws": torch.tensor([epoch, sample]).T.float(), "noise_seed": [7 * number for number in sample]}


def collected(
    folder: Path,
    rank: int,
    world_size: int,
    first: int,
    steps: int,
    workers: int = 0,
    paste: float = 0.0,
    lanes: int = 1,
) -> list[dict]:
    shards = Shards(folder, "image", Crops(16, 0.5, 0, paste))
    stream = train_batches(shards, 0, 4, first, rank, world_size, workers, entries=numbered, lanes=lanes)
    return list(itertools.islice(stream, steps))


@pytest.mark.parametrize(("paste", "lanes"), [(0.0, 1), (0.5, 1), (0.5, 2)])
def test_global_batches_are_the_same_from_any_step_on_any_layout(tmp_path: Path, paste: float, lanes: int) -> None:
    packed(tmp_path / "train", samples(10))
    alone = collected(tmp_path / "train", 0, 1, 0, 7, paste=paste, lanes=lanes)
    # There are 10 samples in batches of 4, so the third batch of an epoch holds 2, and 2 of weight 0.
    assert [batch["weight"].sum().item() for batch in alone] == [4, 4, 2, 4, 4, 2, 4]
    later = collected(tmp_path / "train", 0, 1, 4, 3, paste=paste, lanes=lanes)
    halves = [collected(tmp_path / "train", rank, 2, 0, 7, workers=rank, paste=paste, lanes=lanes) for rank in range(2)]
    for t, batch in enumerate(alone):
        # The draws belong to the batch, in whichever process it is made.
        assert batch["draws"].tolist() == [list(pair) for pair in zip(batch["epoch"], batch["sample"], strict=True)]
        assert batch["noise_seed"] == [7 * number for number in batch["sample"]]
        # With lanes, each rank repeats samples of its own.
        compared, of_halves = (w >= (lanes > 1) for w in (batch["weight"], torch.cat([h[t]["weight"] for h in halves])))
        for name in ("image", "mask", "mean", "std", "weight", "draws"):
            both = torch.cat([half[t][name] for half in halves])
            assert torch.equal(batch[name][compared], both[of_halves]), name
            if t >= 4:
                assert torch.equal(batch[name], later[t - 4][name])
        keys = [key for half in halves for key in half[t]["key"]]
        assert list(itertools.compress(batch["key"], compared)) == list(itertools.compress(keys, of_halves))
    assert sorted(alone[0]["key"] + alone[1]["key"] + alone[2]["key"][:2]) == [f"s{i:03d}" for i in range(10)]


@pytest.mark.parametrize(("lanes", "shares"), [(1, [16, 16]), (4, [10, 10])])
def test_what_a_rank_reads_ahead(
    tmp_path: Path, lanes: int, shares: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check what two machines prefetch of 24 shards of 4 samples, in windows of 1 shard and batches of 8."""
    index = packed(tmp_path / "train", samples(96, size=16))
    save_index(replace(index, base="s3://nowhere"), tmp_path / "train")
    wanted: list[list[int]] = []
    monkeypatch.setattr(ReadAhead, "want", lambda self, numbers: wanted.append(numbers))
    seen = []
    for rank in range(2):
        shards = Shards(tmp_path / "train", "none", Crops(16, 0.0, 0), cache=Cache(tmp_path / "cache", 10**6))
        shards.local_path = lambda number: tmp_path / "train" / index.shards[number].name  # type: ignore[method-assign]
        wanted.clear()
        stream = train_batches(shards, 3, 8, 0, rank, 2, window=1, lanes=lanes)
        for batch in itertools.islice(stream, 8):
            assert set(index.shards_of(batch["sample"])) <= set(wanted[-1])
        # Two thirds of the epoch are read: of one lane 16 windows, of which the other rank needs the last or first alone,
        # of two lanes 4 windows each. The next of each lane is prefetched.
        seen.append({number for numbers in wanted for number in numbers})
        assert len(seen[rank]) == shares[rank]
        wanted.clear()
        for batch in itertools.islice(stream, 5):
            assert set(index.shards_of(batch["sample"])) <= set(wanted[-1])
        # The last step of the epoch prefetched what the first of the next one reads.
        assert set(index.shards_of(batch["sample"])) <= {*wanted[-2], *(wanted[-1] if lanes == 1 else ())}
        # The last epoch is followed by none.
        wanted.clear()
        assert len(list(train_batches(shards, 3, 8, 0, rank, 2, window=1, lanes=lanes, last_step=12))) == 12
        if lanes > 1:
            assert len({number for numbers in wanted for number in numbers}) == 12
    assert bool(seen[0] & seen[1]) == (lanes == 1)


def test_shards_in_use_are_touched_when_others_are_fetched() -> None:
    """Check that the cache, which removes what was touched first, keeps the shards that are still wanted."""
    touched: list[int] = []
    ahead = ReadAhead(cast(Shards, SimpleNamespace(local_path=touched.append)))
    for wanted in ([1, 2], [2, 3], [4]):
        ahead.want(wanted)
        wait(ahead.asked.values())
    ahead.close()
    assert sorted(touched) == [1, 2, 2, 3, 4]


def test_validation_takes_each_image_once_and_whole(tmp_path: Path) -> None:
    made = samples(5)
    packed(tmp_path / "val", made)
    seen = [batch for rank in range(3) for batch in whole_images(Shards(tmp_path / "val"), rank, 3)]
    assert sorted(batch["key"][0] for batch in seen) == [sample.key for sample in made]
    for batch in seen:
        sample = next(s for s in made if s.key == batch["key"][0])
        assert batch["image"].shape[2:] == sample.mask_HW.shape
        pixels = sample.image_HWC.reshape(-1, 3).astype(np.float64)
        np.testing.assert_allclose(batch["mean"][0], pixels.mean(0), rtol=1e-6)
        np.testing.assert_allclose(batch["std"][0], pixels.std(0), rtol=1e-6)


def test_validation_through_loader_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(tmp_path / "val", samples(19))
    shards = Shards(tmp_path / "val")
    # Processes are not started where none are asked for, nor for images that are read at once.
    monkeypatch.setattr(streams, "DataLoader", None)
    expected = list(whole_images(shards, 0, 2))
    assert [batch["sample"] for batch in expected] == [[i] for i in range(9)]
    for worth, loader_workers in ((0.0, 0), (60.0, 2)):
        monkeypatch.setattr(streams, "WORTH_PROCESSES", worth)
        assert len(list(whole_images(shards, 0, 2, loader_workers=loader_workers))) == 9
    monkeypatch.setattr(streams, "DataLoader", torch.utils.data.DataLoader)
    monkeypatch.setattr(streams, "WORTH_PROCESSES", 0.0)
    # The training's random numbers do not depend on how its validation is read.
    before = torch.get_rng_state()
    found = list(whole_images(shards, 0, 2, loader_workers=2))
    assert torch.equal(torch.get_rng_state(), before)
    for batch, same in zip(found, expected, strict=True):
        assert batch["key"] == same["key"]
        for name in ("image", "mask", "mean", "std"):
            assert torch.equal(batch[name], same[name]), name  # type: ignore[literal-required]


def test_what_a_validation_reads_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = packed(tmp_path / "val", samples(60, size=16))
    save_index(replace(index, base="s3://nowhere"), tmp_path / "val")
    wanted: list[list[int]] = []
    monkeypatch.setattr(ReadAhead, "want", lambda self, numbers: wanted.append(numbers))

    def ahead(limit: int, rank: int) -> list[list[int]]:
        shards = Shards(tmp_path / "val", cache=Cache(tmp_path / "cache", limit))
        shards.local_path = lambda number: tmp_path / "val" / index.shards[number].name  # type: ignore[method-assign]
        wanted.clear()
        batches = list(whole_images(shards, rank, 4, ranks_here=2))
        assert [batch["sample"][0] for batch in batches] == list(range(15 * rank, 15 * rank + 15))
        return list(wanted)

    # Of 15 shards of 4 samples, rank 1 of 4 has samples 15 to 29, in shards 3 to 7.
    assert ahead(10**9, 1) == [list(range(first, 8)) for first in range(3, 8)]
    # Each of two ranks of a machine leaves half of its part of the cache to the training: room for two shards here.
    room = 4 * 2 * max(shard.bytes for shard in index.shards)
    assert ahead(room, 0) == [[0, 1], [1, 2], [2, 3], [3]]
    assert ahead(1, 0) == [[0], [1], [2], [3]]


def test_crops() -> None:
    rng = np.random.default_rng(0)
    image = np.arange(40 * 50, dtype=np.int64).reshape(40, 50, 1)
    mask = np.zeros((40, 50), np.uint8)
    mask[3, 47] = 1
    for _ in range(50):
        cut, cut_mask = random_crop(image, mask, Crops(16, 1.0, 0), 255, rng)
        assert cut.shape == (16, 16, 1)
        assert cut_mask.sum() == 1
        # Image and mask are cut at the same place.
        assert cut[cut_mask == 1].tolist() == [[image[3, 47, 0]]]
    hits = sum(random_crop(image, mask, Crops(16, 0.0, 0), 255, rng)[1].sum() for _ in range(2000))
    # The pixel is 3 rows from the top and 2 columns from the right: 4 of 25 offsets by 3 of 35.
    assert hits / 2000 == pytest.approx(4 / 25 * 3 / 35, abs=0.01)
    small, small_mask = random_crop(image[:10], mask[:10], Crops(16, 0.0, 0), 255, rng)
    assert small.shape == (16, 16, 1)
    assert (small_mask[10:] == 255).all()
    np.testing.assert_array_equal(small[10:], np.repeat(small[9:10], 6, 0))


def test_pasted_objects_by_hand() -> None:
    one = Item(
        np.full((2, 2, 1), 100, np.uint8), np.array([[0, 0], [255, 0]], np.uint8), np.float32([100]), np.float32([10])
    )
    image, mask = np.array([[[30], [90]], [[0], [250]]], np.uint8), np.array([[1, 255], [0, 2]], np.uint8)
    donor = Item(image, mask, np.float32([20]), np.float32([4]))
    # The pixels are (30 - 20) / 4 and (250 - 20) / 4 deviations of 10 above 100. The latter does not fit into a byte.
    a, b = 125, 675
    # These are the turns to the left, first of the image, then of its mirror image. Ignored pixels do not change.
    corners = [
        [a, 0, 0, b],
        [0, b, a, 0],
        [b, 0, 0, a],
        [0, a, b, 0],
        [0, a, b, 0],
        [a, 0, 0, b],
        [0, b, a, 0],
        [b, 0, 0, a],
    ]
    for turn, (top_left, top_right, _, bottom_right) in enumerate(corners):
        found = pasted(one, donor, 255, turn)
        values = [[top_left or 100, top_right or 100], [100, bottom_right or 100]]
        labels = [[{0: 0, a: 1, b: 2}[v] for v in (top_left, top_right)], [255, {0: 0, a: 1, b: 2}[bottom_right]]]
        assert (found.image[..., 0].tolist(), found.mask.tolist()) == (values, labels), turn
    assert (one.image == 100).all()
    # Flat images count as having a deviation of 1.
    flat = pasted(one._replace(std=np.float32([0])), donor._replace(std=np.float32([0])), 255, 0)
    assert flat.image[..., 0].tolist() == [[110, 100], [100, 330]]
    # With one normalisation, the values are the same to the bit.
    exact = Item(np.float64([[[0.1], [0.7]]]), np.array([[0, 1]], np.uint8), np.float32([0.3]), np.float32([0.7]))
    assert pasted(exact, exact, 255, 0).image[0, 1, 0] == np.float32(0.7)


def test_copy_paste_takes_other_samples_of_the_shard_on_any_layout(tmp_path: Path) -> None:
    made = [Sample(f"s{i:03d}", np.full((8, 8, 1), 10 * i, np.float32), np.zeros((8, 8), np.uint8)) for i in range(10)]
    for i, sample in enumerate(made):
        sample.image_HWC[i % 8, 3], sample.mask_HW[i % 8, 3] = 10 * i + 5, 1
    packed(tmp_path / "train", made)

    def batches(share: float, rank: int = 0, world_size: int = 1) -> list[dict]:
        shards = Shards(tmp_path / "train", "none", Crops(8, 0.0, 3, share))
        return list(itertools.islice(train_batches(shards, 0, 10, 0, rank, world_size), 60))

    plain, always, half = batches(0.0), batches(1.0), batches(0.5)
    pairs, changed = set(), 0
    for batch, own, some in zip(plain, always, half, strict=True):
        for i, sample in enumerate(batch["sample"]):
            added = (own["mask"][i] == 1) & (own["image"][i, 0] != batch["image"][i, 0])
            # A donor is cut around its object, so the object is in it, and nothing else.
            [value] = own["image"][i, 0][added].tolist()
            donor = int(value // 10)
            assert value == 10 * donor + 5
            pairs.add((sample, donor))
            unchanged = torch.equal(some["image"][i], batch["image"][i])
            assert unchanged or torch.equal(some["image"][i], own["image"][i])
            changed += not unchanged
    # The shards hold 4, 4 and 2 samples.
    ranges = (range(4), range(4, 8), range(8, 10))
    assert pairs == {(a, b) for shard in ranges for a in shard for b in shard if a != b}
    assert changed / 600 == pytest.approx(0.5, abs=0.08)
    for own, first, second in zip(always, batches(1.0, 0, 2), batches(1.0, 1, 2), strict=True):
        for name in ("image", "mask"):
            assert torch.equal(own[name], torch.cat([first[name], second[name]]))


def test_a_bad_donor(tmp_path: Path) -> None:
    index = packed(tmp_path / "train", samples(2, size=16))
    entry = index.entries([1])[0]
    shard = tmp_path / "train" / index.shards[0].name
    data = bytearray(shard.read_bytes())
    data[entry.image.offset + 200] ^= 1
    shard.write_bytes(data)
    crops = Crops(16, 0.0, 0, 1.0)
    with pytest.raises(BadSample, match=entry.key):
        Shards(tmp_path / "train", crops=crops)[[Slot(0, 0, 1)]]
    item = Shards(tmp_path / "train", crops=crops, on_bad_sample="skip")[[Slot(0, 0, 1)]]
    plain = Shards(tmp_path / "train", crops=replace(crops, paste=0.0))[[Slot(0, 0, 1)]]
    assert torch.equal(item["image"], plain["image"])
    assert (item["weight"].item(), item["bad"]) == (1.0, [])


def test_a_split_without_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no samples"):
        packed(tmp_path / "train", [])


def test_a_tar_is_not_compressed_or_stamped(tmp_path: Path) -> None:
    index = packed(tmp_path / "train", samples(1))
    data = (tmp_path / "train" / index.shards[0].name).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        assert {member.mtime for member in tar} == {0}
