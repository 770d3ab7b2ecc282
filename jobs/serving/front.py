"""The HTTP server in front of the replicas.

It is not Serve's own proxy: that reads a body as fast as it comes, however large, into a queue without an end, and gives a
place in a replica to a request whose body has not come yet. Here a request is refused by its head where that is possible, its
body is counted while it comes, and it reaches a replica when it is whole. One front feeds all replicas of the cluster.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from deepskip.jobs.serving import page
from deepskip.jobs.serving.answers import FORMATS, Answer
from deepskip.jobs.serving.metrics import Metrics
from deepskip.jobs.serving.settings import ServeConfig, is_loopback_address

# how an image begins, the kind of file it is, and its content types
KINDS = (
    (b"\x89PNG\r\n\x1a\n", "png", ("image/png",)),
    (b"\xff\xd8\xff", "jpg", ("image/jpeg", "image/jpg")),
    (b"II*\x00", "tif", ("image/tiff",)),
    (b"MM\x00*", "tif", ("image/tiff",)),
    (b"II+\x00", "tif", ("image/tiff",)),
    (b"MM\x00+", "tif", ("image/tiff",)),
    (b"\x93NUMPY", "npy", ("application/x-npy", "application/npy")),
)
# content types that do not say what the body is; the last is what curl sends where it is told none
UNSAID = ("", "application/octet-stream", "application/x-www-form-urlencoded")
TAKEN = "PNG, JPEG, TIFF and .npy"

# versions are nobody's business
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Server": "DeepSkip"}

logger = logging.getLogger(__name__)
# who is turned away is told so after this: those who ask again at once would take the CPU from those who are served
PAUSE_SECONDS = 0.2

Ask = Callable[[bytes, str, str], Awaitable[Answer]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """A request that gets no image; holds the status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Unavailable(Exception):
    """No replica could answer; says why."""


