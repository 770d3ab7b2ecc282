"""Start a real server for the tests, and send requests by http.client or, if that is too polite, by bare sockets."""

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

import deepskip
from deepskip import checkpoint
from deepskip.config import Config

START_SECONDS = 150


def state(bands: int, classes: int, preparation: dict[str, int | None] | None = None) -> dict[str, Any]:
    """Return the state of a small untrained model."""
    config = Config()
    config.model.levels, config.model.base_channels = 3, 4
    torch.manual_seed(0)
    network = deepskip.DeepSkipUNet(bands, classes, base_channels=4, levels=3).eval()
    with torch.no_grad():
        # An untrained head predicts background everywhere.
        network.head.bias.zero_()
        logits = network(torch.randn(1, bands, 64, 64))
        scale = 3 / logits.std((0, 2, 3))
        network.head.bias -= logits.mean((0, 2, 3)) * scale
        network.head.weight *= scale[:, None, None, None]
    data = {"in_channels": bands, "num_classes": classes, "mean": [0.0] * bands, "std": [1.0] * bands}
    data |= {"preparation": preparation or {"bands": None, "longest_side": None}}
    return {"config": asdict(config), "data": data, "model": network.state_dict(), "ema": None}


@dataclass
class Reply:
    """A server's answer: status, headers (names in lower case) and body."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """A running server: its process, its port and the folder of its model."""

    process: subprocess.Popen[str]
    port: int
    model: Path

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Send one request on its own connection; `_` in names of headers stands for `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def predict(self, body: bytes, wanted: str = "mask", **headers: str) -> Reply:
        """Send an image and return the mask."""
        return self.ask("POST", f"/predict?format={wanted}", body, **headers)

    def send(self, *pieces: bytes, pause: float = 0, finish: bool = False) -> Reply:
        """Send raw bytes with pauses, and end the sending if `finish`; without a reply, the status is 0."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as line:
            for piece in pieces:
                line.sendall(piece)
                time.sleep(pause)
            if finish:
                line.shutdown(socket.SHUT_WR)
            answer = http.client.HTTPResponse(line)
            try:
                answer.begin()
            except http.client.RemoteDisconnected:
                return Reply(0, {}, b"")
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def processes(self) -> list[psutil.Process]:
        """List the server's process and all that it started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def replica(self) -> psutil.Process:
        """Find the replica."""
        (found,) = (each for each in self.processes() if "ServeReplica" in " ".join(each.cmdline()))
        return found


def answers_strangers(port: int) -> bool:
    """Return whether a port on loopback answers a caller without a token, who used another site's name."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        for path in ("/metrics", "/", "/api/jobs/"):
            connection.request("GET", path, headers={"Host": "evil.example"})
            answer = connection.getresponse()
            answer.read()
            if answer.status < 400:
                return True
    # Most ports speak gRPC.
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return False


def refuses_strangers(address: str) -> bool:
    """Return whether a Ray head refuses calls without its token."""
    code = f"from ray._raylet import GcsClient; GcsClient(address={address!r})"
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    for mode in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        tried = subprocess.run(
            [sys.executable, "-c", code], env=variables | mode | {"HOME": "/nowhere"}, capture_output=True, text=True
        )
        if tried.returncode == 0 or "InvalidAuthToken" not in tried.stderr:
            return False
    return True


@contextmanager
def serving(
    folder: Path, *settings: str, token: str | None = None, trained: dict[str, Any] | None = None
) -> Iterator[Server]:
    """Start `deepskip serve` on a free port with a model in `folder`, and stop it at the end."""
    checkpoint.save(trained or state(3, 1), folder / checkpoint.FOLDER / checkpoint.BEST)
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    variables |= {"HOME": str(folder)} | ({"DEEPSKIP_TOKEN": token} if token else {})
    command = [sys.executable, "-u", "-m", "deepskip.jobs.serve", "--checkpoint", str(folder), "--port", "0", *settings]
    log = (folder / "serve.log").open("w+")
    process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, text=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while " on http://" not in (said := (folder / "serve.log").read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        port = int(said.split(" on http://")[1].split()[0].rsplit(":", 1)[1])
        yield Server(process, port, folder)
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            log.close()
