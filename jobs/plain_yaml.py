"""Read YAML settings from untrusted sources.

Settings that name code to import are refused, and so are aliases that expand to more values than settings have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**18
# most values of a file; an aliased value counts each time that it is used
MAX_VALUES = 20_000
MAX_DEPTH = 20
# jsonargparse imports what these keys name, before it finds that no setting accepts it
CODE = ("class_path", "init_args", "dict_kwargs", "__path__", "__default_config__")
# libyaml's loader is fast and limits the depth itself, but may be missing
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a settings file.

    Args:
        path: YAML file.

    Returns:
        The settings; {} for an empty file.

    Raises:
        ValueError: the file is too large, is not YAML, holds no settings, names code or expands too far.
        OSError: the file cannot be read.
    """
    found = yaml.load(read_text(path), LOADER) or {}  # noqa: S506  # nosec: of safe loaders
    if not isinstance(found, dict):
        raise ValueError("holds no settings")
    return found


def read_text(path: Path) -> str:
    """Read a settings file as text, and validate it as YAML.

    Args:
        path: YAML file.

    Returns:
        The text.

    Raises:
        ValueError: the path is not a regular file, or the file is too large or fails `look_through`.
        OSError: the file cannot be read.
    """
    # reading a pipe would block
    if path.exists() and not path.is_file():
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES} bytes, which is too many for settings")
    text = data.decode()
    look_through(text)
    return text


def look_through(text: str) -> None:
    """Validate that a text is YAML that names no code, and that its aliases expand to few values.

    Args:
        text: YAML.

    Raises:
        ValueError: the text fails; the message says why.
    """
    try:
        node = yaml.compose(text, LOADER)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    counts: dict[int, int] = {}
    values = count(node, counts, 0) if node is not None else 0
    if values > MAX_VALUES:
        raise ValueError(f"expands to {values} values; at most {MAX_VALUES} are allowed")


def count(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Count the values of a node with all its aliases expanded.

    Args:
        node: a node of the YAML document.
        counts: values by `id` of a node, for those already counted; 0 for those that are being counted.
        depth: nesting depth of the node.

    Returns:
        The number of values, the node included.

    Raises:
        ValueError: the node contains itself, is nested too deeply, or names code to import.
    """
    if id(node) in counts:
        if not counts[id(node)]:
            raise ValueError("has a value that contains itself")
        return counts[id(node)]
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep; settings are flat")
    counts[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [each for pair in node.value for each in pair]
        for key, _ in node.value:
            if key.value in CODE:
                raise ValueError(f"has {key.value}, which would import code; settings may not")
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    counts[id(node)] = 1 + sum(count(each, counts, depth + 1) for each in inner)
    return counts[id(node)]


def check_arguments(argv: Sequence[str]) -> None:
    """Validate the values of a command line, files of --config included.

    Args:
        argv: command-line arguments.

    Raises:
        ValueError: an argument fails; the message names it.
    """
    previous = ""
    for argument in argv:
        option, equals, value = argument.partition("=")
        named = option if equals and argument.startswith("--") else previous
        value = value if equals and argument.startswith("--") else argument
        previous = argument if argument.startswith("--") else ""
        if any(word in option for word in CODE):
            raise ValueError(f"{option} would import code; settings may not")
        try:
            if named == "--config" and not value.lstrip().startswith(("{", "[")):
                settings = read_settings(Path(value))
                if "config" in settings:
                    raise ValueError("names another settings file; give both on the command line")
            elif value.lstrip().startswith(("{", "[", "&", "!", "*")) or "\n" in value:
                look_through(value)
        except (ValueError, OSError) as error:
            # the parser itself reports a missing file
            if not isinstance(error, FileNotFoundError):
                reason = error.strerror if isinstance(error, OSError) else error
                raise ValueError(f"{named or 'the command line'} {value[:100]} {reason}") from error