class Front:
    """The server: ask(body, extension, format) brings a request to a replica; health() says how many are up."""

    def __init__(
        self, config: ServeConfig, token: str | None, ask: Ask, health: Callable[[], int], about: dict[str, Any]
    ) -> None:
        self.config, self.token, self.ask, self.health, self.about = config, token, ask, health, about
        self.metrics = Metrics()
        # requests of any kind that are under way, those that have their body and no answer yet, and bytes of bodies and answers
        self.open = self.waiting = self.held = 0
        self.stopping = False

    def application(self) -> web.Application:
        """Makes the aiohttp application."""
        app = web.Application(middlewares=[self.guard])
        app.on_response_prepare.append(add_headers)
        app.router.add_get("/", self.show_page)
        app.router.add_post("/predict", self.predict, expect_handler=self.expect)
        app.router.add_get("/healthz", self.show_health)
        app.router.add_get("/metrics", self.show_metrics)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets in who may come in, turns refusals into answers that say why, and counts."""
        started = time.perf_counter()
        self.open += 1
        try:
            if self.stopping:
                raise Refused(503, "this server is being stopped")
            self.check_caller(request)
            response = await handler(request)
        except Refused as error:
            if error.status == 429:
                await asyncio.sleep(PAUSE_SECONDS)
            response = refusal(error.status, error.reason)
        except web.HTTPException as error:
            # aiohttp's own, of wrong paths and methods
            response = refusal(error.status, f"{request.method} {request.path}: {error.reason}")
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception:
            # ours, and no reason to end
            logger.exception("%s %s failed", request.method, request.path)
            response = refusal(500, "the server failed at this request; its log says more")
        finally:
            self.open -= 1
        if self.stopping:
            response.force_close()
        if request.path == "/predict":
            self.metrics.requests.labels(str(response.status)).inc()
            if response.status == 200:
                self.metrics.seconds.observe(time.perf_counter() - started)
        await self.send(request, response)
        return response

    async def send(self, request: web.Request, response: web.StreamResponse) -> None:
        """Sends an answer; a client that does not take it must not keep it here, nor the connection."""
        size = response.content_length or 0
        self.held += size
        try:
            async with asyncio.timeout(self.config.body_seconds):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            # it has left
            pass
        finally:
            self.held -= size

    def check_caller(self, request: web.Request) -> None:
        """Raises Refused where a page of another site is asking, or the token is missing or wrong."""
        check_site(request)
        if self.token is None:
            # a foreign name that was made to lead here is how web pages get at servers on loopback
            name = request.host[1:].split("]")[0] if request.host.startswith("[") else request.host.split(":")[0]
            if name.lower() not in ("localhost", self.config.host.lower()) and not is_loopback_address(name):
                raise Refused(403, f"this server answers to the names of this machine's loopback, not to {name!r}")
            return
        if request.path in ("/", "/healthz"):
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(errors="surrogateescape"), self.token.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refused(401, "the token is missing or wrong; send it as: Authorization: Bearer TOKEN")

    async def expect(self, request: web.Request) -> None:
        """Says "100 Continue" only where the head of a request is not refused already."""
        try:
            self.check_caller(request)
            self.check_head(request)
        except Refused:
            # the handler finds the same
            return
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0

    async def predict(self, request: web.Request) -> web.Response:
        """Answers POST /predict: an image in the body, ?format= as in answers.FORMATS."""
        wanted, declared = self.check_head(request)
        body = bytearray()
        try:
            await self.read_body(request, body)
            extension = kind_of(body, declared)
            answer = await self.ask_replica(bytes(body), extension, wanted)
        finally:
            self.held -= len(body)
        if answer.status != 200:
            raise Refused(answer.status, answer.reason)
        return self.response_of(answer, wanted)

    def response_of(self, answer: Answer, wanted: str) -> web.Response:
        """Makes the HTTP response of an answer, and counts it."""
        self.metrics.observe(answer)
        timing = ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in answer.seconds.items())
        headers = {
            "Server-Timing": timing,
            "DeepSkip-Objects": str(answer.objects),
            "DeepSkip-Coverage": f"{answer.coverage:.6f}",
        }
        return web.Response(body=answer.body, content_type=FORMATS[wanted], headers=headers)

    def check_head(self, request: web.Request) -> tuple[str, str]:
        """Gives the format wanted and the content type; raises Refused by what the head of a request tells."""
        unknown = sorted(set(request.query) - {"format"})
        wanted = request.query.get("format", "mask")
        if unknown or wanted not in FORMATS or len(request.query.getall("format", [])) > 1:
            raise Refused(400, f"the query is ?{request.query_string}; it may be ?format= {', '.join(FORMATS)}")
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise Refused(415, f"the body is encoded as {encoding}; send the image as it is")
        declared = request.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if declared not in UNSAID and not any(declared in types for *_, types in KINDS):
            raise Refused(415, f"the content type is {declared}; the body must be the bytes of one image: {TAKEN}")
        length = request.content_length
        if length == 0 or not request.can_read_body:
            raise Refused(400, f"there is no body; it must be the bytes of one image: {TAKEN}")
        if length is not None and length > self.config.max_body:
            raise Refused(413, f"the body has {length} bytes; at most {self.config.max_body} are taken")
        self.check_room()
        return wanted, declared

    def check_room(self) -> None:
        """Raises Refused where as many requests or bytes are held as may be."""
        if self.waiting >= self.config.max_waiting:
            raise Refused(429, f"{self.waiting} requests are waiting, as many as may; come back later")
        if self.held > self.config.max_held_mb * 1e6:
            raise Refused(429, f"{self.held} bytes of other requests are held, as many as may; come back later")

    async def read_body(self, request: web.Request, body: bytearray) -> None:
        """Reads the body into `body` and counts it; raises Refused where it is too slow, too large or cut off."""
        try:
            async with asyncio.timeout(self.config.body_seconds):
                while chunk := await request.content.readany():
                    body += chunk
                    self.held += len(chunk)
                    if len(body) > self.config.max_body:
                        raise Refused(413, f"the body has more than {self.config.max_body} bytes")
                    self.check_room()
        except TimeoutError:
            raise Refused(
                408, f"the body was not whole after {self.config.body_seconds:g} s; {len(body)} bytes came"
            ) from None
        except (web.RequestPayloadError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise Refused(400, f"the body broke off after {len(body)} bytes: {error}") from None
        if not body:
            raise Refused(400, f"there is no body; it must be the bytes of one image: {TAKEN}")

    async def ask_replica(self, body: bytes, extension: str, wanted: str) -> Answer:
        """Brings a whole request to a replica; raises Refused where there is no room or no answer."""
        self.check_room()
        self.waiting += 1
        self.metrics.waiting.set(self.waiting)
        try:
            async with asyncio.timeout(self.config.answer_seconds):
                return await self.ask(body, extension, wanted)
        except TimeoutError:
            raise Refused(504, f"there was no answer after {self.config.answer_seconds:g} s") from None
        except Unavailable as error:
            raise Refused(503, f"no replica of the model answers: {error}") from None
        finally:
            self.waiting -= 1
            self.metrics.waiting.set(self.waiting)

    async def finish(self, seconds: float) -> None:
        """Turns new requests away, and waits until those under way are answered, for at most so long."""
        self.stopping = True
        deadline = time.monotonic() + seconds
        while self.open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def show_page(self, request: web.Request) -> web.Response:
        """Answers GET /: the page for people."""
        text, policy = page.build(self.about | {"token": self.token is not None})
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def show_health(self, request: web.Request) -> web.Response:
        """Answers GET /healthz: 200 while a replica is up."""
        up = self.health()
        return web.json_response({"replicas": up, "waiting": self.waiting} | self.about, status=200 if up else 503)

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Answers GET /metrics, for Prometheus."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": self.metrics.content_type})


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Adds to every answer what a browser should not do with it."""
    response.headers.update(HEADERS)


