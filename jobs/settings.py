"""Read a job's settings from YAML and the command line; jsonargparse parses them, and this module explains its errors."""

import argparse
import difflib
import json
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from deepskip.config import Config, check_values, faults_of, faults_of_norm
from deepskip.data_shards import storage
from deepskip.data_shards.arguments import with_numbers
from deepskip.jobs.plain_yaml import check_arguments, look_through

T = TypeVar("T")
# exit status after SIGTERM
STOPPED = 128 + signal.SIGTERM

# the help of a setting is the string below its field in the dataclass
set_parsing_settings(docstring_parse_attribute_docstrings=True)
# where a section is text, jsonargparse would import what it names before it refuses it
# a row of a comparison is a class that jsonargparse itself imports by name
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["deepskip.jobs.comparison.grid.Row"])

KEYS = [f"{section.name}.{field.name}" for section in fields(Config) for field in fields(section.type)]  # type: ignore[arg-type]


class NotHere(SystemExit):
    """Exit because of something that this machine does not have; the machines of a cluster may have it."""


def check_norm(config: Config, workers: int) -> None:
    """Stop a training whose workers, of which the settings may give no number, have too little to normalise.

    Args:
        config: the settings of the training.
        workers: largest number of workers.

    Raises:
        SystemExit: if the lowest level has one value a channel.
    """
    for fault in faults_of_norm(config, workers):
        stop(f"with {workers} workers {fault}")


def stop(message: str, ending: type[SystemExit] = SystemExit) -> NoReturn:
    """Exit because of bad input, with an `error:` line on stderr for each fault and status 2.

    Args:
        message: a line for each fault.
        ending: type of the exception.

    Raises:
        SystemExit: always, as `ending`, with the message as a note.
    """
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    ended = ending(2)
    # callers in Python read the message from here
    ended.add_note(message)
    raise ended


def build_parser(program: str) -> ArgumentParser:
    """Build the command line of a training: each field of Config as --section.key, and --config for a YAML file.

    Args:
        program: name of the command.
    """
    parser = ArgumentParser(
        prog=f"deepskip {program}",
        description="Train a segmentation model. Settings come from the defaults, then --config, then the command line; "
        "deepskip train DATA is short for --data.path DATA.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; see jobs/configs")
    parser.add_argument(
        "--local", action="store_true", help="train in this process, without Ray; under torchrun this is the default"
    )
    parser.add_class_arguments(Config)
    return parser


@lru_cache
def training_parser() -> ArgumentParser:
    """Return the parser of `configured`, which is built once because that takes a tenth of a second."""
    return build_parser("train")


def configured(settings: Mapping[str, Any], where: str) -> Config:
    """Return the settings of a training from a dict of sections, as its YAML has them.

    Args:
        settings: values by section and key.
        where: origin of the settings, which error messages name.

    Raises:
        SystemExit: status 2 if the settings are invalid.
    """
    parser = training_parser()
    try:
        look_through(json.dumps(settings, default=str))
        parsed = parser.parse_object(dict(settings))
        check_sections(parsed)
        made = parser.instantiate_classes(parsed)
        config = Config(**{section.name: getattr(made, section.name) for section in fields(Config)})
        check_values(config)
        check_network(config)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        stop("\n".join(f"{where}: {line}" for line in explain(str(error)).splitlines()))
    return config


def check_sections(parsed: Namespace) -> None:
    """Raise ValueError if a section of a training's settings is a single value, such as null.

    Args:
        parsed: settings as jsonargparse has parsed them.

    Raises:
        ValueError: a section is no mapping; names it.
    """
    for section in fields(Config):
        if not isinstance(value := parsed[section.name], Namespace):
            raise ValueError(no_section(section.name, "null" if value is None else value, KEYS))


def no_section(name: str, value: Any, keys: Sequence[str]) -> str:
    """Return the message for a section that has a single value, with a key of the section as an example."""
    inner = [key for key in keys if key.startswith(f"{name}.")]
    return f"{name} is {value}; it is a section of settings, such as {(inner or keys)[0]}"


def check_network(config: Config) -> None:
    """Raise ValueError if the network is unknown; torch is imported only here, so that --help works without it.

    Args:
        config: settings of a training.

    Raises:
        ValueError: the network or one of its options is unknown.
    """
    from deepskip import networks

    networks.check(asdict(config.model))


