"""The code prints all messages that the page on troubleshooting quotes."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
# This stands for an f-string's values, and is in no message.
VALUE = "\0"


def literals_in(source: str) -> Iterator[str]:
    """Yield each string literal of Python code except docstrings, with VALUE for an f-string's values."""
    tree = ast.parse(source)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    passed = {id(node.body[0].value) for node in ast.walk(tree)
              if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    # The walk is breadth first, so an f-string comes before its parts.
    for node in ast.walk(tree):
        if id(node) in passed:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            passed.update(map(id, parts))
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def literals() -> tuple[str, ...]:
    """Return the string literals of all folders that print messages."""
    files = [
        path
        for folder in ("cluster", "data_shards", "deepskip", "jobs", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    ]
    return tuple(text for path in sorted(files) for text in literals_in(path.read_text()))


def quoted(page: str) -> list[str]:
    """Return the messages in backticks of the first columns, joined by "..." if a cell joins them."""
    found = []
    for line in page.splitlines():
        if line.startswith("| ") and not line.startswith("| message "):
            cell = line.split(" | ")[0].removeprefix("| ").replace("` ... `", " ... ")
            found += re.findall(r"`([^`]+)`", cell)
    return found


def is_printed(message: str, texts: tuple[str, ...]) -> bool:
    """Return whether one literal has the parts of a message, between its "...", in their order."""
    pattern = re.compile(".*".join(map(re.escape, (part.strip() for part in message.split("...")))), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_the_page_quotes_many_messages() -> None:
    assert len(quoted(PAGE.read_text())) > 25


@pytest.mark.parametrize("message", quoted(PAGE.read_text()))
def test_the_code_prints_what_the_page_quotes(message: str) -> None:
    assert is_printed(message, literals()), f"{PAGE.name} quotes {message!r}, which no string of the code has"


def test_a_message_is_found_by_its_parts_and_not_in_docstrings() -> None:
    texts = tuple(
        literals_in(
            'def f(n):\n    """No shards here."""\n    raise ValueError(f"{n} of 3 "\n  f"shards at {n} are bad")\n'
        )
    )
    assert is_printed("of 3 shards at ... are bad", texts)
    assert not is_printed("are bad ... shards at", texts)
    assert not is_printed("No shards here", texts)
