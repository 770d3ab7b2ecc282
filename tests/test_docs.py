"""The site of docs/ builds without a warning; its links lead somewhere, and its names and commands exist."""

import io
import re
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from functools import lru_cache
from pathlib import Path

from deepskip.jobs import cli

ROOT = Path(__file__).parents[1]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # A link to code becomes the name of the file. A link to a page stays a link.
    data = (tmp_path / "exact-stream.html").read_text()
    assert "<code>data_shards/order.py</code>" in data
    assert "../data_shards" not in data
    assert 'href="chaos.html"' in (tmp_path / "faults.html").read_text()
    assert 'href="networks.html"' in (tmp_path / "compare.html").read_text()
    # This text comes from docstrings.
    reference = (tmp_path / "reference" / "deepskip.html").read_text()
    assert "Build the network that a checkpoint&#39;s state describes" in reference.replace("'", "&#39;")
    # Google's sections become tables.
    assert (
        "doc-section-item field-annotation" in reference
        or '<span class="doc-section-title">Raises:</span>' in reference
    )
    # No page loads anything from other sites.
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert not fetched, (page, fetched)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, by the rule of GitHub and mkdocs for plain words."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
    tried = 0
    for page in pages:
        text = re.sub(r"^ *```.*?^ *```|`[^`\n]+`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                assert target.startswith("https://"), f"{page}: {target}"
                continue
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(found), f"{page}: {target}: no such heading"
            tried += 1
    assert tried > 100


def commands_in(text: str) -> list[list[str]]:
    """Return the words of each `deepskip ...` in code blocks and in backquotes."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [line.partition("  #")[0] for line in lines if line.startswith("deepskip ")]
    found += re.findall(r"`(deepskip [^`]+)`", text)
    return [line.split()[1:] for line in found]


@lru_cache
def help_of(*words: str) -> str:
    """Return a command's help text."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        cli.main([*words, "--help"])
    return said.getvalue()


def test_the_page_of_commands_is_what_they_print() -> None:
    code = "from tests.commands_page import PAGE, text; import sys; sys.exit(PAGE.read_text() != text())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0, "python -m tests.commands_page writes it anew"


def test_every_command_of_the_pages_is_one_and_has_its_options() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    tried = 0
    for page in pages:
        for words in commands_in(page.read_text()):
            if words[0] not in cli.COMMANDS:
                # These are `deepskip --help`, `deepskip COMMAND --help`, and the name of the package.
                assert words[0].startswith("-") or words[0].isupper() or not words[0].isalpha() or len(words) > 5, (
                    f"{page}: deepskip {words[0]}"
                )
                continue
            inner = words[1:2] if words[0] in ("pack", "cluster") and words[1:] and words[1].isalpha() else []
            said = help_of(words[0], *inner)
            for word in words:
                option = re.match(r"--[a-z][\w.]*", word)
                assert option is None or option[0] in said or option[0] == "--help", (
                    f"{page}: {' '.join(words)}: {option[0]}"
                )
            tried += 1
    assert tried > 40