def check_site(request: web.Request) -> None:
    """Raises Refused where a browser says that a page of another site is asking; a link to the server's own page may lead here.

    Browsers send what such a page asks without asking anybody, and say so in these headers, which pages cannot change.
    """
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "none").lower()
    foreign = origin is not None and origin.lower() not in (
        f"{scheme}://{request.host.lower()}" for scheme in ("http", "https")
    )
    followed = request.path == "/" and request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"
    if foreign or (site not in ("same-origin", "none") and not followed):
        raise Refused(403, "a page of another site is asking; only this server's own page and programs may")


def answer_in_json() -> None:
    """Has aiohttp answer what is no HTTP as all else is answered: in JSON, and without its version."""

    def handle_error(
        self: web.RequestHandler, request: web.BaseRequest, status: int = 500,
        exc: BaseException | None = None, message: str | None = None,
    ) -> web.StreamResponse:  # fmt: skip
        # some of an answer has been sent already
        if request.writer.output_size > 0:
            raise ConnectionError("the answer broke off")
        reason = str(message or exc or "").strip().splitlines()
        response = refusal(status, f"the request cannot be read: {reason[0][:200] if reason else 'it is no HTTP'}")
        response.headers.update(HEADERS)
        response.force_close()
        return response

    web.RequestHandler.handle_error = handle_error  # type: ignore[method-assign]


def kind_of(body: bytes | bytearray, declared: str) -> str:
    """Finds out what kind of file a body is; raises Refused where it is none that is taken, or not the declared one."""
    for start, extension, types in KINDS:
        if body.startswith(start):
            if declared not in UNSAID and declared not in types:
                raise Refused(415, f"the content type is {declared}, but the body begins as {types[0]} does")
            return extension
    raise Refused(415, f"the body begins with {bytes(body[:8])!r}, as no {TAKEN} does")


def refusal(status: int, reason: str) -> web.Response:
    """Makes an answer that says why there is no other."""
    headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}
    return web.Response(
        status=status, text=json.dumps({"error": reason}) + "\n", content_type="application/json",
        headers=headers.get(status, {}),
    )  # fmt: skip
