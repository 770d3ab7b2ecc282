"""Record what a checkout's commands do, which must not change: `python -m tests.golden.record OUT.json`.

With --checkout FOLDER, it records another checkout. This covers trainings of 20 steps (two configurations, one and two
workers), their checkpoints and predictions, the evaluation's JSON, the order of the stream and a server's answers. Only
commands, the tracking database, files and the HTTP protocol are used, so that any commit can be recorded.
`tests.golden.compare` compares two records.
"""

import argparse
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
STEPS = 20
# These values depend on a clock or a machine's load.
TIMES = (
    "seconds",
    "images_per_second",
    "seconds_left",
    "at",
    "date",
    "time",
    "mlflow_run_id",
    "run_id",
    "hardware",
    "command",
)
SETTINGS = {
    "plain": [
        "--model.base_channels", "4", "--model.levels", "3", "--data.crop", "64", "--optim.global_batch_size", "4",
        "--optim.warmup_steps", "2", "--augment.flip", "false", "--augment.rotate90", "false",
    ],
    "rich": [
        "--model.base_channels", "4", "--model.levels", "3", "--model.encoder", "resnet34", "--model.norm", "group",
        "--data.crop", "32", "--data.copy_paste", "0.5", "--data.normalize", "dataset", "--augment.rotate", "15",
        "--augment.scale", "0.2", "--augment.noise", "0.05", "--augment.band_shift", "0.1", "--optim.optimizer", "adamw",
        "--optim.learning_rate", "0.002", "--optim.global_batch_size", "3", "--optim.warmup_steps", "2",
        "--loss.alpha", "0.7", "--run.seed", "5",
    ],
}  # fmt: skip


def digest(x: Any) -> str:
    """Return the SHA-256 of an array's shape, type and bytes, of bytes, or of anything else as JSON."""
    if isinstance(x, np.ndarray):
        return hashlib.sha256(f"{x.shape}{x.dtype}".encode() + np.ascontiguousarray(x).tobytes()).hexdigest()
    return hashlib.sha256(x if isinstance(x, bytes) else json.dumps(x, sort_keys=True).encode()).hexdigest()


def write_data(folder: Path) -> None:
    """Write images of two kinds with their masks: RGB bytes of one class, and four bands of floats of three."""
    rng = np.random.default_rng(0)
    for kind, count, bands, classes in (("plain", 12, 3, 2), ("rich", 12, 4, 3)):
        for part in ("images", "masks"):
            (folder / kind / part).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((96, 80), np.uint8)
            for label in range(1, classes):
                for _ in range(4):
                    y, x = rng.integers(0, 80), rng.integers(0, 66)
                    mask[y : y + rng.integers(4, 14), x : x + rng.integers(4, 14)] = label
            image = rng.normal(100, 20, (96, 80, bands)) + 45 * mask[..., None]
            stem = folder / kind
            if kind == "plain":
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stem / "images" / f"{i:02}.png")
            else:
                np.save(stem / "images" / f"{i:02}.npy", (image / 255).astype(np.float32))
            Image.fromarray(mask * (255 if kind == "plain" else 1)).save(stem / "masks" / f"{i:02}.png")


class Checkout:
    """A checkout whose commands run in their own folder, with their own home."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "DEEPSKIP_"))}
        self.environment = kept | {"HOME": str(folder), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *arguments: str) -> str:
        """Run a module of the checkout to its end."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout


def train(checkout: Checkout, kind: str, workers: int) -> dict[str, Any]:
    """Train, and read what can be compared: losses, validations, the checkpoint's keys and weights."""
    name = f"{kind}-{workers}"
    checkout.run(
        "jobs.train", "--data.path", f"data/{kind}", "--run.name", name, *SETTINGS[kind], "--optim.steps", str(STEPS),
        "--run.log_every", "1", "--run.validate_every", "10", "--run.checkpoint_every", "10", "--cluster.workers", str(workers),
    )  # fmt: skip
    run = checkout.folder / "runs" / name
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{checkout.folder / 'runs' / 'mlflow.db'}")
    run_id = json.loads((run / "run.json").read_text())["mlflow_run_id"]
    metrics = {
        key: [(entry.step, entry.value) for entry in client.get_metric_history(run_id, key)]
        for key in sorted(client.get_run(run_id).data.metrics)
        if not any(time_ in key for time_ in TIMES) and "system" not in key
    }
    found: dict[str, Any] = {"metrics": metrics, "checkpoints": {}}
    for path in sorted((run / "checkpoints").glob("*.pt")):
        state = torch.load(path, weights_only=True, map_location="cpu")
        found["checkpoints"][path.name] = {"keys": sorted(keys_of(state)), "weights": digest_of_state(state["model"])}
    return found


