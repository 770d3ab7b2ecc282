"""Show the way of a sample from a folder to a server, on the built-in coins: `make stream-demo`, about two minutes.

Coins arrive in a folder, `deepskip ingest` makes generations of them, a training follows and publishes its best model, and a
server takes better models over while it is asked all the time. Each command is printed as it starts; its output is in OUT.
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from deepskip import publishing
from deepskip.data_shards.sources.coins import coins
from deepskip.jobs import runs
from deepskip.jobs.settings import ended_by_sigterm

T = TypeVar("T")
# Samples of generation 0, and of each one that arrives.
FIRST, ARRIVING = 64, 64
# The held-out image is a square of test samples, this many a side.
TILES = 3
# Small, so that it learns in a minute on two cores. Half of each batch is new, the other half replayed.
TRAINING = {
    "data.follow": "true", "data.crop": 64, "data.replay": 0.5, "data.poll_seconds": 0.2, "model.base_channels": 4,
    "model.levels": 4, "model.norm": "group", "optim.steps": "null", "optim.schedule": "constant", "optim.warmup_steps": 10,
    "optim.ema_decay": 0.9, "run.name": "live", "run.validate_every": 8, "run.checkpoint_every": 32, "run.log_every": 4,
    "run.panels": 0, "run.tracking_uri": "none", "cluster.cpus_per_worker": 1,
}  # fmt: skip
# Time to start or to stop one of the processes on a busy machine.
PATIENCE = 180.0


class DemoError(RuntimeError):
    """A process of the demonstration ended or did not answer; the message names its output."""


class Score(NamedTuple):
    """A generation that was measured before it was trained on.

    Attributes:
        generation: its number.
        iou: IoU of all of its pixels.
        time: when it was measured, in seconds since 1970.
    """

    generation: int
    iou: float
    time: float


class Answer(NamedTuple):
    """An answer of the server.

    Attributes:
        model: sha256 of the model that answered.
        iou: IoU of its mask.
        time: when it came, in seconds since 1970.
    """

    model: str
    iou: float
    time: float


@dataclass
class Processes:
    """The processes of the demonstration, each with its output in a file.

    Attributes:
        out: folder of their output.
        running: the processes by name, in the order of their start.
    """

    out: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, words: Sequence[object]) -> None:
        """Print a command of deepskip and start it.

        Args:
            name: its output is in NAME.log.
            words: its words after "deepskip".
        """
        given = [str(word) for word in words]
        print(f"$ deepskip {' '.join(given)}", flush=True)
        with (self.out / f"{name}.log").open("wb") as log:
            # In a session of its own, so that Ctrl-C reaches this process alone, which stops the others in their order.
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "deepskip", *given], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def said(self, name: str) -> str:
        """Return the output of a process so far."""
        return (self.out / f"{name}.log").read_text(errors="replace")

    def wait_for(self, condition: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
        """Wait until a condition holds, and return its value.

        Args:
            condition: returns something true when it holds.
            what: what is waited for.
            seconds: longest time to wait.

        Raises:
            DemoError: a process has ended, or the time is over.
        """
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            for name, process in self.running.items():
                if process.poll() is not None:
                    last = self.said(name).strip().rsplit("\n", 1)[-1]
                    raise DemoError(f"{name} ended with status {process.returncode}: {last}; see {self.out / name}.log")
            if time.monotonic() > deadline:
                raise DemoError(f"{what} did not happen in {seconds:.0f} s; see the logs in {self.out}")
            time.sleep(0.1)
        return found

    def stop(self, name: str) -> None:
        """Ask a process to end, and end it and what it started if it does not."""
        process = self.running.pop(name)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, name: str, words: Sequence[object]) -> None:
        """Run a command of deepskip to its end.

        Raises:
            DemoError: its status is not 0.
        """
        self.start(name, words)
        process = self.running.pop(name)
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if status:
            raise DemoError(f"{name} ended with status {status}: {self.said(name).strip()}")


@dataclass
class Client:
    """Sends an image to the server again and again, from a thread.

    Attributes:
        port: port of the server on this machine.
        png: the image.
        mask: its foreground (H, W), bool.
        answers: the answers so far.
        lost: why requests had no answer.
    """

    port: int
    png: bytes
    mask: np.ndarray
    answers: list[Answer] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def ask(self) -> Answer:
        """Send the image once.

        Raises:
            OSError, http.client.HTTPException, ValueError: there is no answer, or it is none with a mask.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("POST", "/predict?format=mask", self.png)
            reply = connection.getresponse()
            body = reply.read()
            if reply.status != 200:
                raise ValueError(f"status {reply.status}: {body[:200]!r}")
            found = np.asarray(Image.open(io.BytesIO(body))) > 0
            return Answer(reply.headers["DeepSkip-Model"], iou(found, self.mask), time.time())
        finally:
            connection.close()

    def send(self, ready: Callable[[], bool], ended: threading.Event) -> None:
        """Send the image every half second.

        Args:
            ready: whether the server listens; before, nothing is sent.
            ended: ends it.
        """
        while not ready() and not ended.wait(0.5):
            pass
        while not ended.wait(0.5):
            try:
                answer = self.ask()
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.lost.append(str(error))
                continue
            if not self.answers or self.answers[-1].model != answer.model:
                print(f"  the server answers with model {answer.model[:8]}: IoU {answer.iou:.3f}", flush=True)
            self.answers.append(answer)