def parse(program: str, argv: list[str]) -> tuple[Config, str, bool]:
    """Read the settings of a training.

    Args:
        program: name of the command.
        argv: command-line arguments.

    Returns:
        The settings, the stem of the config file's name (`program` without a config file), and whether --local is
        given.

    Raises:
        SystemExit: status 2 if a key or value is invalid; 0 after --help.
    """
    parser, argv = build_parser(program), with_path(argv)
    try:
        check_arguments(argv)
        parsed = parser.parse_args(files_first(argv))
        check_sections(parsed)
        config = parser.instantiate_classes(parsed)
        settings = Config(**{section.name: getattr(config, section.name) for section in fields(Config)})
        check_values(settings)
        check_network(settings)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        stop(explain(str(error)))
    except yaml.YAMLError as error:
        stop(f"the config is not valid YAML: {' '.join(str(error).split())}")
    files = [Path(str(path)) for path in parsed.config or []]
    return settings, files[-1].stem if files else program, parsed.local


def settings_parser(program: str, kind: type) -> ArgumentParser:
    """Build the command line of a job: each field of a dataclass as --key, and --config for a YAML file.

    Args:
        program: name of the command.
        kind: the dataclass.
    """
    parser = ArgumentParser(prog=f"deepskip {program}", description=kind.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_class_arguments(kind)
    return parser


def parse_settings(program: str, kind: type[T], argv: list[str]) -> T:
    """Read the settings of a job.

    Args:
        program: name of the command.
        kind: dataclass of the settings.
        argv: command-line arguments.

    Returns:
        The settings, an instance of `kind`.

    Raises:
        SystemExit: status 2 if a key or value is invalid; 0 after --help.
    """
    parser = settings_parser(program, kind)
    keys = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    # earlier versions of predict and serve had --checkpoint for --model
    argv = [re.sub(r"^--checkpoint(?==|$)", "--model", argument) for argument in argv]
    # list options, each with whether its list may hold numbers
    lists = {
        f"--{field.name}": str(field.type) != "list[str]"
        for field in fields(kind)  # type: ignore[arg-type]
        if str(field.type).startswith("list[")
    }
    try:
        check_arguments(argv)
        floats = {f"--{field.name}" for field in fields(kind) if str(field.type).startswith("float")}  # type: ignore[arg-type]
        argv = [in_yaml(argument, floats) for argument in with_numbers(argv, floats)]
        parsed = parser.instantiate_classes(parser.parse_args(files_first(with_lists(argv, lists))))
        settings = kind(**{key: getattr(parsed, key) for key in keys})
        if faults := faults_of(settings):
            raise ValueError("\n".join(faults))
        return settings
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        stop(explain(str(error), keys))
    except yaml.YAMLError as error:
        stop(f"the config is not valid YAML: {' '.join(str(error).split())}")


def with_path(argv: Sequence[str]) -> list[str]:
    """Return arguments of a training in which DATA, a first word that is no option, is the value of --data.path.

    Args:
        argv: arguments of the command; --local may come before DATA.
    """
    place = 1 if list(argv[:1]) == ["--local"] else 0
    if len(argv) > place and not argv[place].startswith("-"):
        return [*argv[:place], "--data.path", *argv[place:]]
    return list(argv)


def files_first(argv: Sequence[str]) -> list[str]:
    """Return arguments with each --config before the others, because the parser lets a later one win.

    Args:
        argv: arguments of a command.
    """
    files, others, words = list[str](), list[str](), iter(argv)
    for word in words:
        if word == "--config":
            files += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return files + others


def in_yaml(argument: str, options: Set[str]) -> str:
    """Return an argument; if it gives an option nan or inf, these are written as YAML has them: .nan and .inf.

    Args:
        argument: argument of the command line.
        options: options whose values are floating-point numbers.
    """
    option, _, value = argument.partition("=")
    found = re.fullmatch("([+-]?)(nan|inf)", value.lower()) if option in options else None
    return f"{option}={found[1]}.{found[2]}" if found else argument


def with_lists(argv: Sequence[str], options: Mapping[str, bool]) -> list[str]:
    """Return arguments in which the words after a list option are one: --images a b becomes --images '["a", "b"]'.

    Args:
        argv: command-line arguments.
        options: list options, each with whether its list may hold numbers.
    """
    made, words = [], list(argv)
    while words:
        made.append(words.pop(0))
        if made[-1] in options and words and not words[0].startswith("["):
            taken = []
            while words and not words[0].startswith("--"):
                taken.append(words.pop(0))
            made.append(json.dumps([json_value(word) if options[made[-1]] else word for word in taken]))
    return made


def json_value(word: str) -> Any:
    """Return the number that a word spells, or else the word itself."""
    try:
        return json.loads(word) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) else word
    except ValueError:
        return word


