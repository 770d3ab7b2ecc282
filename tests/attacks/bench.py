"""Measure the time and memory that untrusted input takes: `python -m tests.attacks.bench [--out FILE]`.

B1: images of 16 x 16 pixels in one tile of 60,000 x 60,000.
B2: an honest request while 32 callers send a JPEG of 400 scans and leave after a second.
B3: tar files. B4: samples files. Both report the slowest of all cases.
"""

import argparse
import http.client
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.decoding import Limits, decode_image
from deepskip.data_shards.scan import scan_tar
from tests.attacks import forked, images, indexes, tars
from tests.attacks.test_data import use
from tests.jobs.bad_requests import picture, png
from tests.jobs.serving import Server, serving

SERVER = Limits(32_000_000, 32_000_000 * 3 * 4)
CALLERS, HONEST = 32, 20
Row = tuple[str, str, str]


def worst(cases: dict[str, Callable[[], object]]) -> tuple[str, float, float]:
    """Run each case in a child; return the name of the slowest, the most seconds and the most megabytes."""
    outcomes = {name: forked.run(case) for name, case in cases.items()}
    slowest = max(outcomes, key=lambda name: outcomes[name].seconds)
    return slowest, outcomes[slowest].seconds, max(outcome.megabytes for outcome in outcomes.values())


def of_images() -> Iterator[Row]:
    """Measure B1, and all images."""
    made = {name: make() for name, make in images.CASES.items()}
    cases = {name: lambda found=found: decode_image(*found, SERVER).shape for name, found in made.items()}
    tile = {name: case for name, case in cases.items() if "one deflated tile" in name}
    _, seconds, megabytes = worst(tile)
    yield "B1, a tile of 60,000 x 60,000", f"{seconds:.2f} s, {megabytes:.0f} MB", "1 s, 64 MB"
    name, seconds, megabytes = worst(cases)
    yield f"all {len(cases)} images (slowest: {name})", f"{seconds:.2f} s, {megabytes:.0f} MB", "60 s"


def of_tars(folder: Path) -> Iterator[Row]:
    """Measure B3."""
    paths = {}
    for number, (name, make) in enumerate(tars.CASES.items()):
        paths[name] = folder / f"{number}.tar"
        paths[name].write_bytes(make())
    name, seconds, megabytes = worst(
        {name: lambda path=path: scan_tar(path, path.name) for name, path in paths.items()}
    )
    yield f"B3, {len(paths)} tar files (slowest: {name})", f"{seconds:.2f} s, {megabytes:.0f} MB", "2 s"


def of_indexes(folder: Path) -> Iterator[Row]:
    """Measure B4."""
    pack_coins(folder, {"train": 6, "val": 2})
    index = indexes.Folder(folder / "train")
    cases = {}
    for number, (name, samples) in enumerate(index.lying()):
        index.write(samples)
        copied = Path(shutil.copytree(folder / "train", folder / f"lie-{number}"))
        cases[name] = lambda path=copied: use(path)
    name, seconds, megabytes = worst(cases)
    yield f"B4, {len(cases)} samples files (slowest: {name})", f"{seconds:.2f} s, {megabytes:.0f} MB", "2 s"


@contextmanager
def hostile(server: Server, body: bytes) -> Iterator[None]:
    """Make callers send a body repeatedly while the block runs; each leaves after a second."""
    stopped = threading.Event()

    def call() -> None:

        while not stopped.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=1)
            try:
                connection.request("POST", "/predict", body)
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()

    callers = [threading.Thread(target=call, daemon=True) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    time.sleep(3)
    yield
    stopped.set()
    for caller in callers:
        caller.join(30)


def of_server(folder: Path) -> Iterator[Row]:
    """Measure B2."""
    honest, body = png(picture(64, 64)), images.jpeg_of_scans(5000, 400, mpo=True)
    with serving(folder) as server:

        def seconds() -> list[float]:
            taken = []
            for _ in range(HONEST):
                started = time.monotonic()
                assert server.predict(honest).status in (200, 429)
                taken.append(time.monotonic() - started)
            return taken

        alone = seconds()
        with hostile(server, body):
            beside = seconds()
    for what, found in (("alone", alone), (f"beside {CALLERS} hostile callers", beside)):
        yield f"B2, an honest request {what}", f"{statistics.median(found):.3f} s, at most {max(found):.3f} s", "1 s"


def main() -> None:
    """Print a table of the measurements."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.bench", description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    lines = ["| what | measured | bound |", "| --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / name for name in ("tars", "set", "served")]
        for part in parts:
            part.mkdir()
        for row in (*of_images(), *of_tars(parts[0]), *of_indexes(parts[1]), *of_server(parts[2])):
            lines.append("| " + " | ".join(row) + " |")
            sys.stdout.write(f"{lines[-1]}\n")
            sys.stdout.flush()
    if out:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
