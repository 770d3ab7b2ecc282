"""Check an untrusted checkpoint before its parts are unpacked and before anything is built from them."""

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deepskip.config import ModelConfig, faults_of

# Limits of a file's zip: its parts, one for each tensor, and the bytes of the pickle that describes them.
MAX_PARTS = 100_000
MAX_DESCRIPTION = 2**26
# Characters that control terminals.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
NORMALIZE = ("image", "dataset", "robust", "none")


class Unsound(ValueError):
    """A checkpoint holds impossible values; the message says which."""


def check_zip(stream: BinaryIO, size: int) -> None:
    """Check that a checkpoint's zip does not unpack to more than its `size` bytes: torch.save compresses nothing.

    Args:
        stream: the zip's bytes, seekable.
        size: size of the file, in bytes.

    Raises:
        Unsound: if it is not a zip, has too many parts, is compressed, or its description is too large.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
    # The zipfile module raises errors of many types for files that are not zips.
    except Exception as error:
        raise Unsound(f"it is not a zip: {error}") from error
    if len(parts) > MAX_PARTS:
        raise Unsound(f"it has {len(parts)} parts; at most {MAX_PARTS} are read")
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed or sum(part.file_size for part in parts) > size:
        raise Unsound(f"its parts unpack to more than its {size} bytes")
    large = [part.file_size for part in parts if part.filename.endswith(".pkl") and part.file_size > MAX_DESCRIPTION]
    if large:
        raise Unsound(f"its pickle has {large[0]} bytes; at most {MAX_DESCRIPTION} are read")


def check_model(state: Mapping[str, Any]) -> None:
    """Check that a model can be built from a state, without building it.

    Checked are the state's parts, the network's settings, the shapes of its weights, and that all numbers are finite.

    Args:
        state: state of a checkpoint, with "config", "data", "model" and perhaps "ema".

    Raises:
        Unsound: if no model can be built from the state.
        ImportError: if a package that the network needs is missing.
    """
    for part in ("config", "data", "model"):
        if not isinstance(state.get(part), Mapping):
            raise Unsound(f"it has no {part}")
    config, data = state["config"], state["data"]
    for section in ("model", "data", "run"):
        if not isinstance(config.get(section), Mapping):
            raise Unsound(f"its settings have no {section}")
    if config["data"].get("normalize") not in NORMALIZE:
        raise Unsound(
            f"data.normalize is {config['data'].get('normalize')!r:.100}; it must be one of {', '.join(NORMALIZE)}"
        )
    check_settings(config["model"])
    check_data(data)
    check_weights(state, expected_shapes(config["model"], data["in_channels"], data["num_classes"]))


def check_settings(model: Mapping[str, Any]) -> None:
    """Check the types and bounds of the network's settings.

    Args:
        model: model section of the config.

    Raises:
        Unsound: if a setting has another type or is out of bounds.
    """
    known = {each.name: model[each.name] for each in fields(ModelConfig) if each.name in model}
    try:
        faults = faults_of(ModelConfig(**known))
    except TypeError as error:
        raise Unsound(f"its model settings have wrong types: {error}") from error
    if not isinstance(known.get("network", ""), str) or not isinstance(known.get("options") or {}, Mapping):
        faults.append(f"model.network is {known.get('network')!r:.100}")
    if faults:
        raise Unsound("; ".join(faults))


def check_data(data: Mapping[str, Any]) -> None:
    """Check what a checkpoint says of its training data: bands, classes, statistics and preparation.

    Args:
        data: fields of `training_step.DataInfo`.

    Raises:
        Unsound: if a value is impossible.
    """
    for name, high in (("in_channels", 2**16), ("num_classes", 255)):
        if not is_whole(data.get(name), 1, high):
            raise Unsound(f"{name} is {data.get(name)!r:.100}; it must be 1 to {high}")
    for name in ("mean", "std"):
        values = data.get(name)
        if not isinstance(values, list | tuple) or len(values) != data["in_channels"]:
            raise Unsound(f"{name} must hold one number for each of its {data['in_channels']} bands")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise Unsound(f"{name} holds a value that is not a finite number")
    # One band may be constant, but not all of them.
    if min(data["std"]) < 0 or max(data["std"]) == 0:
        raise Unsound("std is negative, or 0 in every band")
    names = data.get("classes") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and not CONTROL.search(name) for name in names):
        raise Unsound("its classes are not a list of names without control characters")
    if names and len(names) != data["num_classes"] - 1:
        raise Unsound(f"it names {len(names)} classes besides background, and has {data['num_classes'] - 1}")
    prepared = data.get("preparation") or {}
    if not isinstance(prepared, Mapping):
        raise Unsound("its preparation is not a mapping")
    for name, high in (("bands", 2**16), ("longest_side", 2**31)):
        if prepared.get(name) is not None and not is_whole(prepared[name], 1, high):
            raise Unsound(f"preparation.{name} is {prepared[name]!r:.100}; it must be 1 to {high}, or null")
    if "chosen" in prepared or "of" in prepared:
        check_chosen(prepared, data["in_channels"])
    told = prepared.get("nodata")
    if told not in (None, "nan") and (isinstance(told, bool) or not isinstance(told, int | float)):
        raise Unsound(f"preparation.nodata is {told!r:.100}; it must be a number, nan or null")


def check_chosen(prepared: Mapping[str, Any], in_channels: int) -> None:
    """Check which bands of an image the network sees.

    Args:
        prepared: preparation of the images, with "chosen" and "of".
        in_channels: bands of the network's input.

    Raises:
        Unsound: if they are not that number of different bands of an image.
    """
    chosen, of = prepared.get("chosen"), prepared.get("of")
    if not isinstance(of, int) or not is_whole(of, 1, 2**16):
        raise Unsound(f"preparation.of is {of!r:.100}; it must be 1 to {2**16}")
    if not isinstance(chosen, list) or not all(is_whole(band, 0, of - 1) for band in chosen):
        raise Unsound(f"preparation.chosen is {chosen!r:.100}; it must be a list of bands, 0 to {of - 1}")
    if len(chosen) != in_channels or len(set(chosen)) != in_channels:
        raise Unsound(f"preparation.chosen must name {in_channels} different bands")


def expected_shapes(model: Mapping[str, Any], in_channels: int, num_classes: int) -> dict[str, torch.Size]:
    """Return the shape of each weight of the network that the settings describe, without building it.

    Args:
        model: model section of the config.
        in_channels: bands of the input.
        num_classes: 1 for binary, else exclusive classes.

    Returns:
        Shapes by the names of the network's state.

    Raises:
        Unsound: if the network cannot be built.
        ImportError: if a package that the network needs is missing.
    """
    from deepskip import networks

    try:
        return {
            name: tensor.shape
            for name, tensor in networks.outline(model, in_channels, num_classes).state_dict().items()
        }
    except (ImportError, MemoryError, SystemError):
        raise
    # Network libraries raise errors of many types for settings that they do not know.
    except Exception as error:
        raise Unsound(f"its network cannot be built: {error}") from error


def check_weights(state: Mapping[str, Any], expected: Mapping[str, torch.Size]) -> None:
    """Check that the weights are complete, finite and those of the network.

    Args:
        state: state of a checkpoint, whose "model" and "ema" (may be None) map names to tensors of any shape (*,).
        expected: shapes by name.

    Raises:
        Unsound: if a weight is missing, unexpected, of another shape, larger than its bytes, or not finite.
    """
    for part in ("model", "ema"):
        weights = state.get(part)
        if part == "ema" and weights is None:
            continue
        if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise Unsound(f"its {part} holds no weights")
        if odd := sorted(map(str, weights.keys() ^ expected.keys())):
            raise Unsound(f"its {part} has missing or unexpected weights: {', '.join(odd[:5])} ({len(odd)} in all)")
        for name, tensor in weights.items():
            if tensor.shape != expected[name]:
                raise Unsound(f"{part}.{name} is {tuple(tensor.shape)}; its network has {tuple(expected[name])}")
            # With strides of 0 a single stored number can claim to be many.
            if (
                tensor.layout != torch.strided
                or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
            ):
                raise Unsound(f"{part}.{name} has more values than bytes")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise Unsound(f"{part}.{name} holds values that are nan or infinite")


def is_whole(value: Any, low: int, high: int) -> bool:
    """Return whether a value is an integer within bounds, both included; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