def explain(message: str, keys: Sequence[str] = KEYS) -> str:
    """Convert an error of jsonargparse into one that names the key, its value and what is allowed.

    Args:
        message: message of jsonargparse.
        keys: all known keys.

    Returns:
        The clearer message, or the same one if it is not recognized.
    """
    if message.startswith("Problems parsing config"):
        return f"--config is not valid YAML: {' '.join(message.split())}"
    if found := re.search(r'Parser key "config":\s*(.*)', message, re.DOTALL):
        return f"--config: {' '.join(found[1].split())}"
    union = r'Parser key "([\w.]+)":\s*Does not validate .*Subtypes: \[(.*)\]\s*Errors:.*Given value: (.*)'
    if found := re.search(union, message, re.DOTALL):
        # A comma within brackets belongs to one of the types.
        types = re.sub(r", (?![^\[]*\])", " or ", allowed_types(found[2]))
        return f"{found[1]} is {found[3].strip()!r}; it must be {types}"
    if found := re.search(r'Parser key "([\w.]+)":\s*(.*)Got value: (.*)', message, re.DOTALL):
        return f"{found[1]} is {found[3].strip()!r}; it must be {allowed_types(found[2])}"
    if found := re.search(r'Parser key "([\w.]+)":\s*Unable to load config "(.*?)"', message, re.DOTALL):
        return no_section(found[1], found[2], keys)
    unknown = (
        re.search(r"Group '(?P<group>\w+)' does not accept option '(?P<key>[\w.]+)'", message)
        or re.search(r"Option '(?P<key>[\w.]+)' is not accepted", message)
        or re.search(r"unrecognized arguments: (--)?(?P<key>[^\s=]+)", message)
    )
    if unknown:
        group = unknown.groupdict().get("group")
        key = f"{group}.{unknown['key']}" if group else unknown["key"]
        return f"unknown setting {key}{nearest(key, keys)}; --help lists all"
    return message


def allowed_types(expected: str) -> str:
    """Return jsonargparse's names of types in plain words."""
    words = {
        r"<class '(\w+)'>": r"\1",
        r"typing\.Literal\[(.*?)\]": r"one of \1",
        r"<class 'NoneType'>": "null",
        "NoneType": "null",
    }
    text = " ".join(expected.split()).removeprefix("Expected a ").rstrip(". ")
    for pattern, word in words.items():
        text = re.sub(pattern, word, text)
    return text.split(". ")[0]


def nearest(key: str, keys: Sequence[str] = KEYS) -> str:
    """Return a clause of a message that names the settings most similar to a wrong key.

    Args:
        key: the wrong key.
        keys: all known keys.

    Returns:
        " (did you mean ...?)" with at most three keys; empty if none is similar.
    """
    close = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    # the right key in the wrong section, or without one
    close += [known for known in keys if known.split(".")[-1] == key.split(".")[-1] and known not in close]
    # a key made of the initials of a known key's words, such as lr for learning_rate
    letters = key.split(".")[-1].lower()
    initials = [
        k for k in keys if "".join(word[0] for word in k.split(".")[-1].split("_")) == letters and k not in close
    ]
    found = [*initials, *close][:3]
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the keys `section.key` whose values differ between two settings given as dicts."""
    flat_one, flat_other = flatten(one), flatten(other)
    return [key for key in {**flat_one, **flat_other} if flat_one.get(key) != flat_other.get(key)]


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert {"section": {"key": value}} to {"section.key": value}."""
    return {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}


def cache_of(config: Config) -> storage.Cache:
    """Return the cache for remote shards that the config describes."""
    return storage.Cache(Path(config.data.cache_dir), int(config.data.cache_gb * 1e9))


def listen_to_sigterm() -> None:
    """Convert SIGTERM to SystemExit, so that cleanup runs: a last checkpoint, and an ended MLflow run.

    In a thread other than the main one, as in a notebook, the signal's handler is not changed.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Convert SIGTERM to SystemExit while the block runs; afterwards the earlier handler is restored."""
    before = signal.getsignal(signal.SIGTERM)
    listen_to_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def absolute(path: str, key: str) -> Path:
    """Return an absolute path.

    Args:
        path: a path on a file system.
        key: name of the setting, for error messages.

    Raises:
        SystemExit: status 2 if the path is a URL, or is relative to a job's folder on a cluster, which Ray will remove.
    """
    if storage.is_remote(path):
        stop(
            f"{key} is {path}: a job keeps its lock, its record and its tracking database next to the checkpoints, which needs "
            "a file system; give a path that every machine sees (deepskip.trainer.train alone takes URLs)"
        )
    found = storage.local(path)
    if not found.is_absolute() and "runtime_resources" in Path.cwd().parts:
        stop(f"{key} is {path}, relative to a copy of your folder on the cluster; give a path that every machine sees")
    return found.absolute()