def iou(found: np.ndarray, mask: np.ndarray) -> float:
    """Return the IoU of two foregrounds (H, W), bool; 1 if both are empty."""
    union = int((found | mask).sum())
    return int((found & mask).sum()) / union if union else 1.0


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return an image (H, W, 3) uint8 and its mask (H, W) bool, made of test samples: other coins on other photographs."""
    samples = coins("test", TILES * TILES)
    rows = [list(islice(samples, TILES)) for _ in range(TILES)]
    image, mask = (
        np.concatenate([np.concatenate([sample[part] for sample in row], 1) for row in rows]) for part in (1, 2)
    )
    return image, mask > 0


def put(folder: Path, samples: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Write samples into a folder that is watched, each file under another name first, so that it appears whole.

    Args:
        folder: folder with images/ and masks/.
        samples: key, image (H, W, 3) and mask (H, W), uint8.
    """
    for key, image, mask in samples:
        for part, pixels in (("masks", mask), ("images", image)):
            temporary = folder / f"{key}.{part}.part"
            Image.fromarray(pixels).save(temporary, "png")
            temporary.rename(folder / part / f"{key}.png")


def scores(run: Path, first: int = 1) -> list[Score]:
    """Return the generations from a first one on that a run has measured so far."""
    path = run / runs.JOURNAL
    # Without the last line, which may be half written.
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [
        Score(int(values["generation"]), values["iou"], stamp / 1000)
        for kind, _, values, stamp in lines
        if kind == "stream" and values.get("generation", 0) >= first
    ]


def table(measured: Sequence[Score], answers: Sequence[Answer]) -> list[str]:
    """Return a line for each generation, with the last answer of the server before the next one was measured.

    Args:
        measured: generations in their order.
        answers: answers in their order.
    """
    lines = [f"{'generation':>10}  {'IoU before training':>19}  {'server answers with':>19}  {'its IoU':>7}"]
    for number, score in enumerate(measured):
        end = measured[number + 1].time if number + 1 < len(measured) else float("inf")
        known = [answer for answer in answers if answer.time <= end]
        by = (known[-1].model[:8], f"{known[-1].iou:.3f}") if known else ("", "")
        lines.append(f"{score.generation:>10}  {score.iou:>19.3f}  {by[0]:>19}  {by[1]:>7}")
    return lines


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def arrivals(processes: Processes, incoming: Path, run: Path, seconds: float) -> Iterator[Score]:
    """Let coins arrive for some time, and yield the score of each generation.

    More come when the last ones are being trained on, so that a slow machine measures each generation by itself.

    Args:
        processes: the processes.
        incoming: folder that is watched.
        run: folder of the training.
        seconds: time after which no more arrive.
    """
    stream = coins("train", 10**6, seed=1)
    deadline = time.monotonic() + seconds
    generation = 0
    while time.monotonic() < deadline or generation < 2:
        put(incoming, islice(stream, ARRIVING))
        generation += 1
        found = processes.wait_for(partial(scores, run, generation), f"training on generation {generation}")
        yield found[0]


