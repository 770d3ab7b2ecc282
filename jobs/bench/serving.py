"""python -m deepskip.jobs.bench.serving: latency and throughput of the server under wrk, beside the bare handle to its replica.

Both are asked in turns, with as many requests under way. The server's process also runs the bare calls; wrk is a process of
its own (Debian: apt-get install wrk). All of it shares this machine. Then more is asked than there is room for: what is
turned away is counted, and how long the others took.
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
    """Measures and writes results/serving-NAME.json and .md."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.jobs.bench.serving", description=__doc__)
    parser.add_argument("--checkpoint", help="a run; by default an untrained network of the default size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="sides of the images, pixels")
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64],
        help="requests at once; of larger images at most 4",
    )
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--pairs", type=int, default=2, help="how often each is measured")
    parser.add_argument("--overload", type=int, default=256, help="connections beyond capacity")
    parser.add_argument("--remark", default="", help="what the reader should know of the machine at that time")
    parser.add_argument("--name", default=f"{os.cpu_count()}-cores")
    arguments = parser.parse_args(argv)
    if shutil.which("wrk") is None:
        stop("there is no wrk; on Debian: apt-get install wrk")
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


def untrained() -> dict[str, Any]:
    """Makes the state of a network of the default size that takes three bands."""
    torch.manual_seed(0)
    data = {"in_channels": 3, "num_classes": 1, "mean": [0.0] * 3, "std": [1.0] * 3}
    return {"config": asdict(Config()), "data": data, "model": DeepSkipUNet(3, 1).state_dict(), "ema": None}


def picture(side: int) -> bytes:
    """Makes a PNG of smooth blobs and noise, which packs as photographs do."""
    rng = np.random.default_rng(side)
    blobs = Image.fromarray(rng.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8)).resize((side, side))
    noisy = np.asarray(blobs, np.int16) + rng.integers(-4, 5, (side, side, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


async def measure(
    arguments: argparse.Namespace, config: ServeConfig, listener: Any, handle: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measures in turns; gives a row for each size and concurrency, and one of more than there is room for."""
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
        # and as before, when it is over
        await asyncio.sleep(1)
        beyond["afterwards"] = await wrk(port, image, 1, arguments.seconds)
        assert beyond["afterwards"]["refused"] == 0, beyond
    await runner.cleanup()
    return rows, beyond


async def wrk(port: int, image: Path, concurrency: int, seconds: float) -> dict[str, float]:
    """Sends an image over so many connections for so long; gives what wrk counted, times in ms."""
    script = image.with_suffix(".lua")
    script.write_text(SCRIPT.format(image=image))
    process = await asyncio.create_subprocess_exec(
        "wrk", "-t1", f"-c{concurrency}", f"-d{seconds:g}s", "--timeout", "60s", "-s", str(script),
        f"http://127.0.0.1:{port}/predict", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, _ = await process.communicate()
    return json.loads(said.decode().splitlines()[-1])


async def ask_handle(handle: Any, body: bytes, concurrency: int, seconds: float) -> dict[str, float]:
    """Asks the replica without HTTP between, as wrk does with it; gives the same counts."""
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
    """Gives a percentile; nan of nothing."""
    return float(np.percentile(values, share)) if values else float("nan")


def say(line: str) -> None:
    """Prints a line of progress at once."""
    print(line, file=sys.stderr, flush=True)


def table(found: dict[str, Any]) -> str:
    """Writes the results as Markdown."""
    machine, beyond = found["machine"], found["overload"]
    lines = [
        f"# The server under load: {machine['gpu'] or f'''{machine['cores']} cores'''}, torch {machine['torch']}", "",
        "`python -m deepskip.jobs.bench.serving`: PNG in, mask out, one replica; all share the machine. Medians of "
        f"{len(found['rows'][0]['pairs'])} runs; \"bare\": the handle to the replica without HTTP, in turns with it.",
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
        f"Beyond capacity: {beyond['connections']} connections that ask again at once, where {capacity} may wait, for "
        f"{seen['seconds']:.0f} s ({beyond['side']} x {beyond['side']}): {counts}; {seen['lost']} lost. Those served took "
        f"{beyond['served_p50']:.0f} ms (p50) and {beyond['served_p99']:.0f} ms (p99) from their head to their answer. "
        f"Afterwards one at a time: p50 {beyond['afterwards']['p50']:.0f} ms.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
