"""Take pictures of all that people see, by this machine's Chromium: `python -m tests.screenshots OUT`, or `make screenshots`.

They are README as GitHub renders it, the site of docs/, MLflow's page of a run, the server's page and a terminal, each
narrow and wide, light and dark. What a program can find is printed, and the exit status is 1 if it is on a page of this
repository: content that is wider than the screen, and pictures that do not load. The rest is for eyes.

README's three commands run once, in OUT/work. Nothing is fetched from elsewhere, and every server listens on loopback.
`--store` writes two of them to docs/pictures, for pages to show.
"""

import argparse
import html
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from deepskip.cluster.local import end_with_parent, free_ports
from deepskip.jobs.settings import ended_by_sigterm
from tests.blocks import READER, Block, blocks, commands, last_state, run_all
from tests.browser import NoChromium, chromium, drop

ROOT = Path(__file__).parents[1]
# width and height of the screen, pixels
SCREENS = {"wide": (1280, 720), "narrow": (390, 844)}
SCHEMES = ("light", "dark")
# Of a longer page, the head is taken.
MOST_HEIGHT = 3500
START_SECONDS = 120
# Addresses that a page may load from.
LOCAL = ("file:", "data:", "blob:", "http://127.0.0.1:")
DOCS = ("index", "tutorials/first-model", "cluster/this-machine", "serve", "kernels", "reference/deepskip")
# The pictures for pages, each with the view that it is.
STORED = {"serve": "server-answer", "mlflow": "mlflow-metrics"}
PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 150_000
FAULTS = """() => {
  const faults = [], over = document.scrollingElement.scrollWidth - window.innerWidth;
  if (over > 0) faults.push(`is ${over} pixels wider than the screen`);
  for (const image of document.images)
    if (image.complete && !image.naturalWidth && image.getAttribute("src")) faults.push(`does not load ${image.src}`);
  return faults;
}"""
# GitHub's way with a README: a column, tables and code that scroll in themselves, and two schemes.
README_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d1d9e0, #3d444d); --code: light-dark(#f6f8fa, #151b23); }
body { max-width: 1012px; margin: auto; padding: 32px; box-sizing: border-box; font: 16px/1.5 system-ui, sans-serif;
  color: light-dark(#1f2328, #f0f6fc); background: light-dark(#fff, #0d1117); overflow-wrap: break-word; }
h1, h2 { border-bottom: 1px solid var(--line); padding-bottom: .3em; }
a { color: light-dark(#0969da, #4493f8); }
img { max-width: 100%; background: light-dark(#fff, #0d1117); }
pre, code { font: 85%/1.45 monospace; background: var(--code); border-radius: 6px; }
pre { padding: 16px; overflow: auto; } pre code { font-size: 100%; }
table { display: block; width: max-content; max-width: 100%; overflow: auto; border-collapse: collapse; }
th, td { border: 1px solid var(--line); padding: 6px 13px; }
@media (width < 600px) { body { padding: 16px; } }
"""
TERMINAL_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; padding: 16px; background: light-dark(#fff, #0d1117); color: light-dark(#1f2328, #e6edf3); }
pre { margin: 0; font: 14px/1.4 monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
b { color: light-dark(#0a6b5c, #4fd1b5); }
"""


class View(NamedTuple):
    """A page to take: the picture's name, the address, what to do there first, and whether this repository made it."""

    name: str
    url: str
    act: Callable[[Any], object] = lambda page: None
    own: bool = True


def page_of(style: str, body: str, base: Path) -> str:
    """Return an HTML page whose relative links begin at a folder."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><base href="{base.as_uri()}/">'
    return f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head><body>{body}</body></html>'


@contextmanager
def readme(work: Path, steps: int) -> Iterator[list[View]]:
    """Render README as GitHub does; yield its view."""
    import markdown

    body = markdown.markdown((ROOT / "README.md").read_text(), extensions=["tables", "fenced_code"])
    path = work / "readme.html"
    path.write_text(page_of(README_STYLE, body, ROOT))
    yield [View("readme", path.as_uri())]


@contextmanager
def docs(work: Path, steps: int) -> Iterator[list[View]]:
    """Build the site; yield the views of some of its pages."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(work / "site")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    yield [View(f"docs-{page.replace('/', '-')}", (work / "site" / f"{page}.html").as_uri()) for page in DOCS]


def three_commands(work: Path, steps: int) -> list[tuple[str, str]]:
    """Run README's three commands in a folder, with fewer steps; return each with what it printed.

    The output is kept in the folder, so that the same commands run once.
    """
    (block,) = (b for b in blocks(ROOT / "README.md") if any("--optim.steps" in line for line in commands(b)))
    block = block._replace(text=block.text.replace("--optim.steps 600", f"--optim.steps {steps}"))
    recorded = work / f"terminal-{steps}.json"
    if not recorded.exists():
        recorded.write_text(json.dumps(list(zip(commands(block), run_in(work, block), strict=True))))
    return [(command, output) for command, output in json.loads(recorded.read_text())]


def run_in(work: Path, block: Block) -> list[str]:
    """Run a block as a reader does who has installed DeepSkip in the folder; return the outputs of its commands."""
    venv = work / ".venv"
    if not venv.exists():
        venv.symlink_to(sys.prefix)
    os.environ |= {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "COLUMNS": "100"}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    # The folders of this machine mean nothing to a reader.
    return [
        last_state(output).replace(f"{ROOT / '.venv'}/", ".venv/").replace(str(work), READER)
        for output in run_all([block], work)[0]
    ]


@contextmanager
def terminal(work: Path, steps: int) -> Iterator[list[View]]:
    """Run the three commands; yield the view of a terminal that shows them."""
    parts = [f"<b>$ {html.escape(c)}</b>\n{html.escape(output)}\n" for c, output in three_commands(work, steps)]
    path = work / "terminal.html"
    path.write_text(page_of(TERMINAL_STYLE, f"<pre>{''.join(parts)}</pre>", work))
    yield [View("terminal", path.as_uri())]


@contextmanager
def mlflow(work: Path, steps: int) -> Iterator[list[View]]:
    """Start MLflow on the run's database while the block runs; yield the views of the run."""
    three_commands(work, steps)
    database, (port,) = work / "runs" / "mlflow.db", free_ports(1)
    run = json.loads((work / "runs" / "coins" / "run.json").read_text())["mlflow_run_id"]
    with sqlite3.connect(database) as connection:
        ((experiment,),) = connection.execute("SELECT experiment_id FROM runs WHERE run_uuid = ?", (run,))
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (work / "mlflow.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--backend-store-uri", f"sqlite:///{database}"],
            env=os.environ | variables, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent(),
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            address = f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs/{run}"
            views = {"overview": address, "metrics": f"{address}/model-metrics", "artifacts": f"{address}/artifacts"}
            yield [View(f"mlflow-{name}", url, without_assistant, False) for name, url in views.items()]
        finally:
            stop(process)


def without_assistant(page: Any) -> None:
    """Close the panel that MLflow opens over its page, and wait: the charts come after the requests."""
    page.wait_for_timeout(2000)
    for close in page.get_by_role("button", name="Close").all():
        close.click()
    page.wait_for_timeout(3000)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, which are a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)


@contextmanager
def server(work: Path, steps: int) -> Iterator[list[View]]:
    """Serve the trained model while the block runs; yield the views of its page, before and after an image."""
    import numpy as np

    from deepskip import checkpoint
    from deepskip.data_shards.dataset import Shards
    from tests.jobs.serving import serving

    three_commands(work, steps)
    trained = checkpoint.read_model(work / "runs" / "coins" / checkpoint.FOLDER / checkpoint.BEST)
    file = io.BytesIO()
    shards = Shards(work / "data" / "coins" / "test")
    images = [shards.read(entry)[0] for entry in shards.index.entries(range(8))]
    # Eight test images, two rows of four.
    Image.fromarray(np.vstack([np.hstack(images[:4]), np.hstack(images[4:])])).save(file, "PNG")

    def answer(page: Any) -> None:
        said = drop(page, file.getvalue(), "coins.png")
        assert said.startswith("coins.png: "), said
        page.evaluate("() => document.getElementById('picture').decode()")

    (work / "served").mkdir(exist_ok=True)
    with serving(work / "served", trained=trained) as started:
        url = f"http://127.0.0.1:{started.port}/"
        yield [View("server-start", url), View("server-answer", url, answer)]


GROUPS: dict[str, Callable[[Path, int], AbstractContextManager[list[View]]]] = {
    "readme": readme, "docs": docs, "terminal": terminal, "mlflow": mlflow, "server": server,
}  # fmt: skip


def take(browser: Any, views: list[View], out: Path) -> Iterator[tuple[bool, str]]:
    """Take all pictures of some views.

    Args:
        browser: Playwright's browser.
        views: pages to take.
        out: folder of the pictures.

    Yields:
        For each fault that is found, whether the page is of this repository, and a line of text.
    """
    for screen, (width, height) in SCREENS.items():
        for scheme in SCHEMES:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            context.route(lambda url: not url.startswith(LOCAL), lambda route: route.abort())
            for view in views:
                page = context.new_page()
                # MLflow's page asks its server without end; its views wait by themselves.
                page.goto(view.url, wait_until="networkidle" if view.own else "load", timeout=1000 * START_SECONDS)
                view.act(page)
                name = f"{view.name}-{screen}-{scheme}"
                tall = min(MOST_HEIGHT, page.evaluate("() => document.documentElement.scrollHeight"))
                area = {"x": 0, "y": 0, "width": width, "height": max(tall, height)}
                page.screenshot(path=out / f"{name}.png", full_page=True, clip=area, timeout=1000 * START_SECONDS)
                yield from ((view.own, f"{name} {fault}") for fault in page.evaluate(FAULTS))
                page.close()
            context.close()


def store(out: Path) -> None:
    """Write the pictures for pages to docs/pictures, with few colours, so that they are small."""
    PICTURES.mkdir(exist_ok=True)
    for name, view in STORED.items():
        path = PICTURES / f"{name}.png"
        with Image.open(out / f"{view}-wide-light.png") as picture:
            picture.convert("RGB").quantize(128).save(path, optimize=True)
        assert path.stat().st_size < MOST_BYTES, f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}"


def main() -> int:
    """Take the pictures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--only", metavar="WORD", choices=GROUPS, help=f"only one of {', '.join(GROUPS)}")
    parser.add_argument("--steps", type=int, default=600, help="training steps, README's 600 by default")
    parser.add_argument("--store", action="store_true", help="write the pictures of docs/pictures anew")
    arguments = parser.parse_args()
    if arguments.store and arguments.only:
        parser.error("--store needs all pictures, so it goes without --only")
    work = arguments.out.resolve() / "work"
    work.mkdir(parents=True, exist_ok=True)
    faults: list[tuple[bool, str]] = []
    try:
        with ended_by_sigterm(), chromium() as browser:
            for name in [arguments.only] if arguments.only else GROUPS:
                with GROUPS[name](work, arguments.steps) as views:
                    faults += take(browser, views, arguments.out)
    except NoChromium as error:
        sys.exit(f"error: {error}")
    if arguments.store:
        store(arguments.out)
    sys.stdout.writelines(f"{line}\n" for _, line in faults)
    sys.stdout.write(f"pictures: {arguments.out}\n")
    return int(any(own for own, _ in faults))


if __name__ == "__main__":
    sys.exit(main())