def keys_of(value: Any, at: str = "") -> Iterator[str]:
    """Yield the path of every leaf of a checkpoint."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from keys_of(inner, f"{at}/{key}")
    else:
        yield at


def digest_of_state(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of all weights by name."""
    return digest({name: digest(x.numpy()) for name, x in sorted(state.items())})


def large_image() -> np.ndarray:
    """Make an image (300, 260, 3) of bright squares in noise."""
    rng = np.random.default_rng(1)
    image = rng.normal(100, 20, (300, 260, 3))
    for y, x, side in rng.integers((0, 0, 4), (280, 240, 20), (60, 3)):
        image[y : y + side, x : x + side] += 45
    return image.clip(0, 255).astype(np.uint8)


# After 20 steps, nothing is above 0.5, and little differs. A head that marks a tenth of an image shows more.
SHIFT = """
import sys
from pathlib import Path
import numpy as np
import deepskip
from deepskip import checkpoint
state, _ = checkpoint.newest(Path("runs/plain-1"))
state["ema"] = None
head = state["model"]
head["head.weight"] *= 20
checkpoint.save(state, Path("runs/shifted/checkpoints/best.pt"))
p = deepskip.load("runs/shifted").predict_proba(np.load("large.npy")).astype(np.float64)
head["head.bias"] -= float(np.quantile(np.log(p / (1 - p)), 0.9))
checkpoint.save(state, Path("runs/shifted/checkpoints/best.pt"))
"""


def shift(checkout: Checkout) -> None:
    """Make the model runs/shifted, which is runs/plain-1 with a head that marks more."""
    np.save(checkout.folder / "large.npy", large_image())
    subprocess.run([sys.executable, "-c", SHIFT], cwd=checkout.folder, env=checkout.environment, check=True)


def predictions(checkout: Checkout) -> dict[str, Any]:
    """Predict whole, tiled, with flips, from GeoTIFF-like TIFFs, and with probabilities; digest the masks by file."""
    folder = checkout.folder / "inputs"
    folder.mkdir()
    large = large_image()
    Image.fromarray(large).save(folder / "large.png")
    place = [(33550, "d", 3, (2.0, 2.0, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 500000.0, 4600000.0, 0.0), True)]
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)
    tifffile.imwrite(
        folder / "map.tif", large[:120, :100], photometric="rgb", extratags=[*place, (34735, "H", 16, keys, True)]
    )
    found = {}
    for name, options in {
        "whole": [], "tiled": ["--tile", "128"], "flips": ["--flips", "true"], "probabilities": ["--probabilities", "true"],
    }.items():  # fmt: skip
        out = f"predicted-{name}"
        checkout.run(
            "jobs.predict",
            "--checkpoint",
            "runs/shifted",
            "--images",
            "inputs",
            "--out",
            out,
            "--overlays",
            "false",
            *options,
        )
        found[name] = {}
        for path in sorted((checkout.folder / out).rglob("*")):
            if path.suffix in (".png", ".tif", ".npy"):
                array = (
                    np.load(path) if path.suffix == ".npy" else tifffile.imread(path) if path.suffix == ".tif" else None
                )
                array = np.asarray(Image.open(path)) if array is None else array
                found[name][path.name] = digest(array)
    return found


