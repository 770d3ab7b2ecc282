"""A replica alone, without Ray or HTTP, and the outlines that it draws."""

import asyncio
import hashlib
import io
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import rasterio.features
import torch
from PIL import Image

from deepskip import inference, publishing, weight_files
from deepskip.data_shards.pictures import Reading
from deepskip.jobs import polygons
from deepskip.jobs.serving import model as serving
from deepskip.jobs.serving.answers import Answer
from deepskip.jobs.serving.batches import Batches
from deepskip.jobs.serving.model import Model, Room, Slots
from deepskip.predictor import Predictor
from tests.jobs.serving import state


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def ask(model: Model, images: list[np.ndarray], answer: str = "mask") -> list[Answer]:
    async def all_at_once() -> list[Answer]:
        return list(await asyncio.gather(*(model.segment(npy(image), "npy", answer) for image in images)))

    return asyncio.run(all_at_once())


def mask_of(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.reason
    return np.asarray(Image.open(io.BytesIO(answer.body)))


def raw_probabilities(predictor: Predictor, image_HWC: np.ndarray) -> np.ndarray:
    return predictor.probabilities(torch.from_numpy(image_HWC[None].astype(np.float32)).permute(0, 3, 1, 2))[0].numpy()


def close(mask: np.ndarray, model: Model, image: np.ndarray) -> None:
    p = raw_probabilities(model.predictor, image)
    sure = np.abs(p[0] - 0.5) > 1e-4 if len(p) == 1 else np.diff(np.sort(p, 0)[-2:], axis=0)[0] > 1e-4
    expected = (p[0] > 0.5) * 255 if len(p) == 1 else p.argmax(0)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(mask[sure], expected[sure])


@pytest.mark.parametrize(("bands", "classes"), [(1, 1), (5, 3)])
def test_images_of_one_size_go_together_and_come_out_as_alone(bands: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [(40, 56)] * 5 + [(33, 17)] * 3 + [(50, 50)]
    images = [rng.normal(size=(*size, bands)).astype(np.float32) for size in sizes]
    model = Model(state(bands, classes), "cpu", 10_000, 16, 0.2, 2)
    answers = ask(model, images)
    for image, answer in zip(images, answers, strict=True):
        close(mask_of(answer), model, image)
    assert [answer.batch for answer in answers] == [5] * 5 + [3] * 3 + [1]
    assert model.room.held == 0


def test_large_images_are_not_piled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [np.random.default_rng(n).normal(size=(32, 32, 1)).astype(np.float32) for n in range(5)]
    monkeypatch.setattr(inference, "TILE", 46)
    # One image has no partner and waits the whole time. It is the last, unless the machine was busy.
    model = Model(state(1, 1), "cpu", 10_000, 16, 3.0, 2)
    assert sorted(answer.batch for answer in ask(model, images)) == [1, 2, 2, 2, 2]
    # An enlarged image has as many pixels as four.
    larger = state(1, 1)
    larger["config"]["model"]["enlarge"] = 2
    assert [answer.batch for answer in ask(Model(larger, "cpu", 10_000, 16, 3.0, 2), images[:2])] == [1, 1]


def test_a_batch_passes_over_those_who_left_and_survives_an_error() -> None:
    calls = []

    def forward(images: list[np.ndarray]) -> list[np.ndarray]:
        calls.append([int(image[0, 0, 0]) for image in images])
        if calls[-1] == [3]:
            raise ValueError("no")
        return [image * 2 for image in images]

    async def run() -> None:
        batches = Batches(forward, 5, 100, 0.05)
        images = [np.full((2 + (n == 3), 2, 1), n) for n in range(5)]
        tasks = [asyncio.create_task(batches.run(image)) for image in images]
        # The batch waits, as another image is announced.
        with batches.announcing():
            await asyncio.sleep(0.01)
            tasks[1].cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [(int(each[0][0, 0, 0]), each[1]) for each in (found[0], found[2], found[4])] == [(0, 3), (4, 3), (8, 3)]
        assert isinstance(found[1], asyncio.CancelledError)
        assert isinstance(found[3], ValueError)
        # Without one it does not: this would take a minute.
        batches.wait = 60.0
        assert (await batches.run(images[4]))[1] == 1

    asyncio.run(run())
    assert calls == [[0, 2, 4], [3], [4]]


def test_the_training_datas_preparation_is_done_first() -> None:
    # 6 bands become 3, and 60 x 30 becomes 20 x 10.
    image = np.random.default_rng(0).integers(0, 4000, (60, 30, 6)).astype(np.uint16)
    model = Model(state(3, 1, {"bands": 3, "longest_side": 20}), "cpu", 10_000, 4, 0, 1)
    small = model.predictor.prepared(image)
    assert small.shape == (20, 10, 3)
    # Away from the border, the filter is a triangle with a half width of three pixels.
    band = image[..., :2].astype(np.float64).mean(-1).round()
    weights = np.array([1, 2, 3, 2, 1]) / 9
    middle = band[3 * 9 - 1 : 3 * 9 + 4, 3 * 5 - 1 : 3 * 5 + 4]
    assert abs(small[9, 5, 0] - weights @ middle @ weights) <= 1
    p = torch.from_numpy(raw_probabilities(model.predictor, small))[None]
    large = torch.nn.functional.interpolate(p, size=(60, 30), mode="bilinear")[0, 0].numpy()
    (answer,) = ask(model, [image])
    np.testing.assert_array_equal(mask_of(answer), (large > 0.5) * 255)
    assert answer.coverage == pytest.approx((large > 0.5).mean())


def test_no_object_is_where_nothing_has_a_value() -> None:
    model = Model(state(3, 1, {"bands": 3, "longest_side": 8, "nodata": "nan"}), "cpu", 10_000, 4, 0, 1)
    # All that has a value is foreground; enlarged eightfold, it would spread over the edge.
    model.predictor.network.head.bias.data += 50
    image = np.random.default_rng(0).normal(size=(64, 64, 3)).astype(np.float32)
    image[:27] = math.nan
    (answer,) = ask(model, [image])
    np.testing.assert_array_equal(mask_of(answer)[:27], 0)
    assert mask_of(answer)[40:].all()
    np.testing.assert_array_equal(mask_of(answer) > 0, model.predictor.predict(image, nodata=math.nan))


def test_the_networks_bands_are_taken_of_an_image() -> None:
    image = np.random.default_rng(0).normal(size=(30, 20, 6)).astype(np.float32)
    told = {"bands": None, "longest_side": None, "chosen": [5, 1], "of": 6}
    model = Model(state(2, 1, told), "cpu", 10_000, 4, 0, 1)
    good, few = ask(model, [image, image[..., [5, 1]]])
    close(mask_of(good), model, image[..., [5, 1]])
    assert (few.status, few.reason) == (422, "the image: has 2 bands; the model takes 6")
    assert asyncio.run(model.describe()) == {"bands": 6, "classes": 1}


def test_what_the_model_cannot_take_is_said() -> None:
    model = Model(state(3, 1), "cpu", 600, 4, 0, 1)
    good, wide, four = np.zeros((30, 20, 3)), np.zeros((30, 21, 3)), np.zeros((30, 20, 4))
    answers = ask(model, [good, wide, four, good * np.nan, good + 1e35])
    assert [answer.status for answer in answers] == [200, 413, 422, 422, 422]
    for answer, word in zip(
        answers[1:], ("30 x 21 pixels", "4 bands; the model takes 3", "nan", "beyond"), strict=True
    ):
        assert word in answer.reason


def test_missing_values_are_those_that_the_settings_name() -> None:
    image = np.random.default_rng(0).normal(size=(30, 20, 3)).astype(np.float32)
    image[:9] = np.nan
    (answer,) = ask(Model(state(3, 1), "cpu", 600, 4, 0, 1, reading=Reading(nodata=np.nan)), [image])
    expected = Predictor(state(3, 1)).predict(image, nodata=np.nan)
    assert expected.sum() > 0
    np.testing.assert_array_equal(mask_of(answer), expected * 255)


def test_a_model_that_is_not_whole_yet_is_taken_over_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "RETRY_SECONDS", 0.05)
    data = weight_files.pack(state(3, 1))
    sha256 = hashlib.sha256(data).hexdigest()
    path = tmp_path / publishing.name_of(sha256)

    async def follow() -> list[str]:
        model, faults = Model(state(3, 1), "cpu", 600, 4, 0, 1, str(tmp_path), "old"), []
        for content in (None, data[:-9], data):
            if content is not None:
                path.write_bytes(content)
            seen = ""
            while seen in ["", *faults] and model.loaded.sha256 != sha256:
                await asyncio.sleep(0.01)
                seen = (await model.prepare(sha256))[1]
            faults.append(seen)
        return [*faults, model.loaded.sha256, model.fault]

    missing, cut, *rest = asyncio.run(asyncio.wait_for(follow(), 60))
    assert "is missing" in missing
    assert "is damaged or incomplete" in cut
    assert rest[1:] == [sha256, ""]


def test_whoever_would_hold_too_much_waits() -> None:
    async def run() -> None:
        room = Room(100)
        with room.taken(60):
            assert room.left.is_set()
            with room.taken(60):
                waiting = asyncio.create_task(room.left.wait())
                await asyncio.sleep(0)
                assert not waiting.done()
            await asyncio.wait_for(waiting, 1)

    asyncio.run(run())


def signed_area(ring: list[list[int]]) -> float:
    x, y = np.array(ring[:-1]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_a_slot_is_free_when_its_work_has_ended_not_when_its_caller_has_left() -> None:
    running, most, gate = 0, 0, threading.Event()
    count = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with count:
            running += 1
            most = max(most, running)
        assert gate.wait(60)
        with count:
            running -= 1

    async def leave_and_ask() -> None:
        slots = Slots(2)
        for _ in range(3):
            callers = [asyncio.create_task(slots.run(work)) for _ in range(8)]
            await asyncio.sleep(0.05)
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
        assert slots.free.locked()
        last = asyncio.create_task(slots.run(work))
        await asyncio.sleep(0.05)
        gate.set()
        await last
        # Callers that left before their turn took no slot with them.
        await asyncio.gather(slots.run(work), slots.run(work))

    asyncio.run(leave_and_ask())
    assert most == 2


def test_outlines_hold_exactly_the_pixels_of_the_mask() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        H, W, classes = rng.integers(1, 14, 3)
        labels = ((rng.random((H, W)) < rng.random()) * rng.integers(1, classes + 1, (H, W))).astype(np.uint8)
        objects, numbers = polygons.find_objects(labels)
        scores = rng.random((H, W))
        found = json.loads(json.dumps(polygons.feature_collection(objects, numbers, scores)))
        drawn = np.zeros_like(labels)
        for feature in found["features"]:
            geometry, properties = feature["geometry"], feature["properties"]
            inside = rasterio.features.rasterize([(geometry, 1)], out_shape=(H, W)) > 0
            assert not drawn[inside].any()
            drawn[inside] = properties["class"]
            assert inside.sum() == properties["area"]
            assert properties["score"] == pytest.approx(scores[inside].mean(), abs=1e-4)
            single = geometry["type"] == "Polygon"
            for shape in [geometry["coordinates"]] if single else geometry["coordinates"]:
                assert signed_area(shape[0]) > 0
                assert all(signed_area(hole) < 0 for hole in shape[1:])
                # Each ring is closed, and touches itself nowhere.
                assert all(ring[0] == ring[-1] and len(set(map(tuple, ring))) == len(ring) - 1 for ring in shape)
        np.testing.assert_array_equal(drawn, labels)


def test_objects_that_touch_by_a_corner_are_one() -> None:
    labels = np.array([[1, 0, 0], [0, 1, 2]], np.uint8)
    objects, classes = polygons.find_objects(labels)
    found = polygons.feature_collection(objects, classes, np.ones(labels.shape))["features"]
    assert [(f["geometry"]["type"], f["properties"]["area"]) for f in found] == [("MultiPolygon", 2), ("Polygon", 1)]
    square = [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]
    assert found[0]["geometry"]["coordinates"][0] == [square]


def test_outlines_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "MAX_SIDES", 7)
    objects, classes = polygons.find_objects(np.eye(2, dtype=np.uint8))
    with pytest.raises(polygons.TooLong, match="8 pixel edges; at most 7"):
        polygons.feature_collection(objects, classes, np.ones((2, 2)))
