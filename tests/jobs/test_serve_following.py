"""A real server takes over better models while clients send requests: none is lost, and each answer is of one model."""

import hashlib
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import deepskip
from deepskip import publishing
from deepskip.jobs import models
from deepskip.publishing import Publisher
from tests.deepskip.test_publishing import validated
from tests.jobs.bad_requests import picture, png
from tests.jobs.serving import Reply, Server, serving

IMAGE = picture(48, 64, seed=5)


def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def health(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(server.ask("GET", "/healthz").body)
    return found


def publish(place: Path, iou: float, step: int) -> str:
    """Publish a model, and return its digest."""
    pointer = Publisher(place, 0).publish(validated(iou, step))
    assert pointer is not None
    return pointer.sha256


def test_better_models_are_taken_over_without_losing_a_request(tmp_path: Path) -> None:
    place, replies, ended = tmp_path / "published", [list[Reply](), list[Reply]()], threading.Event()
    first = publish(place, 0.5, 0)
    settings = ["--checkpoint", str(place), "--follow_seconds", "0.1"]

    def send(own: list[Reply]) -> None:
        while not ended.is_set():
            own.append(server.predict(png(IMAGE)))

    def newest(sha256: str) -> bool:
        return all(own and own[-1].headers.get("deepskip-model") == sha256 for own in replies)

    with serving(tmp_path / "run", *settings) as server:
        clients = [threading.Thread(target=send, args=(own,)) for own in replies]
        for client in clients:
            client.start()
        try:
            until(lambda: newest(first))
            second = publish(place, 0.6, 1)
            until(lambda: newest(second))
            # A model that is half-written, and then a pointer that is.
            text = (place / publishing.POINTER).read_text()
            data = (place / publishing.name_of(second)).read_bytes()
            absent = hashlib.sha256(b"whole").hexdigest()
            (place / publishing.name_of(absent)).write_bytes(data[: len(data) // 2])
            (place / publishing.POINTER).write_text(json.dumps(json.loads(text) | {"sha256": absent}))
            until(lambda: f"{absent}.safetensors is damaged or incomplete" in health(server)["fault"])
            (place / publishing.POINTER).write_text(text[:50])
            until(lambda: "published.json is damaged" in health(server)["fault"])
            counts = [len(own) for own in replies]
            until(lambda: all(len(own) > count + 2 for own, count in zip(replies, counts, strict=True)))
            assert health(server)["model"] == second
            third = publish(place, 0.7, 2)
            until(lambda: newest(third))
            until(lambda: health(server)["fault"] == "")
            # A replica that is started again begins with the newest model.
            ended.set()
            for client in clients:
                client.join()
            server.replica().kill()
            until(lambda: server.predict(png(IMAGE)).status == 200)
            assert server.predict(png(IMAGE)).headers["deepskip-model"] == third
        finally:
            ended.set()
        assert "damaged or incomplete" in (tmp_path / "run" / "serve.log").read_text()
    expected = {
        sha256: 255 * deepskip.load(place / publishing.name_of(sha256)).predict(IMAGE)
        for sha256 in (first, second, third)
    }
    assert len({mask.tobytes() for mask in expected.values()}) == 3
    # Other commands name the published model in the same way.
    np.testing.assert_array_equal(255 * models.load(place).predict(IMAGE), expected[third])
    for own in replies:
        assert {reply.status for reply in own} == {200}
        order = [(first, second, third).index(reply.headers["deepskip-model"]) for reply in own]
        assert order == sorted(order)
        assert set(order) == {0, 1, 2}
        for reply in own:
            mask = np.asarray(Image.open(io.BytesIO(reply.body)))
            np.testing.assert_array_equal(mask, expected[reply.headers["deepskip-model"]])
