"""Fixtures for all tests: Triton's interpreter, which must be set before an import of Triton, and an S3 server."""

import importlib
import os
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Triton prepares its own functions for the interpreter when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # Gluon is otherwise imported when a kernel first runs, and our kernels when a test's module is.
    for name in ("triton.experimental.gluon", "triton.language"):
        importlib.import_module(name)
    for name in (
        "bce_dice_triton", "bce_dice_loss_triton", "deep_skip_triton", "batch_norm_triton", "subpixel", "conv3_triton",
    ):  # fmt: skip
        importlib.import_module(f"deepskip.kernels.{name}")

    # Programs that the tests start must not see it.
    del os.environ["TRITON_INTERPRET"]

# torchmetrics, whose metrics are those of tests, imports torchvision.
importlib.import_module("deepskip.kernels.torchvision_ops").declare()


THREADS = torch.get_num_threads()


def pytest_runtest_setup() -> None:
    """Reset torch's threads before every test to those that pytest began with.

    Servers and trainings set torch's threads for their process. If one runs in a test's own process, all later tests have
    more threads than cores, which wait for one another: steps of milliseconds then take a second.
    """
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, since threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """Serve an empty bucket with moto, for one module."""
    # The kernels' tests also run on machines that lack these packages.
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # fsspec caches file systems by arguments without the endpoint, and moto keeps buckets per process, not per server.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        yield fs
    server.stop()
    fs.clear_instance_cache()
