"""Public functions that take or return arrays state their shapes, and docstrings and messages have plain words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import words

ROOMS = ("cluster", "data_shards", "deepskip", "jobs", "kernels")
ARRAY = re.compile(r"\b(Tensor|ndarray|NDArray)\b")
# (N, C, H, W), (rows,), (2 + 3 V,): sizes are in brackets, and a scalar has none.
SHAPE = re.compile(r"\([^()]*(\([^()]*\)[^()]*)*,[^()]*\)|\bscalars?\b|\b\w+ x \w+\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.Module) -> Iterator[Function]:
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield inner


def takes_arrays(function: Function) -> bool:
    arguments = function.args
    hints = [x.annotation for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if x.annotation]
    return any(ARRAY.search(ast.unparse(hint)) for hint in hints)


def states_no_shape(path: Path) -> list[str]:
    # A module's forward is described in its class.
    return [
        f"{path}:{function.lineno} {function.name}"
        for function in public_functions(ast.parse(path.read_text()))
        if takes_arrays(function) and function.name != "forward" and not SHAPE.search(ast.get_docstring(function) or "")
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_that_take_arrays_state_shapes(room: str) -> None:
    found = [line for path in sorted(Path(room).rglob("*.py")) for line in states_no_shape(path)]
    assert not found, "\n".join(found)


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(
        'def f(x: "Tensor") -> None:\n    """Gives the loss."""\n    raise ValueError("it goes on")\n\n\n'
        'def g(x: "Tensor") -> None:\n    """Return the loss of x (N, C)."""\n'
    )
    assert states_no_shape(path) == [f"{path}:1 f"]
    assert list(words.findings(path)) == [f'{path}:3: "goes on": continue, resume', f'{path}:2: "Gives ...": Return']