def listens(processes: Processes) -> bool:
    """Return whether the server has said its address."""
    return " on http://" in processes.said("serve")


def show(out: Path, seconds: float) -> None:
    """Run the demonstration.

    Args:
        out: folder to make.
        seconds: time for which coins arrive.

    Raises:
        DemoError: a part of it failed.
    """
    data, incoming, run, published = out / "data", out / "incoming", out / "runs" / "live", out / "published"
    for folder in (incoming / "images", incoming / "masks"):
        folder.mkdir(parents=True)
    image, mask = held_out()
    Image.fromarray(image).save(out / "held-out.png")
    processes, ended = Processes(out), threading.Event()
    port = free_port()
    client = Client(port, (out / "held-out.png").read_bytes(), mask)
    listening = partial(listens, processes)
    thread = threading.Thread(target=client.send, args=(listening, ended))
    try:
        processes.run("pack", ["pack", "coins", "--out", data, "--train", FIRST, "--val", 32, "--test", 1])
        processes.start("ingest", ["ingest", "--from", f"folder:{incoming}", "--to", data, "--samples", ARRIVING])
        given = TRAINING | {"run.storage": out / "runs", "publish.path": published}
        options = [word for key, value in given.items() for word in (f"--{key}", value)]
        processes.start("train", ["train", data, "--local", *options])
        processes.wait_for((published / publishing.POINTER).exists, "a first model")
        processes.start("serve", ["serve", "--model", published, "--follow_seconds", 0.5, "--port", port])
        print(f"$ curl --data-binary @{out}/held-out.png 'http://127.0.0.1:{port}/predict?format=mask'", flush=True)
        thread.start()
        for score in arrivals(processes, incoming, run, seconds):
            bar = "#" * round(50 * score.iou)
            print(f"generation {score.generation:>2}: IoU {score.iou:.3f} before it is trained on  {bar}", flush=True)
        processes.wait_for(listening, "the server")
        processes.stop("ingest")
        processes.wait_for(lambda: processes.said("train").strip().endswith("waiting for new data"), "the last step")
        newest = json.loads((published / publishing.POINTER).read_text())["sha256"]
        processes.wait_for(lambda: client.answers and client.answers[-1].model == newest, "an answer of the last model")
        ended.set()
        thread.join()
        processes.stop("train")
        processes.stop("serve")
        print("\n".join(["", *table(scores(run), client.answers), ""]))
        models = len({answer.model for answer in client.answers})
        print(f"{len(client.answers)} requests answered by {models} models, {len(client.lost)} lost")
        if client.lost:
            raise DemoError(f"a request was lost: {client.lost[0]}")
        processes.run("audit", ["audit", run])
        print(processes.said("audit").strip())
    finally:
        ended.set()
        # All at once, so that Ctrl-C takes as long as the slowest.
        for process in processes.running.values():
            process.terminate()
        for name in list(processes.running):
            processes.stop(name)
        if thread.ident is not None:
            thread.join()


def main(argv: list[str] | None = None) -> None:
    """Run the demonstration; Ctrl-C ends it and all that it started.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: status 1 if a part of it failed, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m deepskip.jobs.stream_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/stream-demo"), help="folder to make")
    parser.add_argument("--seconds", type=float, default=75, help="time for which coins arrive")
    arguments = parser.parse_args(argv)
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; remove it, or choose another --out")
    try:
        with ended_by_sigterm():
            show(arguments.out, arguments.seconds)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
