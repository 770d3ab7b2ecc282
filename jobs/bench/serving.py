"""Measure latency and throughput of the server under wrk, compared with direct calls to its replica.

Run it as `python -m deepskip.jobs.bench.serving`. Both are measured alternately, with the same number of requests in progress.
The server's process also makes the direct calls; wrk is a process of its own (Debian: apt-get install wrk). All of them share
this machine. Last, the server is overloaded: refusals are counted, and the latency of the served requests is measured.
"""

import argparse
import asyncio
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from PIL import Image

from deepskip import checkpoint
from deepskip.config import Config
from deepskip.jobs.bench import __main__ as bench
from deepskip.jobs.serving.front import Front
from deepskip.jobs.serving.run import Replicas, listen, open_front, replicas
from deepskip.jobs.serving.settings import ServeConfig, check_values
from deepskip.jobs.settings import stop
from deepskip.network import DeepSkipUNet

SCRIPT = """
local file = io.open("{image}", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "image/png"
done = function(summary, latency, requests)
  io.write(string.format('\\n{{"requests": %d, "seconds": %f, "refused": %d, "lost": %d, "p50": %f, "p99": %f}}\\n',
    summary.requests, summary.duration / 1e6, summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, and write results/serving-NAME.json and results/serving-NAME.md.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: if wrk is not installed; an `error:` line is printed.
    """
    parser = argparse.ArgumentParser(prog="python -m deepskip.jobs.bench.serving", description=__doc__)
    parser.add_argument("--checkpoint", help="a run; by default an untrained network of the default size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="sides of the images, pixels")
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64],
        help="requests at once; for sizes after the first at most 4",
    )
    parser.add_argument("--seconds", type=float, default=8, help="seconds of each measurement")
    parser.add_argument("--pairs", type=int, default=2, help="number of measurements of each")
    parser.add_argument("--overload", type=int, default=256, help="connections beyond capacity")
    parser.add_argument("--remark", default="", help="a remark on the machine's state, for the report")
    parser.add_argument("--name", default=f"{os.cpu_count()}-cores")
    arguments = parser.parse_args(argv)
    if shutil.which("wrk") is None:
        stop("wrk is not installed; on Debian: apt-get install wrk")
    config = ServeConfig(model=arguments.checkpoint or "untrained", port=0, cpus=len(os.sched_getaffinity(0)))
    check_values(config)
    state = checkpoint.load_for_inference(arguments.checkpoint) if arguments.checkpoint else untrained()
    with listen(config) as listener, replicas(config, state) as handle:
        rows, beyond = asyncio.run(measure(arguments, config, listener, handle))
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    machine |= {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    machine |= {"remark": arguments.remark}
    found = {"machine": machine, "settings": asdict(config), "rows": rows, "overload": beyond}
    (bench.RESULTS / f"serving-{arguments.name}.json").write_text(json.dumps(found, indent=2, default=str) + "\n")
    (bench.RESULTS / f"serving-{arguments.name}.md").write_text(table(found))
    print(table(found))


def untrained() -> checkpoint.NetworkState:
    """Return the checkpoint state of an untrained network of the default size, for three bands and one class."""
    torch.manual_seed(0)
    data: checkpoint.DataState = {
        "in_channels": 3, "num_classes": 1, "ignore_index": 255, "mean": [0.0] * 3, "std": [1.0] * 3, "preparation": {},
    }  # fmt: skip
    return {"config": asdict(Config()), "data": data, "model": DeepSkipUNet(3, 1).state_dict(), "ema": None}


def picture(side: int) -> bytes:
    """Return a PNG of smooth blobs with noise, which compresses about as well as a photograph.

    Args:
        side: height and width, pixels.
    """
    rng = np.random.default_rng(side)
    blobs = Image.fromarray(rng.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8)).resize((side, side))
    noisy = np.asarray(blobs, np.int16) + rng.integers(-4, 5, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


async def measure(
    arguments: argparse.Namespace, config: ServeConfig, listener: Any, handle: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure the server and direct calls alternately, and then the server under overload.

    Args:
        arguments: the command line's.
        config: the server's settings.
        listener: the server's socket.
        handle: Ray Serve's handle to the replica.

    Returns:
        A row for each size and concurrency, and the results under overload.
    """
    way = Replicas(handle)
    front = Front(config, None, way.ask, lambda: 1, {})
    taken: list[tuple[int, float]] = []

    @web.middleware
    async def record(request: web.Request, handler: Any) -> web.StreamResponse:
        started = time.perf_counter()
        response = await handler(request)
        taken.append((response.status, time.perf_counter() - started))
        return response

    app = front.application()
    app.middlewares.insert(0, record)
    runner, _ = await open_front(app, listener)
    port = listener.getsockname()[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in arguments.sizes:
            image = Path(folder) / f"{side}.png"
            image.write_bytes(picture(side))
            for concurrency in (n for n in arguments.concurrency if n <= 4 or side == arguments.sizes[0]):
                pairs = []
                for _ in range(arguments.pairs):
                    bare = await ask_handle(handle, image.read_bytes(), concurrency, arguments.seconds)
                    pairs.append({"bare": bare, "http": await wrk(port, image, concurrency, arguments.seconds)})
                rows.append({"side": side, "concurrency": concurrency, "pairs": pairs})
                http = pairs[-1]["http"]
                say(
                    f"{side} px, {concurrency} at once: {http['requests'] / http['seconds']:.1f}/s, p99 {http['p99']:.0f} ms"
                )
        image = Path(folder) / f"{arguments.sizes[0]}.png"
        taken.clear()
        seen = await wrk(port, image, arguments.overload, 3 * arguments.seconds)
        served = sorted(seconds for status, seconds in taken if status == 200)
        statuses = {status: sum(each == status for each, _ in taken) for status in sorted({each for each, _ in taken})}
        beyond = {"side": arguments.sizes[0], "connections": arguments.overload, "statuses": statuses, "wrk": seen}
        beyond |= {"served_p50": 1e3 * percentile(served, 50), "served_p99": 1e3 * percentile(served, 99)}
        # After the overload, the server must answer as before.
        await asyncio.sleep(1)
        beyond["afterwards"] = await wrk(port, image, 1, arguments.seconds)
        assert beyond["afterwards"]["refused"] == 0, beyond
    await runner.cleanup()
    return rows, beyond


async def wrk(port: int, image: Path, concurrency: int, seconds: float) -> dict[str, float]:
    """Send an image repeatedly with wrk.

    Args:
        port: the server's port on loopback.
        image: the PNG file; wrk's script is written next to it.
        concurrency: number of connections.
        seconds: duration.

    Returns:
        wrk's "requests", "seconds", "refused", "lost", and the latency's "p50" and "p99" in ms.
    """
    script = image.with_suffix(".lua")
    script.write_text(SCRIPT.format(image=image))
    process = await asyncio.create_subprocess_exec(
        "wrk", "-t1", f"-c{concurrency}", f"-d{seconds:g}s", "--timeout", "60s", "-s", str(script),
        f"http://127.0.0.1:{port}/predict", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, _ = await process.communicate()
    return json.loads(said.decode().splitlines()[-1])


async def ask_handle(handle: Any, body: bytes, concurrency: int, seconds: float) -> dict[str, float]:
    """Call the replica directly, without HTTP, with the same load as wrk.

    Args:
        handle: Ray Serve's handle to the replica.
        body: bytes of a PNG.
        concurrency: number of calls in progress at once.
        seconds: duration.

    Returns:
        "requests", "seconds", and the latency's "p50" and "p99" in ms.
    """
    taken: list[float] = []
    started = time.perf_counter()

    async def ask() -> None:
        while (begun := time.perf_counter()) < started + seconds:
            answer = await handle.segment.remote(body, "png", "mask")
            assert answer.status == 200, answer.reason
            taken.append(time.perf_counter() - begun)

    await asyncio.gather(*(ask() for _ in range(concurrency)))
    counts = {"requests": len(taken), "seconds": time.perf_counter() - started}
    return counts | {"p50": 1e3 * percentile(taken, 50), "p99": 1e3 * percentile(taken, 99)}


def percentile(values: list[float], share: float) -> float:
    """Return a percentile of some values; nan if there are none.

    Args:
        values: the values.
        share: the percentile, 0 to 100.
    """
    return float(np.percentile(values, share)) if values else float("nan")


def say(line: str) -> None:
    """Print a progress line on stderr at once."""
    print(line, file=sys.stderr, flush=True)


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown.

    Args:
        found: "machine", "settings", "rows" and "overload", as `main` writes them to the JSON file.
    """
    machine, beyond = found["machine"], found["overload"]
    lines = [
        f"# The server under load: {machine['gpu'] or f'''{machine['cores']} cores'''}, torch {machine['torch']}", "",
        "`python -m deepskip.jobs.bench.serving`: PNG in, mask out, one replica; all share the machine. Medians of "
        f"{len(found['rows'][0]['pairs'])} runs; \"bare\": direct calls to the replica without HTTP, measured alternately.",
        *([machine["remark"]] if machine["remark"] else []), "",
        "| image | at once | requests/s | p50, ms | p99, ms | bare, requests/s | p50, ms | p99, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found["rows"]:
        cells = [f"{row['side']} x {row['side']}", str(row["concurrency"])]
        for kind in ("http", "bare"):
            runs = [pair[kind] for pair in row["pairs"]]
            cells += [f"{statistics.median(run['requests'] / run['seconds'] for run in runs):.1f}"]
            cells += [f"{statistics.median(run[key] for run in runs):.0f}" for key in ("p50", "p99")]
        lines.append(f"| {' | '.join(cells)} |")
    seen, capacity = beyond["wrk"], found["settings"]["max_waiting"]
    counts = ", ".join(f"{count} times {status}" for status, count in beyond["statuses"].items())
    lines += [
        "",
        f"Overload: {beyond['connections']} connections that retry at once, where {capacity} requests may wait, for "
        f"{seen['seconds']:.0f} s ({beyond['side']} x {beyond['side']}): {counts}; {seen['lost']} lost. Served requests took "
        f"{beyond['served_p50']:.0f} ms (p50) and {beyond['served_p99']:.0f} ms (p99) from their headers to their answer. "
        f"Afterwards, one at a time: p50 {beyond['afterwards']['p50']:.0f} ms.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
