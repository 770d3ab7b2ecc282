"""Trained weights as safetensors files, which hold no code, and the models that are installed with DeepSkip.

The file holds one tensor for each weight and buffer, the moving averages if the training kept them, so that any reader of
safetensors can load it. The metadata "deepskip" says in JSON what network they belong to and how images are prepared.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

SUFFIX = ".safetensors"
FORMAT = "deepskip-weights"
VERSION = 1
INSTALLED = Path(__file__).parent / "weights"
# Sections of the settings that are kept whole; of "run" only name and seed, since the rest names places of one machine.
SECTIONS = ("model", "data", "loss", "augment", "optim")
# Settings of "data" that name places of one machine.
PLACES = ("cache_dir",)


class BrokenWeights(ValueError):
    """A file is incomplete, changed, or not written by DeepSkip; the message does not name it."""


class TooNew(ValueError):
    """A later DeepSkip wrote the file; the message does not name it."""


def installed() -> dict[str, Path]:
    """Return the files of the models that are installed with DeepSkip, by the name that `--model` takes."""
    return {path.stem: path for path in sorted(INSTALLED.glob(f"*{SUFFIX}"))}


def digest_of(weights: Mapping[str, Tensor], begin: bytes = b"") -> str:
    """Return the SHA-256 of weights by their names, types, shapes and values, in hexadecimal.

    Args:
        weights: the weights by name, each of any shape (*,).
        begin: what is digested before them.
    """
    digest = hashlib.sha256(begin)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pack(state: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file with a model's weights.

    Args:
        state: state of a checkpoint, as `checkpoint.ModelState`. Tensors are of any shape (*,).
    """
    config, best = state["config"], state.get("best")
    settings = {name: config[name] for name in SECTIONS if name in config}
    settings["data"] = {name: value for name, value in config["data"].items() if name not in PLACES}
    if "path" in settings["data"]:
        settings["data"]["path"] = without_folders(settings["data"]["path"])
    settings["run"] = {name: config["run"].get(name) for name in ("name", "seed")}
    # The format has no tensors that share memory, as tied weights do.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in (state["ema"] or state["model"]).items()
    }
    told = {
        "format": FORMAT,
        "version": VERSION,
        "config": settings,
        "data": state["data"],
        "step": state.get("step"),
        # JSON has no nan.
        "best": best and {name: value if math.isfinite(value) else None for name, value in best.items()},
    }
    header, body = split(safetensors.save(tensors))
    text = json.dumps(told, allow_nan=False, sort_keys=True)
    metadata = {"format": "pt", "deepskip": text, "sha256": digest(header, body, text)}
    # The package orders metadata at random; the same model is the same file.
    head = json.dumps({"__metadata__": metadata} | header, sort_keys=True).encode()
    # The tensors begin at a multiple of eight.
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + body


def without_folders(path: str) -> str:
    """Return a path without the folders above the current one, or its last part if it is elsewhere; a URL stays as it is."""
    if "://" in path or not Path(path).is_absolute():
        return path
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else Path(path).name


def unpack(data: bytes) -> dict[str, Any]:
    """Return the state of a model from a file's bytes, on the CPU. Whether it can be built is not checked.

    Args:
        data: the whole file.

    Returns:
        A `checkpoint.ModelState`; "model" holds the weights, and "ema" is None.

    Raises:
        BrokenWeights: if the bytes are incomplete, changed or not written by DeepSkip.
        TooNew: if a later DeepSkip wrote them.
    """
    # The file may be made to do harm: whatever is wrong with it has one error.
    try:
        model = safetensors.load(data)
        header, body = split(data)
        metadata = header.pop("__metadata__", {})
        text = metadata.get("deepskip", "")
        told = json.loads(text) if text else None
    except Exception as error:
        raise BrokenWeights(f"is no complete safetensors file: {error}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT or not isinstance(told.get("version"), int):
        raise BrokenWeights("was not written by DeepSkip")
    if told["version"] > VERSION:
        raise TooNew(f"has version {told['version']}; this DeepSkip reads up to {VERSION}. Install a later one.")
    if metadata.get("sha256") != digest(header, body, text):
        raise BrokenWeights("is not complete: its bytes changed since it was written (sha256 differs)")
    step, best = told.get("step"), told.get("best")
    return {
        "config": told.get("config"),
        "data": told.get("data"),
        "model": model,
        "ema": None,
        "step": step if isinstance(step, int) else 0,
        "best": {name: math.nan if value is None else value for name, value in best.items()}
        if isinstance(best, dict)
        else None,
        "stale": 0,
        "seconds": 0.0,
        "mlflow_run_id": None,
    }


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and the bytes of its tensors.

    Args:
        data: the whole file: 8 bytes of the header's length (little endian), the header in JSON, the tensors.
    """
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def digest(header: dict[str, Any], body: bytes, text: str) -> str:
    """Return the SHA-256 of a file's tensors, of their names, types and places, and of what DeepSkip tells of them.

    Args:
        header: the header without "__metadata__".
        body: the bytes of the tensors.
        text: the metadata "deepskip".
    """
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    found.update(text.encode())
    found.update(body)
    return found.hexdigest()
