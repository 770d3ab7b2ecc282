"""Find the code blocks of pages, run them in one folder, and write their output into the page.

`python -m tests.blocks PAGE ... --folder DIR [--update]` runs the blocks of pages unchanged, as `make newcomer` does. A
block that no test can run has a comment before it: <!-- no-run: REASON -->. If the reason is NEWCOMER, this command
runs it.

In a block of `console`, commands begin with "$ " and the rest is output. Each line of `bash` is a command, and `python`
is a program.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

NEWCOMER = "make newcomer runs it"
KINDS = ("console", "bash", "python", "yaml", "toml", "json", "text")
MARK = re.compile(r"<!-- no-run: (.+) -->")
END = "@@@ end of command"
# Stands in outputs for the folder in which the blocks were run.
READER = "/home/you/deepskip"


class Block(NamedTuple):
    """A code block: its page, first line (counted from 1), kind, text, and the reason why it is not run, or ""."""

    page: Path
    line: int
    kind: str
    text: str
    reason: str

    @property
    def place(self) -> str:
        """Return its place, for messages."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page."""
    lines = page.read_text().splitlines()
    start, kind, indent = None, "", 0
    for number, line in enumerate(lines):
        fence = re.match(r"( *)```(\w*)", line)
        if not fence:
            continue
        if start is None:
            start, kind, indent = number + 1, fence[2], len(fence[1])
            continue
        before = [x for x in lines[: start - 1] if x.strip()]
        mark = MARK.search(before[-1]) if before else None
        yield Block(page, start + 1, kind, "\n".join(x[indent:] for x in lines[start:number]), mark[1] if mark else "")
        start = None


def commands(block: Block) -> list[str]:
    """Return the commands of a block of `console` or `bash`; join those over several lines."""
    joined = block.text.replace("\\\n", " ")
    if block.kind == "bash":
        return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def run_all(wanted: list[Block], folder: Path) -> dict[int, list[str]]:
    """Run blocks in one shell, in a folder; return the output of each command by the number of its block.

    Raises:
        RuntimeError: A command failed. The message names page and line.
    """
    script, places = ["exec 2>&1"], []
    for number, block in enumerate(wanted):
        if block.kind == "python":
            path = folder / f"block-{number}.py"
            path.write_text(block.text)
            todo = [f"python {path.name}"]
        else:
            todo = commands(block)
        for command in todo:
            places.append((number, block, command))
            script += [command, f'echo "{END} $?"']
    done = subprocess.run(["bash", "-c", "\n".join(script)], cwd=folder, capture_output=True, text=True, check=False)
    found: dict[int, list[str]] = {number: [] for number in range(len(wanted))}
    parts = re.split(rf"{END} (\d+)\n", done.stdout)
    for (number, block, command), text, status in zip(places, parts[::2], parts[1::2], strict=False):
        found[number].append(text)
        sys.stdout.write(f"$ {command}\n{text}")
        if status != "0":
            raise RuntimeError(f"{block.place}: {command!r} ended with status {status}:\n{text[-3000:]}")
    if len(parts[1::2]) != len(places):
        raise RuntimeError(f"{wanted[0].page}: the shell ended after {len(parts[1::2])} of {len(places)} commands")
    return found


def updated(page: Path, outputs: dict[int, list[str]], clean: Callable[[str], str]) -> str:
    """Return the text of a page with the outputs (by line of the block) inserted into its `console` blocks."""
    lines = page.read_text().splitlines()
    for block in sorted((b for b in blocks(page) if b.line in outputs and b.kind == "console"), key=lambda b: -b.line):
        new = []
        given = [line for line in block.text.splitlines() if line.startswith("$ ")]
        for command, text in zip(given, outputs[block.line], strict=True):
            new += [command, *clean(text).splitlines()]
        first = block.line - 1
        lines[first : first + len(block.text.splitlines())] = new
    return "\n".join(lines) + "\n"


def last_state(text: str) -> str:
    """Keep what a terminal shows in the end: of each line, what follows its last carriage return."""
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.rstrip("\r").rsplit("\r", 1)[-1]) for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip("\n")


def main() -> None:
    """Run the pages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    folder = str(arguments.folder.resolve())
    for page in arguments.pages:
        wanted = [b for b in blocks(page) if b.kind in ("console", "bash", "python") and b.reason in ("", NEWCOMER)]
        found = run_all(wanted, arguments.folder)
        if arguments.update:
            outputs = {b.line: found[i] for i, b in enumerate(wanted)}
            page.write_text(updated(page, outputs, lambda text: last_state(text).replace(folder, READER)))


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "120")
    main()
