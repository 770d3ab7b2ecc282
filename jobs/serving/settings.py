"""The server's settings, with units and defaults, and the checks that are made before anything is started."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepskip.cluster.local import usable_cpus
from deepskip.config import faults_of, setting
from deepskip.jobs.settings import NotHere, parse_settings, stop

VARIABLE = "DEEPSKIP_TOKEN"
# A shorter token could be guessed over a network.
TOKEN_CHARACTERS = 16


@dataclass(kw_only=True)
class ServeConfig:
    """Serve a trained model over HTTP: an image in; a mask, polygons or an overlay out; with a web page to try it."""

    model: str
    """coins or microorganisms (they come with DeepSkip), a run's folder (runs/NAME), its URL, a file of weights, an MLflow
    run's id, or models:/NAME/VERSION; or the
    publish.path of a training, whose best model is taken over while the server runs"""
    follow_seconds: float = setting(5, 0.05, 3600)
    """seconds between looks for a better model in a publish.path"""
    tracking_uri: str | None = None
    """MLflow's address, for models that MLflow names; null takes $MLFLOW_TRACKING_URI, else the database in runs/"""
    host: str = "127.0.0.1"
    """address to listen on; any but this machine's own loopback needs a token"""
    port: int = setting(8000, 0, 65535)
    """port to listen on; 0 takes a free one"""
    token_file: Path | None = None
    """file whose only line is the token that requests must carry; null takes $DEEPSKIP_TOKEN, if that is set"""
    nodata: float | None = None
    """value, or nan, that marks missing pixels, in addition to that in the files; null takes the training data's"""
    alpha: Literal["auto", "keep", "drop"] = "auto"
    """bands that are flagged as transparency; auto keeps or drops them to match the bands of the model"""
    orientation: Literal["apply", "ignore"] = "apply"
    """rotation named in EXIF or TIFF tags: apply rotates images, ignore does not"""
    max_body_mb: float = setting(64, 0.001, 2000)
    """largest body of a request, MB; a larger one is refused before it is read (413)"""
    max_megapixels: float = setting(32, 0.001, 268)
    """largest image, millions of pixels, whatever its compressed size (413)"""
    max_waiting: int = setting(64, 1, 100_000)
    """requests that may wait or run at once; further ones are refused (429)"""
    max_held_mb: float = setting(1024, 0.001, 1e6)
    """bodies of all requests in memory at once, MB; requests that do not fit are refused (429)"""
    body_seconds: float = setting(30, 0.1, 3600)
    """time for a client to send a whole body (408), and to receive an answer, seconds"""
    answer_seconds: float = setting(120, 0.1, 3600)
    """time for an answer to be ready, seconds (504)"""
    batch: int = setting(8, 1, 1024)
    """largest number of images of one size that go through the network together"""
    batch_wait: float = setting(0.005, 0, 10)
    """seconds that the first image of a batch waits for others that are being decoded"""
    replicas: int = setting(1, 1, 10_000)
    """copies of the model, over the whole cluster"""
    cpus: int | None = setting(None, 1, 1024)
    """CPU cores of each replica; null divides this machine's cores among the replicas"""
    gpus: float | None = setting(None, 0, 64)
    """GPUs of each replica; null takes 1 if this machine has one, else 0"""

    @property
    def max_body(self) -> int:
        """Return the largest body, in bytes."""
        return int(self.max_body_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        """Return the largest image, in pixels."""
        return int(self.max_megapixels * 1e6)


def parse(argv: list[str]) -> tuple[ServeConfig, str | None]:
    """Read the settings from a command line, and the token.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        The settings, with `cpus` set, and the token; None if the server needs none.

    Raises:
        SystemExit: for a wrong setting or token (an `error:` line is printed), and with status 0 for --help.
    """
    config = parse_settings("serve", ServeConfig, argv)
    check_values(config)
    if config.cpus is None:
        config.cpus = max(1, usable_cpus() // config.replicas)
    return config, read_token(config)


def check_values(config: ServeConfig) -> None:
    """Check that every number is within its bounds.

    Raises:
        SystemExit: if one is not; an `error:` line is printed for each.
    """
    faults = faults_of(config)
    if config.max_held_mb < config.max_body_mb:
        faults.append(
            f"max_held_mb is {config.max_held_mb:g}; one body of max_body_mb ({config.max_body_mb:g}) must fit"
        )
    if faults:
        stop("\n".join(faults))


def read_token(config: ServeConfig) -> str | None:
    """Return the token from token_file or $DEEPSKIP_TOKEN; None if there is none and the server needs none.

    Raises:
        NotHere: if the token file does not exist; an `error:` line is printed.
        SystemExit: if the token is weak, its file cannot be read or is empty, or there is none although other machines can
            reach the server; an `error:` line is printed.
    """
    if config.token_file is not None:
        try:
            token = config.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            stop(
                f"token_file is {config.token_file}: {error}",
                NotHere if isinstance(error, FileNotFoundError) else SystemExit,
            )
        source = f"token_file {config.token_file}"
    else:
        token, source = os.environ.get(VARIABLE, "").strip(), f"${VARIABLE}"
    if token:
        if len(token) < TOKEN_CHARACTERS or not (token.isascii() and token.isprintable()) or " " in token:
            stop(
                f"the token in {source} must be {TOKEN_CHARACTERS} or more ASCII characters without a space; "
                "make one: python -c 'import secrets; print(secrets.token_hex(32))'"
            )
        return token
    if config.token_file is not None:
        stop(f"{source} is empty")
    if not is_loopback(config.host):
        stop(
            f"host is {config.host}, which other machines reach, and there is no token. Set token_file or ${VARIABLE}, "
            "or leave host at 127.0.0.1"
        )
    return None


def is_loopback(host: str) -> bool:
    """Return whether all addresses of a host are this machine's loopback; False for a host that has none."""
    if is_loopback_address(host):
        return True
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return bool(found) and all(is_loopback_address(address) for address in found)


def is_loopback_address(text: str) -> bool:
    """Return whether a text is a loopback address; False for any host name."""
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False
