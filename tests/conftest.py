"""Triton for the interpreter, before any test imports it, and an S3 for the tests that need one."""

import importlib
import os
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# triton's own functions are made for its interpreter when it is first imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # gluon, which is imported when a kernel first runs; and ours, before any test's module imports them
    for name in ("triton.experimental.gluon", "triton.language"):
        importlib.import_module(name)
    for name in (
        "bce_dice_triton", "bce_dice_loss_triton", "deep_skip_triton", "batch_norm_triton", "subpixel", "conv3_triton",
    ):  # fmt: skip
        importlib.import_module(f"deepskip.kernels.{name}")

    # what the tests start must not see it
    del os.environ["TRITON_INTERPRET"]

# torchmetrics, which some test imports before anything of ours, takes torchvision along
importlib.import_module("deepskip.kernels.torchvision_ops").declare()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take many times as long for small images where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """Serves an empty bucket by moto, for a module."""
    # the kernels' tests run where these are not installed
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
    # file systems are kept by their arguments, not by their endpoint, and buckets by the process, not by its servers
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
