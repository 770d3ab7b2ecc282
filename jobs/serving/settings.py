"""Every setting of the server, with its unit and default, and what is checked before anything is started."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from deepskip.cluster.local import usable_cpus
from deepskip.config import faults_of, setting
from deepskip.jobs.settings import NotHere, parse_settings, stop

VARIABLE = "DEEPSKIP_TOKEN"
# below this a token can be guessed over a network
TOKEN_CHARACTERS = 16


@dataclass(kw_only=True)
class ServeConfig:
    """Serves a trained model over HTTP: an image in, a mask, polygons or an overlay out, and a page to try it on."""

    model: str
    """a run's folder (runs/NAME), its URL, a checkpoint file, an MLflow run's id, or models:/NAME/VERSION"""
    tracking_uri: str | None = None
    """MLflow's address, for names of its own; null takes $MLFLOW_TRACKING_URI, else the database in runs/"""
    host: str = "127.0.0.1"
    """address to listen on; any but this machine's own loopback needs a token"""
    port: int = setting(8000, 0, 65535)
    """port to listen on; 0 takes a free one"""
    token_file: Path | None = None
    """file whose only line is the token that requests must carry; null takes $DEEPSKIP_TOKEN, if that is set"""
    max_body_mb: float = setting(64, 0.001, 2000)
    """largest body of a request, MB; a larger one is refused before it is read (413)"""
    max_megapixels: float = setting(32, 0.001, 268)
    """largest image, millions of pixels, however few bytes it is packed into (413)"""
    max_waiting: int = setting(64, 1, 100_000)
    """requests that may wait or run at once; further ones are turned away (429)"""
    max_held_mb: float = setting(1024, 0.001, 1e6)
    """bytes of bodies held at once, of all requests, MB; what does not fit is turned away (429)"""
    body_seconds: float = setting(30, 0.1, 3600)
    """a body must have come whole in this time (408), and an answer must have been taken in it"""
    answer_seconds: float = setting(120, 0.1, 3600)
    """an answer must be ready in this time (504)"""
    batch: int = setting(8, 1, 1024)
    """images of one size that go through the network together, at most"""
    batch_wait: float = setting(0.005, 0, 10)
    """seconds that the first image of a batch waits for others"""
    replicas: int = setting(1, 1, 10_000)
    """copies of the model, over the whole cluster"""
    cpus: int | None = setting(None, 1, 1024)
    """CPU cores of each replica; null shares out this machine's"""
    gpus: float | None = setting(None, 0, 64)
    """GPUs of each replica; null takes 1 where this machine has one, else 0"""

    @property
    def max_body(self) -> int:
        """Largest body, bytes."""
        return int(self.max_body_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        """Largest image, pixels."""
        return int(self.max_megapixels * 1e6)


def parse(argv: list[str]) -> tuple[ServeConfig, str | None]:
    """Reads the settings; gives them with the token. Bad ones end the program by `stop`."""
    config = parse_settings("serve", ServeConfig, argv)
    check_values(config)
    if config.cpus is None:
        config.cpus = max(1, usable_cpus() // config.replicas)
    return config, read_token(config)


def check_values(config: ServeConfig) -> None:
    """Ends the program where a number is out of its bounds."""
    faults = faults_of(config)
    if config.max_held_mb < config.max_body_mb:
        faults.append(
            f"max_held_mb is {config.max_held_mb:g}; one body of max_body_mb ({config.max_body_mb:g}) must fit"
        )
    if faults:
        stop("\n".join(faults))


def read_token(config: ServeConfig) -> str | None:
    """Gives the token; ends the program where there is none and the server would be reached from other machines."""
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
    """Says whether every address of a host is this machine's loopback; a host that has none is not."""
    if is_loopback_address(host):
        return True
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return bool(found) and all(is_loopback_address(address) for address in found)


def is_loopback_address(text: str) -> bool:
    """Says whether a text is an address, not a name, of loopback."""
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False
