"""An S3 endpoint on this machine that delays each request: python -m deepskip.data_shards.bench.slow_s3 SECONDS [PORTS]."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

# Path at which a port answers how many requests and bytes it has served.
COUNTS = "/-/counts"


def main(delay: float, ports: int = 1) -> None:
    """Print the ports, one a line, and serve the same objects on all of them until the process is killed.

    Args:
        delay: Delay of each request in seconds.
        ports: Number of ports, each of which counts its requests.
    """
    application = DomainDispatcherApplication(create_backend_app)
    servers = [make_server("127.0.0.1", 0, counted(application, delay), threaded=True) for _ in range(ports)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.port, flush=True)
    threading.Event().wait()


def counted(application: Callable[..., Iterable[bytes]], delay: float) -> Callable[..., Iterable[bytes]]:
    """Return an application that delays requests, and counts those for shards by method, and the bytes of its answers."""
    counts = {"GET": 0, "HEAD": 0, "bytes": 0}

    def body(parts: Iterable[bytes]) -> Iterator[bytes]:
        for part in parts:
            counts["bytes"] += len(part)
            yield part

    def delayed(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == COUNTS:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(counts).encode()]
        time.sleep(delay)
        answer = application(environ, start_response)
        if not environ["PATH_INFO"].endswith(".tar"):
            return answer
        counts[environ["REQUEST_METHOD"]] = counts.get(environ["REQUEST_METHOD"], 0) + 1
        return body(answer)

    return delayed


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
