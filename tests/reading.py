"""Print words and reading level of the pages, before and after: `python -m tests.reading COMMIT`; needs textstat
0.7.8, which downloads nothing.

The level is Flesch's reading ease, from 0 to 100, and a higher level is easier. It counts prose alone, without code and
tables.
"""

import re
import subprocess
import sys
from pathlib import Path

import textstat

ROOT = Path(__file__).parents[1]


def prose(markdown: str) -> str:
    """Return a page without code, tables, headings and the addresses of links."""
    text = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!", "<"))]
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", "\n".join(lines)).replace("`", "")


def ease(markdown: str) -> str:
    """Return the reading ease of a page, or a dash if it has no prose."""
    text = prose(markdown)
    return f"{textstat.flesch_reading_ease(text):.0f}" if len(text.split()) > 30 else "-"


def main(commit: str) -> None:
    """Print the table for the pages of a commit and of today."""
    names = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", commit], cwd=ROOT, capture_output=True, text=True, check=True
    )
    old = {name for name in names.stdout.splitlines() if name.endswith(".md")}
    now = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]}
    rows = ["| page | words before | after | ease before | after |", "|---|---:|---:|---:|---:|"]
    for name in sorted((old & {"README.md"}) | {x for x in old if x.startswith("docs/")} | now):
        before = ""
        if name in old:
            shown = subprocess.run(
                ["git", "show", f"{commit}:{name}"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            before = shown.stdout
        after = (ROOT / name).read_text() if name in now else ""
        cells = [str(len(text.split())) if text else "" for text in (before, after)]
        cells += [ease(text) if text else "" for text in (before, after)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
