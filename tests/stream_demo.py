"""Show a stream from end to end: `python -m tests.stream_demo`; about two minutes, without a GPU.

Coins arrive in a folder, `deepskip ingest` appends them, a training follows and publishes its best model, and a server takes it
over while a client sends images. The exit status is 1 if a request failed, fewer than two models answered, or the audit finds
that a sample was not trained on exactly once.
"""

import argparse
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.index import load_index
from deepskip.data_shards.sources.coins import coins
from deepskip.publishing import BrokenPublication, read_pointer
from tests.jobs.bad_requests import png
from tests.jobs.serving import Server

DEEPSKIP = [sys.executable, "-u", "-m", "deepskip"]
FIRST = {"train": 64, "val": 16}
# Images that the client sends in each round, and seconds between rounds.
SENT, PAUSE = 4, 2.0
TRAINING = {
    "--data.follow": "true", "--data.poll_seconds": "0.5", "--data.when_idle": "replay", "--optim.steps": "null",
    "--optim.schedule": "constant", "--optim.warmup_steps": "20", "--run.name": "demo", "--run.validate_every": "10",
    "--run.checkpoint_every": "100", "--run.tracking_uri": "none", "--cluster.cpus_per_worker": "1",
    "--publish.min_gain": "0.02",
}  # fmt: skip


@contextmanager
def running(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of deepskip, and end it by SIGTERM, which it may take a minute for."""
    with log.open("wb") as file:
        process = subprocess.Popen([*DEEPSKIP, *words], stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def arrive(place: Path, rate: float, ended: threading.Event) -> None:
    """Write coins into a folder, each under its name only when it is complete."""
    for number, (_, image, mask) in enumerate(coins("train", 10_000, seed=7)):
        for kind, array in (("images", image), ("masks", mask)):
            part = place / kind / f".{number}.part"
            part.write_bytes(png(array))
            part.rename(place / kind / f"coin{number:05d}.png")
        if ended.wait(1 / rate):
            return


def iou(server: Server, sent: list[tuple[np.ndarray, np.ndarray]]) -> tuple[str, float]:
    """Send images, and return the model that answered last and the IoU of all masks, (H, W) each."""
    overlap = union = 0
    model = ""
    for image, truth in sent:
        reply = server.predict(png(image))
        assert reply.status == 200, reply
        found = np.asarray(Image.open(io.BytesIO(reply.body))) > 0
        overlap += int((found & (truth > 0)).sum())
        union += int((found | (truth > 0)).sum())
        model = reply.headers["deepskip-model"]
    return model, overlap / max(union, 1)


def port_of(log: Path, process: subprocess.Popen[bytes]) -> int:
    """Return the port of a server once it answers."""
    while " on http://" not in (said := log.read_text()):
        assert process.poll() is None, said
        time.sleep(0.2)
    return int(said.split(" on http://")[1].split()[0].rsplit(":", 1)[1])


def show(out: Path, seconds: float, rate: float) -> list[dict[str, Any]]:
    """Run everything for a time, print a line every few seconds, and return what the lines have."""
    rounds: list[dict[str, Any]] = []
    place, data, published = out / "incoming", out / "data", out / "published"
    for kind in ("images", "masks"):
        (place / kind).mkdir(parents=True)
    pack_coins(data, FIRST)
    sent = [(image, mask) for _, image, mask in coins("test", SENT)]
    ended = threading.Event()
    writer = threading.Thread(target=arrive, args=(place, rate, ended))
    options = [word for pair in TRAINING.items() for word in pair]
    options += ["--run.storage", str(out / "runs"), "--publish.path", str(published)]
    with ExitStack() as stack:
        started = time.monotonic()
        source = [
            "--from",
            f"folder:{place}",
            "--to",
            str(data),
            "--name",
            "camera",
            "--samples",
            "32",
            "--seconds",
            "8",
        ]
        stack.enter_context(running(out / "ingest.log", "ingest", *source))
        training = stack.enter_context(running(out / "train.log", "train", str(data), "--local", *options))
        writer.start()
        stack.callback(ended.set)
        while not (published / "published.json").exists():
            assert training.poll() is None, (out / "train.log").read_text()
            time.sleep(0.2)
        log = out / "serve.log"
        words = ["serve", "--model", str(published), "--port", "0", "--follow_seconds", "1", "--cpus", "1"]
        process = stack.enter_context(running(log, *words))
        server = Server(process, port_of(log, process), published)  # type: ignore[arg-type]
        while time.monotonic() - started < seconds:
            model, score = iou(server, sent)
            with suppress(BrokenPublication):
                pointer = read_pointer(published)
            index = load_index(data / "train")
            now = {
                "seconds": round(time.monotonic() - started), "generations": len(index.generations),
                "samples": index.num_samples, "published_iou": pointer and pointer.iou, "model": model[:8],
                "answers_iou": round(score, 3),
            }  # fmt: skip
            say(json.dumps(now))
            rounds.append(now)
            time.sleep(PAUSE)
    writer.join()
    return rounds


def say(line: str) -> None:
    """Write a line to stdout."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the demonstration, and report what is wrong by the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.stream_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/stream-demo"), help="folder, which is emptied")
    parser.add_argument("--seconds", type=float, default=110, help="how long it runs (110)")
    parser.add_argument("--rate", type=float, default=6, help="coins that arrive in a second (6)")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    rounds = show(options.out.absolute(), options.seconds, options.rate)
    models = list(dict.fromkeys(each["model"] for each in rounds))
    audit = subprocess.run([*DEEPSKIP, "audit", str(options.out / "runs" / "demo")], capture_output=True, text=True)
    say((audit.stdout + audit.stderr).strip())
    scores = [each["answers_iou"] for each in rounds]
    say(
        f"{len(rounds) * SENT} requests, none lost; {len(models)} models answered: {', '.join(models)}; "
        f"IoU of the answers {scores[0]} at first, {scores[-1]} at last; best {max(scores)}"
    )
    if audit.returncode or len(models) < 2:
        sys.exit(1)


if __name__ == "__main__":
    main()
