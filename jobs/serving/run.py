"""Brings a server up on Ray and takes it down again."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aiohttp import web

from deepskip.checkpoint import State
from deepskip.cluster.settings import of_loopback
from deepskip.jobs.serving.answers import Answer
from deepskip.jobs.serving.front import Front, Unavailable, answer_in_json
from deepskip.jobs.serving.settings import ServeConfig
from deepskip.jobs.settings import stop

APPLICATION = "deepskip"
# a connection on which no request has come whole in this time is closed
IDLE_SECONDS = 20
# requests that are under way when the server is stopped have this long
LAST_SECONDS = 10.0
# what a refused request still sends is read and thrown away for so long, so that the refusal arrives
LINGER_SECONDS = 5.0
WATCH_SECONDS = 1.0


def serve(config: ServeConfig, token: str | None, state: State) -> None:
    """Serves until SIGTERM or SIGINT; ends the program with an `error:` line where it cannot."""
    # before ray takes its time
    listener = listen(config)
    with replicas(config, state) as handle:
        asyncio.run(answer(config, token, listener, handle))


@contextmanager
def replicas(config: ServeConfig, state: State) -> Iterator[Any]:
    """Starts Ray, or joins the cluster at RAY_ADDRESS, and the replicas on it, for a block; gives the handle to them."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    settings |= of_loopback(os.environ.get("RAY_ADDRESS"))
    for name, value in settings.items():
        os.environ.setdefault(name, value)

    import ray
    from ray import serve as ray_serve

    from deepskip.jobs.training import allocation

    allocation.start_ray()
    try:
        yield deploy(config, state)
    finally:
        with suppress(Exception):
            ray_serve.delete(APPLICATION)
        ray.shutdown()


def listen(config: ServeConfig) -> socket.socket:
    """Takes the port; ends the program where it is taken, or the address is not this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        stop(f"host {config.host}, port {config.port}: {error.strerror}; name others, or --port 0 for a free one")


def deploy(config: ServeConfig, state: State) -> Any:
    """Starts the replicas and waits until they have loaded the model; gives the handle to them."""
    import torch
    from ray import serve as ray_serve

    from deepskip.jobs.serving.model import Model

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    assert config.cpus is not None
    gpus = config.gpus if config.gpus is not None else float(torch.cuda.is_available())
    check_room({"CPU": config.cpus * config.replicas, "GPU": gpus * config.replicas})
    # the optimizer stays here
    kept = {key: state[key] for key in ("config", "data", "model", "ema")}
    deployment = ray_serve.deployment(Model).options(
        name="model",
        num_replicas=config.replicas,
        # the front counts what waits: a replica takes all that it lets through
        max_ongoing_requests=config.max_waiting,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": gpus},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
    )
    bound = deployment.bind(
        kept, "cuda" if gpus else "cpu", config.max_pixels, config.batch, config.batch_wait, config.cpus
    )
    ray_serve.start(proxy_location="Disabled")
    return ray_serve.run(
        bound, name=APPLICATION, route_prefix=None,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )  # fmt: skip


def check_room(needed: dict[str, float]) -> None:
    """Says so where the cluster has no room for the replicas; ends the program where it is this machine's own Ray."""
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


async def answer(config: ServeConfig, token: str | None, listener: socket.socket, handle: Any) -> None:
    """Answers requests until a signal comes."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    way = Replicas(handle)
    watching = asyncio.create_task(way.watch())
    front = Front(config, token, way.ask, lambda: way.up, await handle.describe.remote())
    runner, site = await open_front(front.application(), listener)
    host, port = listener.getsockname()[:2]
    print(f"serving {config.model} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    print("POST an image to /predict?format=mask, overlay or polygons; or open the address in a browser", flush=True)
    if token is not None:
        print("requests must carry the token: Authorization: Bearer TOKEN", flush=True)
    await stopped.wait()
    print("stopping: what has been asked is still answered", flush=True)
    # aiohttp itself would close connections whose bodies are still coming
    await site.stop()
    await front.finish(LAST_SECONDS)
    watching.cancel()
    await runner.cleanup()


async def open_front(app: web.Application, listener: socket.socket) -> tuple[web.AppRunner, web.SockSite]:
    """Begins to answer; stopping the site ends new connections, the runner's cleanup all."""
    answer_in_json()
    # bodies stay as they are sent: a compressed one is refused
    runner = web.AppRunner(
        app, access_log=None, keepalive_timeout=IDLE_SECONDS, lingering_time=LINGER_SECONDS, auto_decompress=False,
        # whoever leaves makes room at once
        handler_cancellation=True, shutdown_timeout=1,
    )  # fmt: skip
    await runner.setup()
    site = web.SockSite(runner, listener)
    await site.start()
    return runner, site


class Replicas:
    """The way to the replicas, and how many there are."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.up = handle, 1

    async def ask(self, body: bytes, extension: str, wanted: str) -> Answer:
        """Brings a request to a replica; raises Unavailable where it died and no other answered."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        for last in (False, True):
            response = self.handle.segment.remote(body, extension, wanted)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayTaskError:
                # a fault of the code: it would come again
                raise
            except (RayError, RayServeException) as error:
                # another replica may do it; an image that kills replicas is not tried on all of them
                if last:
                    raise Unavailable(type(error).__name__) from None
        raise AssertionError

    async def watch(self) -> None:
        """Looks now and then how many replicas run."""
        from ray import serve as ray_serve

        while True:
            try:
                found = await asyncio.to_thread(ray_serve.status)
                states = found.applications[APPLICATION].deployments["model"].replica_states
                self.up = int(states.get("RUNNING", 0))
            # whatever it is, the head does not answer
            except Exception:
                self.up = 0
            await asyncio.sleep(WATCH_SECONDS)