def without_times(value: Any) -> Any:
    """Return a JSON value without the values that depend on a clock."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def evaluation(checkout: Checkout) -> dict[str, Any]:
    """Evaluate both kinds of model and return the JSON reports."""
    found = {}
    for kind in SETTINGS:
        before = set(checkout.folder.rglob("*.json"))
        model = "runs/shifted" if kind == "plain" else f"runs/{kind}-1"
        checkout.run("jobs.evaluate", "--model", model, "--data", f"data/{kind}/val", "--track", "none")
        made = sorted(set(checkout.folder.rglob("*.json")) - before)
        texts = [without_times(json.loads(path.read_text())) for path in made]
        found[kind] = json.loads(json.dumps(texts).replace(str(checkout.folder), "HOME"))
    return found


STREAM = """
import json, sys
from data_shards.crops import Crops
from data_shards.stream import Shards, train_batches
from itertools import islice
import hashlib
found = {}
for kind in ("plain", "rich"):
    for world_size in (1, 3):
        for start in (0, 7):
            shards = Shards(f"data/{kind}/train", "image", Crops(32, 0.5, 3, 0.0))
            parts = []
            for rank in range(world_size):
                batches = islice(train_batches(shards, 3, 4, start, rank, world_size, 0, 2), 12)
                parts.append([[b["key"], b["epoch"], b["weight"].tolist(),
                               hashlib.sha256(b["image"].contiguous().numpy().tobytes()).hexdigest()] for b in batches])
            found[f"{kind}, {world_size} ranks from step {start}"] = parts
json.dump(found, sys.stdout)
"""


def stream(checkout: Checkout) -> Any:
    """Return the keys, weights and pixels of the stream's first steps."""
    done = subprocess.run(
        [sys.executable, "-c", STREAM],
        cwd=checkout.folder,
        env=checkout.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@contextmanager
def server(checkout: Checkout) -> Iterator[int]:
    """Serve a model on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (checkout.folder / "serve.log").open("w")
    command = [sys.executable, "-u", "-m", "jobs.serve", "--checkpoint", "runs/shifted", "--port", str(port)]
    process = subprocess.Popen(command, cwd=checkout.folder, env=checkout.environment, stdout=log, stderr=log)
    try:
        for _ in range(1800):
            if " on http://" in (checkout.folder / "serve.log").read_text():
                break
            if process.poll() is not None:
                raise RuntimeError((checkout.folder / "serve.log").read_text())
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def answers(checkout: Checkout) -> dict[str, Any]:
    """Request masks in each format, and what the server must refuse; return the answers."""
    image = (checkout.folder / "inputs" / "large.png").read_bytes()
    found = {}
    with server(checkout) as port:
        for method, path, body in (
            ("GET", "/healthz", b""), ("POST", "/predict?format=mask", image), ("POST", "/predict?format=overlay", image),
            ("POST", "/predict?format=polygons", image),
            ("POST", "/predict?format=nothing", image), ("POST", "/predict?format=mask", b"no image"), ("GET", "/nowhere", b""),
        ):  # fmt: skip
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request(method, path, body or None)
            answer = connection.getresponse()
            content, kind = answer.read(), answer.getheader("Content-Type") or ""
            text = without_times(json.loads(content)) if "json" in kind and answer.status == 200 else content
            found[f"{method} {path} {digest(body)[:6]}"] = [answer.status, kind, digest(text)]
            connection.close()
    return found


def record(root: Path) -> dict[str, Any]:
    """Record a checkout."""
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        checkout = Checkout(root, Path(name))
        write_data(checkout.folder)
        found: dict[str, Any] = {"shards": {}, "trainings": {}}
        for kind in SETTINGS:
            checkout.run(
                "data_shards", "pack", "folder", "--images", f"{kind}/images", "--masks", f"{kind}/masks", "--out",
                f"data/{kind}", "--val_share", "0.25", "--samples_per_shard", "3",
            )  # fmt: skip
            for path in sorted(one for one in (checkout.folder / "data" / kind).rglob("*") if one.is_file()):
                if path.name == "index.json":
                    # The source depends on the times of its files too.
                    content: Any = {
                        key: value for key, value in json.loads(path.read_text()).items() if key != "source"
                    }
                else:
                    content = path.read_bytes()
                found["shards"][str(path.relative_to(checkout.folder))] = digest(content)
        for kind in SETTINGS:
            for workers in (1, 2):
                found["trainings"][f"{kind}, {workers} workers"] = train(checkout, kind, workers)
        found["stream"] = stream(checkout)
        shift(checkout)
        found["predictions"] = predictions(checkout)
        found["evaluation"] = evaluation(checkout)
        found["answers"] = answers(checkout)
        return found


def main() -> None:
    """Write a record of the checkout."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(record(arguments.checkout.resolve()), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
