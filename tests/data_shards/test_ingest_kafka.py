"""`deepskip ingest --from kafka://`: each message exactly once, from a broker in a process of its own."""

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepskip.data_shards.index import load_index
from deepskip.data_shards.ingest.items import LostItems
from deepskip.data_shards.ingest.start import ingest
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.writer import write_shards
from tests.data_shards.kafka_broker import broker, make_topic, produce
from tests.data_shards.test_generations import die_at, in_child
from tests.data_shards.test_ingest import journal_of, mask, picture, png

Message = tuple[int, bytes, Mapping[str, bytes]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with broker(tmp_path_factory.mktemp("broker")) as found:
        yield found


@pytest.fixture
def split(tmp_path: Path) -> str:
    made = [Sample(f"first-{value}", picture(value), mask(value)) for value in (900, 901)]
    write_shards(made, tmp_path / "data" / "train", num_classes=1)
    return str(tmp_path / "data" / "train")


def message(value: int, partition: int) -> Message:
    return partition, png(picture(value)), {"mask": png(255 * mask(value))}


def values_of(split: str) -> list[int]:
    """Return the values whose pixels the samples have, after generation 0, and check that no key is there twice."""
    from deepskip.data_shards.dataset import Shards

    shards = Shards(split, normalize="none")
    known = {picture(value).tobytes(): value for value in range(30)}
    entries = shards.index.entries(list(range(2, len(shards))))
    assert len({entry.key for entry in entries}) == len(entries)
    found = []
    for entry in entries:
        image_HWC, mask_HW = shards.read(entry)[:2]
        found.append(known[image_HWC.tobytes()])
        np.testing.assert_array_equal(mask_HW, mask(found[-1]))
    return found


def test_every_form_of_message_is_read_in_order_and_once(
    tmp_path: Path, split: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_topic(address, "forms", 2)
    file = io.BytesIO()
    np.savez_compressed(file, image=picture(2), mask=mask(2))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(png(picture(3)))
    (tmp_path / "files" / "b.png").write_bytes(png(mask(3)))
    messages: list[Message] = [
        message(0, 0),
        (0, b"nonsense", {}),
        message(1, 0),
        (0, png(picture(1)), {}),
        (1, file.getvalue(), {}),
        (1, json.dumps({"image": "a.png", "mask": "b.png"}).encode(), {}),
        (1, json.dumps({"image": "../data/train/index.json", "mask": "b.png"}).encode(), {}),
        (1, json.dumps({"image": "none.png", "mask": "b.png"}).encode(), {}),
        (1, b'{"image": 1}', {}),
    ]
    produce(address, "forms", messages)
    options: dict[str, Any] = {"name": "t", "idle_seconds": 0.5, "seconds": 0.5, "samples": 2}
    options["paths_under"] = str(tmp_path / "files")
    assert ingest(f"kafka://{address}/forms", split, **options) == 4
    refused = [(told["item"], told["version"]) for told in journal_of(split)]
    assert sorted(refused) == [("forms/0", 1), ("forms/0", 3), ("forms/1", 2), ("forms/1", 3), ("forms/1", 4)]
    # What was refused after the last sample is read again, and not listed again.
    produce(address, "forms", [message(4, 1), message(5, 0)])
    assert ingest(f"kafka://{address}/forms", split, **options) == 2
    assert ingest(f"kafka://{address}/forms", split, **options) == 0
    assert len(journal_of(split)) == 5
    assert sorted(values_of(split)) == [0, 1, 2, 3, 4, 5]
    index = load_index(split)
    assert index.generations[-1].offsets == {"t/0": 5, "t/1": 6}
    keys = index.keys(list(range(2, 8)))
    assert [key for key in keys if key.startswith("t_0")] == ["t_0-0", "t_0-2", "t_0-4"]
    assert [key for key in keys if key.startswith("t_1")] == ["t_1-0", "t_1-1", "t_1-5"]


def test_an_ingest_of_a_topic_that_dies_at_any_step_takes_each_message_once(
    tmp_path: Path, split: str, address: str
) -> None:
    make_topic(address, "deaths", 2)
    produce(address, "deaths", [message(value, value % 2) for value in range(4)])
    options: dict[str, Any] = {"name": "t", "idle_seconds": 0, "seconds": 5, "samples": 2}
    moment, died, generations = 0, True, set()
    while died:
        copy = str(shutil.copytree(split, tmp_path / str(moment) / "train"))

        def work(copy: str = copy, moment: int = moment) -> None:
            die_at(moment)
            ingest(f"kafka://{address}/deaths", copy, **options)

        _, status = os.waitpid(in_child(work), 0)
        died = os.WIFSIGNALED(status)
        generations.add(len(load_index(copy).generations))

        def finish(copy: str = copy) -> None:
            ingest(f"kafka://{address}/deaths", copy, **options)
            os._exit(7)

        # 7, since an error would end the child with 0.
        assert os.waitstatus_to_exitcode(os.waitpid(in_child(finish), 0)[1]) == 7
        assert sorted(values_of(copy)) == [0, 1, 2, 3]
        assert load_index(copy).generations[-1].offsets == {"t/0": 2, "t/1": 2}
        # Some of the steps, and at last none.
        moment += 9
    assert generations == {1, 2, 3}


def test_messages_that_are_gone_are_an_error(split: str, address: str) -> None:
    make_topic(address, "lost", 1)
    produce(address, "lost", [message(value, 0) for value in range(2)])
    options: dict[str, Any] = {"name": "t", "idle_seconds": 0.5, "seconds": 0.5}
    assert ingest(f"kafka://{address}/lost", split, **options) == 2
    make_topic(address, "lost", 1, again=True)
    with pytest.raises(LostItems, match="partition 0 of lost has no offset 2"):
        ingest(f"kafka://{address}/lost", split, **options)
    with pytest.raises(ValueError, match="has no topic absent"):
        ingest(f"kafka://{address}/absent", split, **options)
    check_names(split)


def check_names(split: str) -> None:
    """Check that the chain has what it had."""
    assert sorted(values_of(split)) == [0, 1]
