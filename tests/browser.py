"""Start this machine's Chromium, and drop a file on the server's page, for `make test-browser` and `make screenshots`."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# This script drops a file with the given bytes.
DROP = """([bytes, name, type]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
  const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
  for (const kind of ["dragover", "drop"]) document.getElementById("drop").dispatchEvent(new DragEvent(kind, options));
}"""


class NoChromium(RuntimeError):
    """There is no Chromium on this machine; the message says what to do."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium without a window, and stop it at the end of the block.

    Yields:
        Playwright's browser.

    Raises:
        NoChromium: there is none.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        raise NoChromium("no chromium; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield started
        finally:
            started.close()


def drop(page: Any, data: bytes, name: str) -> str:
    """Drop a file on the server's page, and wait for its answer.

    Args:
        page: Playwright's page.
        data: bytes of the file.
        name: name of the file.

    Returns:
        What the page reports on the file.
    """
    page.evaluate(DROP, [list(data), name, ""])
    said = page.locator("#said")
    # The page's policy forbids what Playwright's own waiting for a function needs.
    deadline = time.monotonic() + 60
    while "being segmented" in said.inner_text():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    return said.inner_text()
