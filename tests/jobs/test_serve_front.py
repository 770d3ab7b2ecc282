"""The HTTP server alone, in front of replicas that are functions."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from deepskip.jobs.serving.answers import Answer
from deepskip.jobs.serving.front import Ask, Front, Unavailable
from deepskip.jobs.serving.run import open_front
from deepskip.jobs.serving.settings import ServeConfig
from tests.jobs.bad_requests import GOOD, png

Test = Callable[[Front, str, aiohttp.ClientSession], Awaitable[None]]

WORD = "20-letters-or-so-long"
IMAGE = png(GOOD)


async def give(body: bytes, extension: str, wanted: str) -> Answer:
    return Answer(200, b"mask", batch=1)


def served(test: Test, ask: Ask = give, token: str | None = None, **limits: Any) -> None:
    """Run a test against its own front: test(front, address, session)."""

    async def run() -> None:
        config = ServeConfig(model="none", **limits)
        front = Front(config, token, ask, lambda: 1, {"bands": 3})
        listener = socket.create_server(("127.0.0.1", 0))
        runner, _ = await open_front(front.application(), listener)
        async with aiohttp.ClientSession() as session:
            await test(front, f"http://127.0.0.1:{listener.getsockname()[1]}", session)
        await runner.cleanup()
        assert (front.waiting, front.held, front.open) == (0, 0, 0)

    asyncio.run(run())


async def predict(session: aiohttp.ClientSession, address: str, body: Any = IMAGE, **headers: str) -> tuple[int, Any]:
    async with session.post(f"{address}/predict", data=body, headers=headers) as reply:
        return reply.status, await reply.read() if reply.status == 200 else (await reply.json())["error"]


def test_a_token_is_asked_for() -> None:
    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        right = {"Authorization": f"Bearer {WORD}"}
        assert (await predict(session, address, Host="any.name.example", **right))[0] == 200
        for wrong in (
            {},
            {"Authorization": f"Bearer {WORD.upper()}"},
            {"Authorization": WORD},
            {"Authorization": "Bearer \xe9"},
        ):
            for method, path in (("POST", "/predict"), ("GET", "/metrics"), ("GET", "/nowhere")):
                async with session.request(method, address + path, headers=wrong) as reply:
                    assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, "Bearer")
        # The page asks for the token, and probes have none.
        async with session.get(f"{address}/") as page, session.get(f"{address}/healthz") as health:
            assert '"token": true' in await page.text()
            assert (await health.json())["replicas"] == 1

    served(test, token=WORD)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.9", 200), ("[::1]:8000", 200), ("10.0.0.1", 403),
     ("127.0.0.1.evil.example", 403), ("localhost.evil.example:8000", 403), ("", 403), ("[::2]", 403)],
)  # fmt: skip
def test_without_a_token_names_of_others_are_refused(host: str, status: int) -> None:
    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        assert (await predict(session, address, Host=host))[0] == status

    served(test)


HERE = {"Host": "localhost:8000"}


SITES: list[tuple[dict[str, str], int]] = [
    ({"Origin": "http://localhost:8000"}, 200), ({"Origin": "https://LOCALHOST:8000"}, 200),
    ({}, 200),
     ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:8000"}, 200), ({"Sec-Fetch-Site": "none"}, 200),
     ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": ""}, 403),
     ({"Origin": "http://localhost:8001"}, 403), ({"Origin": "http://localhost"}, 403),
     ({"Origin": "http://localhost:8000.evil.example"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403),
     ({"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": "Cross-Site", "Sec-Fetch-Mode": "navigate"}, 403)]  # fmt: skip


@pytest.mark.parametrize(("headers", "status"), SITES)
def test_pages_of_other_sites_are_refused(headers: dict[str, str], status: int) -> None:
    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        found, reason = await predict(session, address, **HERE, **headers, Authorization=f"Bearer {WORD}")
        assert found == status
        assert status == 200 or "page of another site" in reason

    served(test)
    served(test, token=WORD)


def test_a_link_of_another_site_may_lead_to_the_page_and_to_nothing_else() -> None:
    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        link = HERE | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        for path, mode, status in (
            ("/", "navigate", 200), ("/", "no-cors", 403), ("/metrics", "navigate", 403), ("/healthz", "navigate", 403),
        ):  # fmt: skip
            async with session.get(address + path, headers=link | {"Sec-Fetch-Mode": mode}) as reply:
                assert reply.status == status

    served(test)


NO_HTTP = (
    b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 20_000 + b"\r\n\r\n", b"PO\nST / HTTP/1.1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nabcde\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nAccept: text/html\r\nHost: <script>\r\nbad header\r\n\r\n",
)  # fmt: skip


@pytest.mark.parametrize("sent", NO_HTTP)
def test_what_is_no_http_is_answered_in_json_and_without_a_version(sent: bytes) -> None:
    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.split(":")[-1]))
        writer.write(sent)
        head, _, body = (await asyncio.wait_for(reader.read(), 30)).partition(b"\r\n\r\n")
        assert head.split()[1].startswith(b"4")
        assert b"Content-Type: application/json" in head
        assert json.loads(body)["error"]
        assert b"Server: DeepSkip" in head
        assert not any(word in head + body for word in (b"aiohttp", b"Python", b"<html", b"Traceback"))
        writer.close()

    served(test)


def test_connections_that_do_not_read_are_let_go() -> None:
    async def ask_without_reading(address: str, path: str) -> None:
        with socket.socket() as sock:
            # The buffer is small. Otherwise, the kernel would take all of it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", int(address.split(":")[-1])))
            while True:
                await loop.sock_sendall(sock, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 1000)

    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        asking = [ask_without_reading(address, path) for path in ("/", "/metrics", "/nowhere")]
        ended = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 60)
        assert all(isinstance(error, ConnectionError) for error in ended), ended

    served(test, body_seconds=0.5)


def test_what_replicas_do_wrong() -> None:
    async def ask(body: bytes, extension: str, wanted: str) -> Answer:
        if len(body) == len(IMAGE):
            raise Unavailable("ActorDiedError")
        if len(body) == len(IMAGE) + 1:
            await asyncio.sleep(60)
        raise RuntimeError("a secret of the code")

    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        assert await predict(session, address) == (503, "no replica of the model answers: ActorDiedError")
        assert await predict(session, address, IMAGE + b"1") == (504, "there was no answer after 0.2 s")
        status, reason = await predict(session, address, IMAGE + b"12")
        assert status == 500
        assert "secret" not in reason

    served(test, ask, answer_seconds=0.2)


def test_bytes_that_are_held_count() -> None:
    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(address.split(":")[-1]))
        writer.write(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n\r\n" + bytes(139_000))
        while front.held < 139_000:
            await asyncio.sleep(0.01)
        status, reason = await predict(session, address, IMAGE + bytes(5000))
        assert status == 429
        assert "of other requests are held" in reason
        assert front.held == 139_000
        writer.close()
        while front.held:
            await asyncio.sleep(0.01)
        assert (await predict(session, address))[0] == 200

    served(test, max_held_mb=0.14, max_body_mb=1)


def test_an_answer_that_nobody_takes_is_let_go() -> None:
    async def ask(body: bytes, extension: str, wanted: str) -> Answer:
        return Answer(200, bytes(50_000_000), batch=1)

    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(address.split(":")[-1]), limit=1000)
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(IMAGE)}\r\n\r\n"
        writer.write(head.encode() + IMAGE)
        while not front.held > 10**7:
            await asyncio.sleep(0.01)
        started = asyncio.get_running_loop().time()
        while front.held:
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - started < 5
        writer.close()

    served(test, ask, body_seconds=0.3)


def test_whoever_leaves_makes_room() -> None:
    left = []

    async def ask(body: bytes, extension: str, wanted: str) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            left.append(body)
            raise
        raise AssertionError

    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(predict(session, address), 0.3)
        while front.waiting:
            await asyncio.sleep(0.01)
        assert left == [IMAGE]

    served(test, ask)


def test_who_asks_before_sending_is_told_at_once() -> None:
    async def test(front: Front, address: str, session: aiohttp.ClientSession) -> None:
        for length, first in (
            (len(IMAGE), b"HTTP/1.1 100 Continue\r\n"),
            (10**9, b"HTTP/1.1 413 Request Entity Too Large\r\n"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(address.split(":")[-1]))
            head = (
                f"POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
            )
            writer.write(head.encode())
            assert await reader.readline() == first
            if b"100" in first:
                writer.write(IMAGE)
                assert await reader.readline() == b"\r\n"
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            writer.close()

    served(test)
