"""The HTTP server in front of the replicas.

It replaces Ray Serve's proxy. That proxy reads bodies of any size, as fast as they come, into an unbounded queue. It also
assigns a replica to a request whose body has not arrived. Here a request is refused by its headers if possible. Its body is
counted while it arrives, and only a complete request goes to a replica. One front feeds all replicas of the cluster.
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
from deepskip.jobs.serving.following import Following
from deepskip.jobs.serving.metrics import Metrics
from deepskip.jobs.serving.settings import ServeConfig, is_loopback_address

# The first bytes of an image file, its extension, and its content types.
KINDS = (
    (b"\x89PNG\r\n\x1a\n", "png", ("image/png",)),
    (b"\xff\xd8\xff", "jpg", ("image/jpeg", "image/jpg")),
    (b"II*\x00", "tif", ("image/tiff",)),
    (b"MM\x00*", "tif", ("image/tiff",)),
    (b"II+\x00", "tif", ("image/tiff",)),
    (b"MM\x00+", "tif", ("image/tiff",)),
    (b"\x93NUMPY", "npy", ("application/x-npy", "application/npy")),
)
# Content types that do not say what the body is. The last is curl's default.
UNSAID = ("", "application/octet-stream", "application/x-www-form-urlencoded")
TAKEN = "PNG, JPEG, TIFF and .npy"

# The Server header has no version, which would help attackers.
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Server": "DeepSkip"}

logger = logging.getLogger(__name__)
# A refusal with status 429 is sent after this delay: clients that retry at once would take the CPU from those being served.
PAUSE_SECONDS = 0.2

Ask = Callable[[bytes, str, str], Awaitable[Answer]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status of the answer.
        reason: what is wrong with the request, and what to do.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Unavailable(Exception):
    """Raised if no replica could answer; the message is the reason."""


class Front:
    """The HTTP server.

    Attributes:
        config: the server's settings.
        token: what requests must carry; None if the server needs no token.
        ask: sends a request (body, file extension, format) to a replica, and returns its answer; may raise Unavailable.
        health: returns the number of replicas that are up.
        about: what the page and /healthz report on the model.
        following: the published models that are taken over; None if the model is not a published one.
        metrics: the server's metrics, for Prometheus.
        open: number of requests in progress, of any kind.
        waiting: number of requests whose body is complete and that have no answer yet.
        held: bytes of bodies and answers in memory.
        stopping: whether the server is shutting down, and refuses new requests.
    """

    def __init__(
        self,
        config: ServeConfig,
        token: str | None,
        ask: Ask,
        health: Callable[[], int],
        about: dict[str, Any],
        following: Following | None = None,
    ) -> None:
        self.config, self.token, self.ask, self.health, self.about = config, token, ask, health, about
        self.following = following
        self.metrics = Metrics()
        self.open = self.waiting = self.held = 0
        self.stopping = False

    def application(self) -> web.Application:
        """Return the aiohttp application with its routes."""
        app = web.Application(middlewares=[self.guard])
        app.on_response_prepare.append(add_headers)
        app.router.add_get("/", self.show_page)
        app.router.add_post("/predict", self.predict, expect_handler=self.expect)
        app.router.add_get("/healthz", self.show_health)
        app.router.add_get("/metrics", self.show_metrics)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer a request; it counts as open until its answer is sent.

        Args:
            request: the request.
            handler: aiohttp's handler of the route.

        Returns:
            The answer, which has been sent.
        """
        self.open += 1
        try:
            return await self.answer(request, handler)
        finally:
            self.open -= 1

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the caller, turn refusals and errors into JSON answers, send the answer, and update the metrics.

        Args:
            request: the request.
            handler: aiohttp's handler of the route.

        Returns:
            The answer, which has been sent.
        """
        started = time.perf_counter()
        try:
            if self.stopping:
                raise Refused(503, "this server is shutting down")
            self.check_caller(request)
            response = await handler(request)
        except Refused as error:
            if error.status == 429:
                await asyncio.sleep(PAUSE_SECONDS)
            response = refusal(error.status, error.reason)
        except web.HTTPException as error:
            # aiohttp raises these for wrong paths and methods.
            response = refusal(error.status, f"{request.method} {request.path}: {error.reason}")
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception:
            # A bug in the server must not end it.
            logger.exception("%s %s failed", request.method, request.path)
            response = refusal(500, "the server failed on this request; its log has the reason")
        if self.stopping:
            response.force_close()
        if request.path == "/predict":
            self.metrics.requests.labels(str(response.status)).inc()
            if response.status == 200:
                self.metrics.seconds.observe(time.perf_counter() - started)
        await self.send(request, response)
        return response

    async def send(self, request: web.Request, response: web.StreamResponse) -> None:
        """Send an answer; close the connection if the client does not receive it within body_seconds.

        Otherwise slow clients would keep answers in memory.
        """
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
            # The client has closed the connection.
            pass
        finally:
            self.held -= size

    def check_caller(self, request: web.Request) -> None:
        """Check where a request comes from, and its token.

        Args:
            request: the request.

        Raises:
            Refused: if the request comes from a page of another site (403), or if the token is missing or wrong (401). A
                server without a token also refuses host names other than loopback's (403).
        """
        check_site(request)
        if self.token is None:
            # DNS rebinding: a web page can reach a server on loopback by a name of its own that resolves to 127.0.0.1.
            name = request.host[1:].split("]")[0] if request.host.startswith("[") else request.host.split(":")[0]
            if name.lower() not in ("localhost", self.config.host.lower()) and not is_loopback_address(name):
                raise Refused(403, f"a server without a token accepts only loopback host names, not {name!r}")
            return
        if request.path in ("/", "/healthz"):
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(errors="surrogateescape"), self.token.encode())
        if scheme.lower() != "bearer" or not same:
            raise Refused(401, "the token is missing or wrong; send it as: Authorization: Bearer TOKEN")

    async def expect(self, request: web.Request) -> None:
        """Send "100 Continue" unless the headers of the request are refused already."""
        try:
            self.check_caller(request)
            self.check_head(request)
        except Refused:
            # The handler repeats these checks and sends the refusal.
            return
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0

    async def predict(self, request: web.Request) -> web.Response:
        """Answer POST /predict: an image in the body, and optionally ?format=, a key of answers.FORMATS.

        Raises:
            Refused: if the request is not valid, there is no room for it, or there is no answer.
        """
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
        """Return the HTTP response of an answer, and add it to the metrics."""
        self.metrics.observe(answer)
        timing = ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in answer.seconds.items())
        headers = {
            "Server-Timing": timing,
            "DeepSkip-Objects": str(answer.objects),
            "DeepSkip-Coverage": f"{answer.coverage:.6f}",
        }
        if answer.model:
            headers["DeepSkip-Model"] = answer.model
        return web.Response(body=answer.body, content_type=FORMATS[wanted], headers=headers)

    def check_head(self, request: web.Request) -> tuple[str, str]:
        """Check the query and the headers of a request to /predict, and whether there is room for it.

        Args:
            request: the request; its body need not have arrived.

        Returns:
            The format of the answer, a key of answers.FORMATS, and the declared content type in lower case, or "".

        Raises:
            Refused: for a wrong query or an empty body (400), and for a body that is too large (413). Also for an encoded
                body or another content type (415), and if the server is full (429).
        """
        unknown = sorted(set(request.query) - {"format"})
        wanted = request.query.get("format", "mask")
        if unknown or wanted not in FORMATS or len(request.query.getall("format", [])) > 1:
            raise Refused(
                400, f"the query is ?{request.query_string}; it must be ?format= and one of {', '.join(FORMATS)}"
            )
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise Refused(415, f"the body is encoded as {encoding}; send the image without Content-Encoding")
        declared = request.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if declared not in UNSAID and not any(declared in types for *_, types in KINDS):
            raise Refused(415, f"the content type is {declared}; the body must be the bytes of one image: {TAKEN}")
        length = request.content_length
        if length == 0 or not request.can_read_body:
            raise Refused(400, f"there is no body; it must be the bytes of one image: {TAKEN}")
        if length is not None and length > self.config.max_body:
            raise Refused(413, f"the body has {length} bytes; at most {self.config.max_body} are accepted")
        self.check_room()
        return wanted, declared

    def check_room(self) -> None:
        """Check that the server is not full.

        Raises:
            Refused: if max_waiting requests wait for an answer, or more than max_held_mb are in memory (429).
        """
        if self.waiting >= self.config.max_waiting:
            raise Refused(429, f"{self.waiting} requests are waiting, which is the limit; retry later")
        if self.held > self.config.max_held_mb * 1e6:
            raise Refused(429, f"{self.held} bytes of other requests are held, which is over the limit; retry later")

    async def read_body(self, request: web.Request, body: bytearray) -> None:
        """Read the body of a request, and add its size to `held` while it arrives.

        Args:
            request: the request.
            body: receives the bytes, also if this raises.

        Raises:
            Refused: if the body is not complete within body_seconds (408), is too large (413), is empty or ends early (400).
                Also if the server becomes full meanwhile (429).
        """
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
                408, f"the body was not complete after {self.config.body_seconds:g} s; {len(body)} bytes came"
            ) from None
        except (web.RequestPayloadError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise Refused(400, f"the body ended early, after {len(body)} bytes: {error}") from None
        if not body:
            raise Refused(400, f"there is no body; it must be the bytes of one image: {TAKEN}")

    async def ask_replica(self, body: bytes, extension: str, wanted: str) -> Answer:
        """Send a complete request to a replica, and wait for its answer.

        Args:
            body: bytes of the image file.
            extension: kind of image file, as in KINDS.
            wanted: format of the answer, a key of answers.FORMATS.

        Returns:
            The replica's answer.

        Raises:
            Refused: if the server is full (429), no replica answers (503), or the answer takes longer than answer_seconds
                (504).
        """
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
        """Refuse new requests, and wait until those in progress are answered, or until `seconds` have passed."""
        self.stopping = True
        deadline = time.monotonic() + seconds
        while self.open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def show_page(self, request: web.Request) -> web.Response:
        """Answer GET /: the web page for people."""
        text, policy = page.build(self.about | {"token": self.token is not None})
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def show_health(self, request: web.Request) -> web.Response:
        """Answer GET /healthz: status 200 while a replica is up, else 503."""
        up = self.health()
        told = {} if self.following is None else self.following.state()
        return web.json_response(
            {"replicas": up, "waiting": self.waiting} | self.about | told, status=200 if up else 503
        )

    async def show_metrics(self, request: web.Request) -> web.Response:
        """Answer GET /metrics, in Prometheus's text format."""
        return web.Response(body=self.metrics.text(), headers={"Content-Type": self.metrics.content_type})


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add to every answer the headers that forbid browsers to guess its type and to store it."""
    response.headers.update(HEADERS)


def check_site(request: web.Request) -> None:
    """Check that a request does not come from a page of another site; a link to the server's own page is allowed.

    Browsers send such requests without the user's consent. They name the origin in the headers Origin and Sec-Fetch-Site, which
    pages cannot change.

    Raises:
        Refused: if the headers name another site (403).
    """
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "none").lower()
    foreign = origin is not None and origin.lower() not in (
        f"{scheme}://{request.host.lower()}" for scheme in ("http", "https")
    )
    followed = request.path == "/" and request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"
    if foreign or (site not in ("same-origin", "none") and not followed):
        raise Refused(
            403, "this comes from a page of another site; only this server's own page and programs may send requests"
        )


def answer_in_json() -> None:
    """Make aiohttp answer requests that are not valid HTTP like all others: in JSON, and without its version.

    This replaces `aiohttp.web.RequestHandler.handle_error` for the whole process.
    """

    def handle_error(
        self: web.RequestHandler, request: web.BaseRequest, status: int = 500,
        exc: BaseException | None = None, message: str | None = None,
    ) -> web.StreamResponse:  # fmt: skip
        # Part of an answer has been sent already, so no other can follow.
        if request.writer.output_size > 0:
            raise ConnectionError("the answer was interrupted")
        reason = str(message or exc or "").strip().splitlines()
        response = refusal(status, f"the request cannot be read: {reason[0][:200] if reason else 'it is not HTTP'}")
        response.headers.update(HEADERS)
        response.force_close()
        return response

    web.RequestHandler.handle_error = handle_error  # type: ignore[method-assign]


def kind_of(body: bytes | bytearray, declared: str) -> str:
    """Return the kind of image file that a body is, from its first bytes.

    Args:
        body: the bytes of the file.
        declared: content type of the request, in lower case, or "".

    Returns:
        The file extension, as in KINDS.

    Raises:
        Refused: if it is none of these kinds, or not the declared one (415).
    """
    for start, extension, types in KINDS:
        if body.startswith(start):
            if declared not in UNSAID and declared not in types:
                raise Refused(415, f"the content type is {declared}, but the body begins as {types[0]} does")
            return extension
    raise Refused(415, f"the body begins with {bytes(body[:8])!r}; only {TAKEN} are accepted")


def refusal(status: int, reason: str) -> web.Response:
    """Return the JSON answer of a refused request: {"error": reason}, with the headers that belong to the status."""
    headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}
    return web.Response(
        status=status, text=json.dumps({"error": reason}) + "\n", content_type="application/json",
        headers=headers.get(status, {}),
    )  # fmt: skip
