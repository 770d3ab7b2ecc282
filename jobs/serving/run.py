"""Start a server on Ray, and stop it again."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from deepskip.checkpoint import NetworkState
from deepskip.cluster.settings import of_loopback
from deepskip.data_shards import storage
from deepskip.data_shards.pictures import Reading
from deepskip.jobs.serving.answers import Answer
from deepskip.jobs.serving.following import Following
from deepskip.jobs.serving.front import Front, Unavailable, answer_in_json
from deepskip.jobs.serving.settings import ServeConfig
from deepskip.jobs.settings import stop

APPLICATION = "deepskip"
# A connection without a complete request for this time is closed.
IDLE_SECONDS = 20
# Requests in progress when the server is stopped have this long to finish.
LAST_SECONDS = 10.0
# The rest of a refused request's body is read and discarded for up to this long, so that the client receives the refusal.
LINGER_SECONDS = 5.0
WATCH_SECONDS = 1.0


def serve(config: ServeConfig, token: str | None, state: NetworkState, sha256: str = "") -> None:
    """Serve a model until SIGTERM or SIGINT.

    Args:
        config: the server's settings.
        token: what requests must carry; None if the server needs no token.
        state: the model's checkpoint.
        sha256: digest of a published model, whose successors are taken over; "" for another one.

    Raises:
        SystemExit: if the server cannot start, for example because the port is in use; an `error:` line is printed.
    """
    # The port is checked first, since Ray takes seconds to start.
    listener = listen(config)
    following = Following(config.model, sha256, state["data"], config.follow_seconds) if sha256 else None
    with replicas(config, state, sha256) as handle:
        asyncio.run(answer(config, token, listener, handle, following))


@contextmanager
def replicas(config: ServeConfig, state: NetworkState, sha256: str = "") -> Iterator[Any]:
    """Start Ray, or join the cluster at RAY_ADDRESS, and run the replicas on it while the block runs.

    Args:
        config: the server's settings.
        state: the model's checkpoint.
        sha256: digest of a published model; "" for another one.

    Yields:
        Ray Serve's handle to the replicas.

    Raises:
        SystemExit: if Ray does not start, or has no room for the replicas; an `error:` line is printed.
    """
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    settings |= of_loopback(os.environ.get("RAY_ADDRESS"))
    for name, value in settings.items():
        os.environ.setdefault(name, value)

    import ray
    from ray import serve as ray_serve

    from deepskip.jobs.training import allocation

    allocation.start_ray()
    try:
        yield deploy(config, state, sha256)
    finally:
        with suppress(Exception):
            ray_serve.delete(APPLICATION)
        ray.shutdown()


def listen(config: ServeConfig) -> socket.socket:
    """Open the socket of the server.

    Raises:
        SystemExit: if the port is in use, or the address is not one of this machine; an `error:` line is printed.
    """
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        stop(f"host {config.host}, port {config.port}: {error.strerror}; choose others, or --port 0 for a free port")


def place_of(published: str) -> str:
    """Return a location as it is found from any folder: replicas have other ones."""
    location = storage.locate(published)
    return str(location.absolute() if isinstance(location, Path) else location)


def deploy(config: ServeConfig, state: NetworkState, sha256: str = "") -> Any:
    """Start the replicas, and wait until they have loaded the model.

    Args:
        config: the server's settings; `cpus` must be set.
        state: the model's checkpoint.
        sha256: digest of a published model; "" for another one.

    Returns:
        Ray Serve's handle to the replicas.

    Raises:
        SystemExit: if this machine's own Ray has no room for the replicas; an `error:` line is printed.
    """
    import torch
    from ray import serve as ray_serve

    from deepskip.jobs.serving.model import Model

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    assert config.cpus is not None
    gpus = config.gpus if config.gpus is not None else float(torch.cuda.is_available())
    check_room({"CPU": config.cpus * config.replicas, "GPU": gpus * config.replicas})
    # The optimizer's state is not sent to the replicas.
    kept = {key: state[key] for key in ("config", "data", "model", "ema")}
    deployment = ray_serve.deployment(Model).options(
        name="model",
        num_replicas=config.replicas,
        # The front limits the number of requests, so a replica accepts all that come through it.
        max_ongoing_requests=config.max_waiting,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": gpus},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
    )
    bound = deployment.bind(
        kept, "cuda" if gpus else "cpu", config.max_pixels, config.batch, config.batch_wait, config.cpus,
        place_of(config.model) if sha256 else None, sha256,
        Reading(config.alpha, config.orientation, nodata=config.nodata),
    )  # fmt: skip
    ray_serve.start(proxy_location="Disabled")
    return ray_serve.run(
        bound, name=APPLICATION, route_prefix=None,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )  # fmt: skip


def check_room(needed: dict[str, float]) -> None:
    """Check that the cluster has the resources for the replicas; on a cluster at RAY_ADDRESS only a warning is printed.

    Args:
        needed: number of "CPU" and "GPU" of all replicas together.

    Raises:
        SystemExit: if this machine's own Ray has too few; an `error:` line is printed.
    """
    import ray

    have = ray.cluster_resources()
    short = [
        f"{count:g} {kind}s, of which Ray has {have.get(kind, 0):g}"
        for kind, count in needed.items()
        if count > have.get(kind, 0)
    ]
    if short:
        text = f"the replicas need {' and '.join(short)}; ask for fewer with --replicas, --cpus or --gpus"
        if not os.environ.get("RAY_ADDRESS"):
            stop(text)
        print(f"warning: {text}, or add machines: waiting for them", flush=True)


async def answer(
    config: ServeConfig, token: str | None, listener: socket.socket, handle: Any, following: Following | None = None
) -> None:
    """Answer requests until SIGTERM or SIGINT, and finish those in progress for up to LAST_SECONDS.

    Args:
        config: the server's settings.
        token: what requests must carry; None if the server needs no token.
        listener: the server's socket.
        handle: Ray Serve's handle to the replicas.
        following: the published models to take over; None if the model is not a published one.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    way = Replicas(handle, following)
    tasks = [asyncio.create_task(way.watch())]
    if following is not None:
        tasks.append(asyncio.create_task(following.watch(lambda sha256: handle.prepare.remote(sha256))))
    front = Front(config, token, way.ask, lambda: way.up, await handle.describe.remote(), following)
    runner, site = await open_front(front.application(), listener)
    host, port = listener.getsockname()[:2]
    print(f"serving {config.model} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    print("POST an image to /predict?format=mask, overlay or polygons; or open the address in a browser", flush=True)
    if token is not None:
        print("requests must carry the token: Authorization: Bearer TOKEN", flush=True)
    await stopped.wait()
    print("stopping: requests in progress are still answered", flush=True)
    # aiohttp's own shutdown would close connections whose bodies are still arriving.
    await site.stop()
    await front.finish(LAST_SECONDS)
    for task in tasks:
        task.cancel()
    await runner.cleanup()


async def open_front(app: web.Application, listener: socket.socket) -> tuple[web.AppRunner, web.SockSite]:
    """Start to answer requests.

    Args:
        app: the front's application.
        listener: the server's socket.

    Returns:
        aiohttp's runner, whose cleanup closes all connections, and its site, which when stopped accepts no new connections.
    """
    answer_in_json()
    # Bodies are not decompressed, since a compressed body is refused.
    runner = web.AppRunner(
        app, access_log=None, keepalive_timeout=IDLE_SECONDS, lingering_time=LINGER_SECONDS, auto_decompress=False,
        # A client that leaves frees its place at once.
        handler_cancellation=True, shutdown_timeout=1,
    )  # fmt: skip
    await runner.setup()
    site = web.SockSite(runner, listener)
    await site.start()
    return runner, site


class Replicas:
    """Sends requests to the replicas, and counts the replicas that run.

    Attributes:
        handle: Ray Serve's handle to the replicas.
        up: number of replicas that run, as of the last look.
        following: the published models to take over, or None.
    """

    def __init__(self, handle: Any, following: Following | None = None) -> None:
        self.handle, self.up, self.following = handle, 1, following

    async def ask(self, body: bytes, extension: str, wanted: str) -> Answer:
        """Send a request to a replica, and once more to another if that replica died.

        Args:
            body: bytes of the image file.
            extension: kind of file of the body: "png", "jpg", "tif" or "npy".
            wanted: format of the answer, a key of answers.FORMATS.

        Returns:
            The replica's answer.

        Raises:
            Unavailable: if no replica answered.
            RayTaskError: if the replica's code failed; trying again would fail again.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        for last in (False, True):
            sha256 = self.following.wanted if self.following else ""
            response = self.handle.segment.remote(body, extension, wanted, sha256)
            try:
                answer: Answer = await response
                if self.following and answer.model:
                    self.following.answered(answer.model, answer.fault)
                return answer
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayTaskError:
                # An error in the replica's code would occur again.
                raise
            except (RayError, RayServeException) as error:
                # Another replica may succeed. There is one retry only, so that an image that kills replicas does not kill all.
                if last:
                    raise Unavailable(type(error).__name__) from None
        raise AssertionError

    async def watch(self) -> None:
        """Update the number of replicas that run, every WATCH_SECONDS, until cancelled."""
        from ray import serve as ray_serve

        while True:
            try:
                found = await asyncio.to_thread(ray_serve.status)
                states = found.applications[APPLICATION].deployments["model"].replica_states
                self.up = int(states.get("RUNNING", 0))
            # Any error means that the cluster's head does not answer.
            except Exception:
                self.up = 0
            await asyncio.sleep(WATCH_SECONDS)
