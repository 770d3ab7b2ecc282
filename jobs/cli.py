"""The command line `deepskip` and `python -m deepskip`: one entry point for all commands. No --help imports torch."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from deepskip.cluster.settings import past_proxies
from deepskip.data_shards import trouble

# each command has a place where its settings are, and a line for the help
TOPICS: dict[str, dict[str, tuple[str, str]]] = {
    "data": {
        "pack": ("data", "make WebDataset shards of images and masks"),
        "index": ("data", "write the index of existing shards"),
        "append": ("data", "append samples to a data set while others read it, as its next generation"),
        "ingest": ("data", "append what arrives in a folder, an object store or a Kafka topic, each item once"),
        "compact": ("data", "join the generations of a data set to a new closed set"),
        "verify": ("data", "compare shards with their index and decode every sample"),
        "info": ("data", "print counts, sizes, bands, class balance and object sizes"),
        "preview": ("data", "draw some samples with their masks outlined"),
        "order": ("data", "print which samples a rank takes in which step"),
    },
    "models": {
        "train": ("", "train with Ray, started here or at RAY_ADDRESS; with --local in this process"),
        "evaluate": ("jobs.options:EvaluateConfig", "measure a trained model: metrics, scores by size, worst samples"),
        "predict": ("jobs.options:PredictConfig", "segment images of any number and size"),
        "export": ("jobs.options:ExportConfig", "write ONNX, torch.export and a model card"),
        "serve": ("jobs.serving.settings:ServeConfig", "serve a trained model over HTTP"),
        "audit": ("jobs.options:AuditConfig", "check that a run on a stream took each sample exactly once"),
        "compare": ("jobs.comparison.grid:Grid", "train, test and compare networks"),
    },
    "machines": {
        "cluster": ("cluster", "start or stop a Ray head on this machine: up, down, status"),
        "submit": ("submit", "run train, evaluate, predict, export, serve or compare as a Ray job"),
    },
}
COMMANDS = {name: found for commands in TOPICS.values() for name, found in commands.items()}
HELP = ("-h", "--help")
# options whose default is an empty text
MAY_BE_EMPTY = ("--mask_suffix",)
# packages by the extra that installs them
EXTRAS = {
    "train": ("braceexpand", "kornia", "mlflow", "ray", "skimage", "webdataset"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "geo": ("rasterio", "zarr"),
    "stream": ("river",),
    "ingest": ("confluent_kafka", "watchdog"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a command that fails raises SystemExit with its exit status.

    Args:
        argv: command-line arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: status 2 if the command is unknown, or if it needs a package of an extra that is not installed.
        ModuleNotFoundError: a package is missing that belongs to no extra.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in HELP:
        print(overview())
        return
    if command == "--version":
        from deepskip import __version__

        print(f"deepskip {__version__}")
        return
    if command not in COMMANDS:
        refuse(command)
    refuse_empty(rest)
    os.environ.update(past_proxies(os.environ))
    try:
        with trouble.told():
            run(command, rest)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        print(
            f"error: deepskip {command} needs {package}, which is not installed: pip install '.[{extra}]' "
            "in the checkout",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def run(command: str, rest: list[str]) -> None:
    """Run a known command with its arguments.

    Args:
        command: a key of COMMANDS.
        rest: the arguments after the command.
    """
    where, _ = COMMANDS[command]
    if where in ("data", "cluster", "submit"):
        module = {"data": "data_shards.command_line", "cluster": "cluster.__main__", "submit": "jobs.submit"}[where]
        words = [command, *rest] if where == "data" else rest
        importlib.import_module(f"deepskip.{module}").main(words)
    elif any(word in HELP for word in rest):
        show_help(command, where)
    elif command == "train":
        train(rest)
    else:
        importlib.import_module(f"deepskip.jobs.{command}").main(rest)


def overview() -> str:
    """Return the help text that lists all commands by topic."""
    lines = ["usage: deepskip COMMAND ...      deepskip COMMAND --help explains every setting", ""]
    for topic, commands in TOPICS.items():
        lines.append(f"{topic}:")
        lines += [f"  {name:<10}{about}" for name, (_, about) in commands.items()]
    lines += ["", "deepskip pack folder --images DIR --masks DIR --out data/mine, then deepskip train data/mine"]
    return "\n".join(lines)


def refuse(command: str) -> NoReturn:
    """Print that a command is unknown, with the closest known commands, and exit.

    Args:
        command: the unknown command.

    Raises:
        SystemExit: always, with status 2.
    """
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=2)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    print(f"error: unknown command {command!r}{hint}; deepskip --help lists all", file=sys.stderr)
    raise SystemExit(2)


def refuse_empty(words: Sequence[str]) -> None:
    """End the program if an argument is an empty text, which as a path would be the current folder.

    Args:
        words: arguments of a command.

    Raises:
        SystemExit: status 2 if one is.
    """
    for before, word in zip(["", *words], words, strict=False):
        option, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if not value and ("=" in word or not word) and option not in MAY_BE_EMPTY:
            named = option if option.startswith("--") else "an argument"
            print(f"error: {named} is empty; give it a value, or leave it out", file=sys.stderr)
            raise SystemExit(2)


def show_help(command: str, where: str) -> None:
    """Print the settings of a command.

    Args:
        command: a key of COMMANDS.
        where: module and class of its settings, as "module:Class"; not used for train.
    """
    from deepskip.jobs import settings

    if command == "train":
        settings.build_parser("train").print_help()
        return
    module, _, kind = where.partition(":")
    settings.settings_parser(command, getattr(importlib.import_module(f"deepskip.{module}"), kind)).print_help()


def train(words: list[str]) -> None:
    """Train on Ray, or in this process with --local or under torchrun.

    Args:
        words: command-line arguments.

    Raises:
        SystemExit: with the exit status of the job, if the training ran on Ray.
    """
    if "--local" in words or "TORCHELASTIC_RUN_ID" in os.environ:
        from deepskip.jobs import train

        train.main(words)
        return
    from deepskip.jobs import submit

    raise SystemExit(submit.submit("deepskip.jobs.train", words))
