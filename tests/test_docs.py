"""The site of docs/ builds without a warning: no link leads nowhere, no name in the reference is unknown."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # a link to code becomes the name of the file; one to a page stays one
    data = (tmp_path / "data.html").read_text()
    assert "<code>data_shards/order.py</code>" in data
    assert "../data_shards" not in data
    assert 'href="chaos.html"' in (tmp_path / "faults.html").read_text()
    assert 'href="networks.html"' in (tmp_path / "compare.html").read_text()
    # from docstrings
    assert "Builds the network that a checkpoint&#39;s state describes" in (
        tmp_path / "reference" / "deepskip.html"
    ).read_text().replace("'", "&#39;")
    # nothing is fetched from elsewhere
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not fetched, (page, fetched)
