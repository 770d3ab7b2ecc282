"""An S3 endpoint on this machine that delays each request: python -m deepskip.data_shards.bench.slow_s3 SECONDS."""

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


def main(delay: float) -> None:
    """Print the port, and serve until the process is killed.

    Args:
        delay: Delay of each request in seconds.
    """
    application = DomainDispatcherApplication(create_backend_app)

    def delayed(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(delay)
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, delayed, threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(float(sys.argv[1]))
