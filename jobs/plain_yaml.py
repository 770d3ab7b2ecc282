"""Reads YAML of settings that a stranger may have written: it names no code to import, and unfolds to no more than it shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**18
# values of a file, those behind aliases counted each time
MAX_VALUES = 20_000
MAX_DEPTH = 20
# by these words jsonargparse would import what is named, before it finds that no setting takes it
CODE = ("class_path", "init_args", "dict_kwargs", "__path__", "__default_config__")
# libyaml's, which is quick and bounds depth itself, where there is one
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a file of settings; raises ValueError that says what is wrong with it, or OSError."""
    found = yaml.load(read_text(path), LOADER) or {}  # noqa: S506  # nosec: of safe loaders
    if not isinstance(found, dict):
        raise ValueError("holds no settings")
    return found


def read_text(path: Path) -> str:
    """Reads a file of settings as text, and looks through it; raises ValueError, or OSError."""
    # a pipe would be waited for
    if path.exists() and not path.is_file():
        raise ValueError("is no file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES} bytes; a file of settings has fewer")
    text = data.decode()
    look_through(text)
    return text


def look_through(text: str) -> None:
    """Raises ValueError where a text is no YAML, names code, or unfolds to more than settings have."""
    try:
        node = yaml.compose(text, LOADER)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())[:300]}") from error
    counts: dict[int, int] = {}
    values = count(node, counts, 0) if node is not None else 0
    if values > MAX_VALUES:
        raise ValueError(f"unfolds to {values} values; at most {MAX_VALUES} are read")


def count(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Counts a node's values, unfolded; counts: of the nodes seen so far, and 0 for those that are being counted."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise ValueError("holds a value that holds itself")
        return counts[id(node)]
    if depth > MAX_DEPTH:
        raise ValueError(f"is deeper than {MAX_DEPTH}; settings are flat")
    counts[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [each for pair in node.value for each in pair]
        for key, _ in node.value:
            if key.value in CODE:
                raise ValueError(f"{key.value} would import code; settings name none")
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    counts[id(node)] = 1 + sum(count(each, counts, depth + 1) for each in inner)
    return counts[id(node)]


def check_arguments(argv: Sequence[str]) -> None:
    """Looks through what a command line brings, files of --config among it; raises ValueError that names the argument."""
    previous = ""
    for argument in argv:
        option, equals, value = argument.partition("=")
        named = option if equals and argument.startswith("--") else previous
        value = value if equals and argument.startswith("--") else argument
        previous = argument if argument.startswith("--") else ""
        if any(word in option for word in CODE):
            raise ValueError(f"{option} would import code; settings name none")
        try:
            if named == "--config" and not value.lstrip().startswith(("{", "[")):
                settings = read_settings(Path(value))
                if "config" in settings:
                    raise ValueError("names another file of settings; give both on the command line")
            elif value.lstrip().startswith(("{", "[", "&", "!", "*")) or "\n" in value:
                look_through(value)
        except (ValueError, OSError) as error:
            # that a file is not there the parser says itself
            if not isinstance(error, FileNotFoundError):
                reason = error.strerror if isinstance(error, OSError) else error
                raise ValueError(f"{named or 'the command line'} {value[:100]} {reason}") from error
