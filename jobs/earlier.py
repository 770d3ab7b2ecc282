"""What an earlier evaluation or export left in a folder, and whether a new one may replace it."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from deepskip import weight_files
from deepskip.data_shards import storage
from deepskip.jobs.models import Found
from deepskip.jobs.settings import absolute, stop


def is_of(told: Mapping[str, Any], found: Found) -> bool:
    """Return whether a report's or a card's "model" is this one, by its weights; earlier versions recorded only their step.

    Args:
        told: "model" of a report or a card.
        found: the model.
    """
    if "weights" in told:
        return bool(told["weights"] == weight_files.digest_of(found.state["model"]))
    return bool(told.get("step") == found.state["step"])


def may_replace(told: Mapping[str, Any], found: Found) -> bool:
    """Return whether what a model left may be replaced by this one's: it has the same weights, or had the same name.

    A model of the same name is an earlier state of the same run, and the user expects its new report or export in its place.

    Args:
        told: "model" of the earlier report or card.
        found: the model.
    """
    return is_of(told, found) or place_of(str(told.get("name"))) == place_of(found.name)


def place_of(name: str) -> str:
    """Return a path as an absolute one, and any other name as it is."""
    if storage.is_remote(name) or re.match(r"(runs|models):/", name):
        return name.rstrip("/")
    return str(storage.local(name).absolute())


def check_folder(folder: Path) -> None:
    """End the program if a folder for outputs cannot be one, before anything is computed for it.

    Args:
        folder: the folder, which need not exist.

    Raises:
        SystemExit: status 2 if it, or a folder above it, is a file; or if it is relative to a job's folder on a cluster.
    """
    absolute(str(folder), "out")
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                stop(f"out is {folder}, but {place} is a file; choose another folder with --out")
            return


def check_report(path: Path, data: str, found: Found) -> None:
    """End the program if a file is the report on other data or of another model, which a new report would replace.

    Args:
        path: path of the report, which need not exist.
        data: folder or URL of the split that is evaluated.
        found: the model that is evaluated.

    Raises:
        SystemExit: status 2 if it is.
    """
    try:
        earlier = json.loads(path.read_bytes())
        there, model = str(earlier["data"]["path"]), dict(earlier["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    cure = "give --out another folder, or remove it"
    if place_of(data) != place_of(there):
        stop(f"out is {path.parent}, which holds the report on {there}; {cure}")
    if not may_replace(model, found):
        stop(f"out is {path.parent}, which holds the report of another model, {model.get('name')}; {cure}")


def check_export(card: Path, names: Collection[str], written: Collection[str], found: Found) -> None:
    """End the program if a folder holds files that an export would replace or remove, and that are not this model's.

    Args:
        card: path of the export's card, which need not exist.
        names: names of all files that an export may have.
        written: those that the new one will have.
        found: the model that is exported.

    Raises:
        SystemExit: status 2 if it does.
    """
    folder, cure = card.parent, "remove what would be replaced, or choose another folder with --out"
    there = [name for name in names if (folder / name).exists()]
    if not card.exists():
        if there:
            stop(
                f"{folder} holds {', '.join(there)} but no {card.name}, so it is no export, or one that was cut short; {cure}"
            )
        return
    try:
        told = json.loads(card.read_bytes())["model"]
        known = may_replace(told, found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        stop(f"{card} does not say which model was exported there; {cure}")
    if not known:
        stop(f"{folder} holds the export of another model, {told.get('name')}; {cure}")
    if lost := [name for name in there if name not in written]:
        stop(
            f"{folder} holds {', '.join(lost)} of an earlier export, which would not fit the new {card.name}; name all "
            f"formats together, such as --formats '[onnx, pt2]', or {cure}"
        )
