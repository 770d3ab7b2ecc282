"""The command `deepskip`, and `python -m deepskip`: one for everything. No --help of it loads torch."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from deepskip.cluster.settings import past_proxies
from deepskip.data_shards import trouble

# command: (where its settings are, what it does)
TOPICS: dict[str, dict[str, tuple[str, str]]] = {
    "data": {
        "pack": ("data", "make WebDataset shards of images and masks"),
        "index": ("data", "make the index of shards that others wrote"),
        "verify": ("data", "compare shards with their index and decode every sample"),
        "info": ("data", "counts, sizes, bands, class balance, object sizes"),
        "preview": ("data", "a picture of some samples with their masks outlined"),
        "order": ("data", "which samples a rank takes in which step"),
    },
    "models": {
        "train": ("", "train, on a Ray of its own or on the cluster at RAY_ADDRESS; with --local in this process"),
        "evaluate": ("jobs.options:EvaluateConfig", "measure a trained model: metrics, by object size, worst samples"),
        "predict": ("jobs.options:PredictConfig", "segment images of any number and size"),
        "export": ("jobs.options:ExportConfig", "write ONNX, torch.export and a model card"),
        "serve": ("jobs.serving.settings:ServeConfig", "answer images over HTTP"),
        "compare": ("jobs.comparison.grid:Grid", "train and test networks beside one another"),
    },
    "machines": {
        "cluster": ("cluster", "a Ray head on this machine: up, down, status"),
        "submit": ("submit", "hand any of train, evaluate, predict, export, serve, compare to `ray job submit`"),
    },
}
COMMANDS = {name: found for commands in TOPICS.values() for name, found in commands.items()}
# what commands of deepskip.data_shards are called here
DATA_NAMES = {"order": "plan"}
HELP = ("-h", "--help")
# by the extra that brings them
EXTRAS = {
    "train": ("braceexpand", "kornia", "mlflow", "ray", "skimage", "torchmetrics", "webdataset"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "geo": ("rasterio", "zarr"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; its exit status is that of this."""
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
            f"error: deepskip {command} needs {package}, which is not installed: pip install 'deepskip[{extra}]' "
            f"(in a checkout: pip install '.[{extra}]')",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def run(command: str, rest: list[str]) -> None:
    """Run a command with its words."""
    where, _ = COMMANDS[command]
    if where in ("data", "cluster", "submit"):
        module = {"data": "data_shards.command_line", "cluster": "cluster.__main__", "submit": "jobs.submit"}[where]
        words = [DATA_NAMES.get(command, command), *rest] if where == "data" else rest
        importlib.import_module(f"deepskip.{module}").main(words)
    elif any(word in HELP for word in rest):
        show_help(command, where)
    elif command == "train":
        train(rest)
    else:
        importlib.import_module(f"deepskip.jobs.{command}").main(rest)


def overview() -> str:
    """Return what there is, by topic."""
    lines = ["usage: deepskip COMMAND ...      deepskip COMMAND --help explains every setting", ""]
    for topic, commands in TOPICS.items():
        lines.append(f"{topic}:")
        lines += [f"  {name:<10}{about}" for name, (_, about) in commands.items()]
    lines += ["", "deepskip pack folder --images DIR --masks DIR --out data/mine, then deepskip train data/mine"]
    return "\n".join(lines)


def refuse(command: str) -> NoReturn:
    """End the program for a command that there is not."""
    import difflib

    close = difflib.get_close_matches(command, COMMANDS, n=2)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    print(f"error: there is no command {command!r}{hint}; deepskip --help lists all", file=sys.stderr)
    raise SystemExit(2)


def show_help(command: str, where: str) -> None:
    """Print the settings of a command."""
    from deepskip.jobs import settings

    if command == "train":
        settings.build_parser("train").print_help()
        return
    module, _, kind = where.partition(":")
    settings.settings_parser(command, getattr(importlib.import_module(f"deepskip.{module}"), kind)).print_help()


def train(words: list[str]) -> None:
    """Train: `deepskip train DATA ...` is `--data.path DATA`; a job on Ray, or with --local, or torchrun, in this process."""
    if words and not words[0].startswith("-"):
        words = ["--data.path", *words]
    if "--local" in words or "TORCHELASTIC_RUN_ID" in os.environ:
        from deepskip.jobs import train

        train.main(words)
        return
    from deepskip.jobs import submit

    raise SystemExit(submit.submit("deepskip.jobs.train", words))
