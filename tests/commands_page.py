"""Write docs/reference/commands.md, every command with its options: `python -m tests.commands_page`."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

from deepskip.jobs import cli

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "commands.md"
INNER = {"pack": ("folder", "coco", "arrays", "coins"), "cluster": ("up", "down", "status")}
HEAD = """# Commands

What `deepskip COMMAND --help` prints. Settings of `train`, `evaluate`, `predict`, `export`, `serve` and
`compare` can be in a YAML file as well: `--config mine.yaml`.
This page is written by `python -m tests.commands_page`.
"""


def help_of(*words: str) -> str:
    """Return what a command prints for --help."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        cli.main([*words, "--help"])
    return printed.getvalue()


def page() -> Iterator[str]:
    """Yield the parts of the page."""
    yield HEAD
    for topic, commands in cli.TOPICS.items():
        yield f"\n## {topic.capitalize()}\n"
        for name, (_, about) in commands.items():
            yield f"\n### deepskip {name}\n\n{about[0].upper()}{about[1:]}.\n"
            for words in [(name, inner) for inner in INNER.get(name, ())] or [(name,)]:
                text = "\n".join(line.rstrip() for line in help_of(*words).strip().splitlines())
                yield f"\n```text\n$ deepskip {' '.join(words)} --help\n{text}\n```\n"


def text() -> str:
    """Return the page, with lines as wide as on a terminal of 110 columns."""
    os.environ["COLUMNS"] = "110"
    sys.argv[0] = "deepskip"
    return "".join(page())


if __name__ == "__main__":
    PAGE.write_text(text())
