"""A real server on Ray, with a small untrained model."""

import base64
import hashlib
import io
import json
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import rasterio.features
from PIL import Image

import deepskip
from deepskip.jobs.serving import settings
from tests.jobs.bad_requests import BAD, BODY_SECONDS, GOOD, MAX_BODY, MAX_PIXELS, SLOW, npy, picture, png, tif
from tests.jobs.serving import Server, answers_strangers, refuses_strangers, serving, state

# One worker runs all of these tests, so the server starts once.

# Bad requests must not make the processes grow by more than these bytes.
GROWTH = 48 * 2**20
MAX_WAITING = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ["--max_body_mb", str(MAX_BODY / 1e6), "--max_megapixels", str(MAX_PIXELS / 1e6)]
    limits += ["--body_seconds", str(BODY_SECONDS), "--max_waiting", str(MAX_WAITING)]
    with serving(tmp_path_factory.mktemp("served"), *limits) as started:
        yield started


@pytest.fixture(scope="module")
def segmenter(server: Server) -> deepskip.Predictor:
    return deepskip.load(server.model)


def image_of(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


@pytest.mark.parametrize(
    ("encode", "content_type"),
    [(png, "image/png"), (lambda a: png(a, "JPEG"), "image/jpeg"), (tif, "image/tiff"), (npy, "application/x-npy"),
     (lambda a: npy(a.astype(np.float32) / 7), "application/octet-stream"),
     (lambda a: tif(a.astype(np.uint16) * 99, photometric="rgb"), "application/x-www-form-urlencoded")],
)  # fmt: skip
def test_the_mask_is_what_python_gives(server, segmenter, encode, content_type) -> None:  # type: ignore[no-untyped-def]
    image = picture(61, 83, seed=3)
    data = encode(image)
    reply = server.predict(data, Content_Type=content_type)
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "image/png"
    # Decode the file with other decoders than the server's, unless it is an array.
    seen = (
        image_of(data)
        if content_type == "image/jpeg"
        else np.load(io.BytesIO(data))
        if data[1:6] == b"NUMPY"
        else image
    )
    expected = segmenter.predict(seen * np.uint16(99) if "form" in content_type else seen)
    mask = image_of(reply.body)
    assert 0.02 < (mask > 0).mean() < 0.98
    np.testing.assert_array_equal(mask, expected * 255)
    assert float(reply.headers["deepskip-coverage"]) == pytest.approx(expected.mean(), abs=1e-6)


def test_polygons_and_overlay(server: Server, segmenter: deepskip.Predictor) -> None:
    image = picture(70, 50, seed=5)
    mask = segmenter.predict(image) > 0
    reply = server.predict(png(image), "polygons")
    assert reply.headers["content-type"] == "application/geo+json"
    features = json.loads(reply.body)["features"]
    assert len(features) == int(reply.headers["deepskip-objects"])
    shapes = [(feature["geometry"], 1) for feature in features]
    np.testing.assert_array_equal(rasterio.features.rasterize(shapes, out_shape=mask.shape) > 0, mask)
    laid = image_of(server.predict(png(image), "overlay").body)
    np.testing.assert_array_equal(laid[~mask], image[~mask])
    assert (laid[mask] != image[mask]).any(-1).mean() > 0.99


def test_bad_requests_get_a_reason_and_leave_nothing(server: Server) -> None:
    def check(requests: dict) -> None:  # type: ignore[type-arg]
        for name, (send, status, word) in requests.items():
            reply = send(server)
            assert reply.status == status, (name, reply)
            if not status:
                continue
            # Input that is not HTTP is refused before a reply can be JSON.
            reason = (
                json.loads(reply.body)["error"] if reply.headers["content-type"][-4:] == "json" else reply.body.decode()
            )
            assert reason, name
            assert word in reason, (name, reason)

    assert len(BAD) + len(SLOW) >= 50
    check(BAD | SLOW)
    check(BAD)
    watched = [psutil.Process(server.process.pid), server.replica()]
    before = [process.memory_info().rss for process in watched]
    for _ in range(8):
        check(BAD)
    # The processes are the same, and have the same size.
    grown = [process.memory_info().rss - size for process, size in zip(watched, before, strict=True)]
    assert max(grown) < GROWTH, grown
    assert server.predict(png(GOOD)).status == 200
    assert json.loads(server.ask("GET", "/healthz").body)["waiting"] == 0


def test_more_than_there_is_room_for_is_turned_away_and_none_is_lost(server, segmenter) -> None:  # type: ignore[no-untyped-def]
    images = [picture(400, 400, seed=seed) for seed in range(40)]
    bodies = [png(image) for image in images]
    gate = threading.Barrier(len(images))

    def ask(number: int):  # type: ignore[no-untyped-def]
        gate.wait()
        return server.predict(bodies[number])

    with ThreadPoolExecutor(len(images)) as pool:
        replies = list(pool.map(ask, range(len(images))))
    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= MAX_WAITING
    for image, reply in zip(images, replies, strict=True):
        if reply.status == 429:
            assert reply.headers["retry-after"] == "1"
            assert "the limit; retry later" in json.loads(reply.body)["error"]
            continue
        p = segmenter.predict_proba(image)[..., 0]
        # Images that pass the network together differ in the last bits.
        sure = np.abs(p - 0.5) > 1e-4
        np.testing.assert_array_equal(image_of(reply.body)[sure] > 0, p[sure] > 0.5)
    metrics = server.ask("GET", "/metrics").body.decode()
    counted = {
        int(status): float(count) for status, count in re.findall(r'requests_total{status="(\d+)"} (\S+)', metrics)
    }
    assert counted[429] == statuses[429]
    assert "deepskip_waiting 0.0" in metrics
    alone = float(re.search(r'batch_images_bucket{le="1.0"} (\S+)', metrics)[1])  # type: ignore[index]
    assert alone < float(re.search(r"batch_images_count (\S+)", metrics)[1])  # type: ignore[index]


def test_the_page_and_its_policy(server: Server) -> None:
    reply = server.ask("GET", "/")
    text, policy = reply.body.decode(), reply.headers["content-security-policy"]
    for tag in ("script", "style"):
        contents = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert contents
        digest = base64.b64encode(hashlib.sha256(contents[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    # The page loads nothing from other sites.
    assert "http" not in re.sub(r"http-equiv", "", text)
    about = json.loads(re.search(r'type="application/json">(.*?)<', text)[1])  # type: ignore[index]
    assert about == {"bands": 3, "classes": 1, "token": False}


def test_all_doors_are_on_loopback(server: Server) -> None:
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in server.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address for address, _ in listening} == {"127.0.0.1"}
    with ThreadPoolExecutor(len(listening)) as pool:
        assert not any(pool.map(answers_strangers, {port for _, port in listening}))


def test_ray_takes_no_calls_without_the_token(server: Server) -> None:
    (head,) = (each for each in server.processes() if "gcs_server" in each.name())
    (port,) = {each.laddr.port for each in head.net_connections("inet") if each.status == psutil.CONN_LISTEN}
    assert refuses_strangers(f"127.0.0.1:{port}")


def test_a_replica_that_dies_comes_back(server: Server) -> None:
    server.replica().kill()
    deadline = time.monotonic() + 60
    seen = set()
    while (status := server.predict(png(GOOD)).status) != 200:
        seen.add(status)
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert seen <= {503}
    while json.loads(server.ask("GET", "/healthz").body)["replicas"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_stopped_server_answers_what_it_was_asked(server: Server) -> None:
    processes = server.processes()
    with socket.create_connection(("127.0.0.1", server.port)) as line, ThreadPoolExecutor(1) as pool:
        # The rest of one body is on its way. The rest of the other never comes.
        late = pool.submit(server.send, *pieces(png(GOOD)), pause=0.4)
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        assert late.result().status == 200
    assert server.process.wait(60) == 0
    assert psutil.wait_procs(processes, timeout=30)[1] == []


def pieces(data: bytes) -> tuple[bytes, bytes]:
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    return head + data[:50], data[50:]


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["--host", "0.0.0.0"], "", "host is 0.0.0.0, which other machines reach, and there is no token"),
        (["--host", "0.0.0.0"], "short", "16 or more"),
        (["--token_file", "/nowhere"], "", "token_file is /nowhere"),
        (["--batch", "0"], "", "batch is 0; it must be 1 to 1024"),
        (["--max_held_mb", "1"], "", "one body of max_body_mb"),
        (["--max_waitign", "3"], "", "unknown setting max_waitign (did you mean max_waiting"),
        (["--port", "many"], "", "port is 'many'; it must be"),
        (["--checkpoint", "/nowhere"], "", "/nowhere does not exist"),
    ],
)
def test_bad_settings_end_at_once(arguments, token, message, monkeypatch, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from deepskip import checkpoint
    from deepskip.jobs import serve

    checkpoint.save(state(3, 1), tmp_path / checkpoint.FOLDER / checkpoint.BEST)
    monkeypatch.setenv(settings.VARIABLE, token)
    with pytest.raises(SystemExit) as ended:
        serve.check(["--checkpoint", str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
