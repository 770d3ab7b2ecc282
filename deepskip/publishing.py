"""Publish the best model of a training: a file that is named by its sha256, and a pointer file that names it.

The model is complete before the pointer is replaced, so a reader finds the old model or the new one, each whole. A reader
checks the bytes against their name.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from deepskip import weight_files
from deepskip.checkpoint import BEST, FOLDER, CheckpointError, DataState, ModelState, read, sound
from deepskip.config import Config
from deepskip.data_shards import storage
from deepskip.data_shards.storage import Location

POINTER = "published.json"
FORMAT = "deepskip-published"
VERSION = 1
# Models before the present one that are kept, since a server may be loading one.
KEPT = 2
# A pointer is a few hundred bytes.
MAX_POINTER = 1_000_000


class BrokenPublication(ValueError):
    """A pointer or the model that it names is damaged or incomplete; the message says which and why."""


class NotWhole(BrokenPublication):
    """A model's file is missing or has other bytes than its name says; on a network file system it may be whole later."""


@dataclass(frozen=True)
class Pointer:
    """The contents of a pointer file.

    Attributes:
        sha256: sha256 of the model's file, which is part of its name, as hexadecimal digits.
        iou: its IoU on the validation split; None if there was no foreground, which counts as best.
        step: step of the training after which it was validated.
        run: name of the run.
        earlier: sha256 of the models before it that are kept, the newest first.
    """

    sha256: str
    iou: float | None
    step: int
    run: str | None
    earlier: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Return the name of the model's file."""
        return name_of(self.sha256)


@dataclass(frozen=True)
class Publisher:
    """Publishes models that are better than the published one.

    Attributes:
        path: folder or URL of the pointer and the models.
        min_gain: IoU by which a model must be better.
        warn: called with a message if a model could not be published.
    """

    path: Location
    min_gain: float
    warn: Callable[[str], None] = lambda text: None

    def publish(self, state: Mapping[str, Any]) -> Pointer | None:
        """Publish a model if its best validation is better than that of the published one.

        Args:
            state: state of the training, `checkpoint.State`, whose "best" is of these weights. Tensors are of any shape (*,).

        Returns:
            The new pointer, or None if the model is not better by `min_gain`.

        Raises:
            OSError: if it cannot be written; the old model stays published.
        """
        best = state["best"]
        if best is None:
            return None
        try:
            before = read_pointer(self.path)
        # A damaged pointer is replaced.
        except BrokenPublication:
            before = None
        if before is not None and not is_better(best["iou"], before.iou, self.min_gain):
            return None
        data = weight_files.pack(state)
        sha256 = hashlib.sha256(data).hexdigest()
        known = () if before is None else (before.sha256, *before.earlier)
        earlier = tuple(each for each in known if each != sha256)
        iou = None if math.isnan(best["iou"]) else float(best["iou"])
        pointer = Pointer(sha256, iou, int(best["step"]), state["config"]["run"].get("name"), earlier[:KEPT])
        storage.write_bytes(storage.join(self.path, pointer.file), data)
        text = json.dumps({"format": FORMAT, "version": VERSION} | asdict(pointer))
        storage.write_bytes(storage.join(self.path, POINTER), text.encode())
        for old in earlier[KEPT:]:
            storage.remove(storage.join(self.path, name_of(old)))
        return pointer

    def publish_best(self, run: Location) -> Pointer | None:
        """Publish a run's best checkpoint if it is better: its training may have died before it was published.

        Raises:
            OSError: if it cannot be written.
        """
        try:
            return self.publish(read(storage.join(run, FOLDER, BEST)))
        except (FileNotFoundError, CheckpointError):
            return None


def publisher(config: Config, rank: int, warn: Callable[[str], None]) -> Publisher | None:
    """Return the publisher of a training, or None if `publish.path` is not set or another rank publishes.

    Args:
        config: settings of the training.
        rank: rank of this process.
        warn: called with a message if a model could not be published.
    """
    path = config.publish.path
    return None if path is None or rank else Publisher(storage.locate(path), config.publish.min_gain, warn)


def name_of(sha256: str) -> str:
    """Return the name of the file of a model."""
    return f"model-{sha256}{weight_files.SUFFIX}"


def is_better(iou: float, before: float | None, min_gain: float) -> bool:
    """Return whether an IoU is better than that of the published model; nan, without any foreground, is the best.

    Args:
        iou: IoU of the new model.
        before: IoU of the published one; None is nan.
        min_gain: least difference.
    """
    if before is None:
        return False
    return math.isnan(iou) or (iou > before and iou - before >= min_gain)


def read_pointer(path: Location) -> Pointer | None:
    """Read the pointer in a folder, or return None if there is none.

    Raises:
        BrokenPublication: if it is damaged.
        OSError: if it cannot be read.
    """
    location = storage.join(path, POINTER)
    try:
        data = storage.read_bytes(location)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except storage.StorageError as error:
        # A file that HTTP does not have.
        if getattr(error.__cause__, "status", None) in (404, 410):
            return None
        raise
    try:
        told = json.loads(data) if len(data) <= MAX_POINTER else None
        if not isinstance(told, dict) or told.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        if (version := told.pop("version", None)) != VERSION:
            raise ValueError(f"it has version {version!r}; this reads {VERSION}")
        pointer = Pointer(
            is_digest(told["sha256"]),
            told["iou"] if told["iou"] is None else float(told["iou"]),
            int(told["step"]),
            told["run"],
            tuple(is_digest(each) for each in told["earlier"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenPublication(f"{location} is damaged: {type(error).__name__}: {error}") from error
    return pointer


def is_digest(value: Any) -> str:
    """Return a value that is 64 hexadecimal digits.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"{str(value)[:80]!r} is not a sha256")
    return value


def load_like(path: Location, sha256: str, data: DataState) -> ModelState:
    """Load a published model that takes the place of another one.

    Args:
        path: folder or URL of the models.
        sha256: sha256 of its file.
        data: data of the other model.

    Raises:
        BrokenPublication: as `load`, and if it takes other images or has other classes.
        OSError: if it cannot be read.
    """
    state = load(path, sha256)
    for name, words in (("in_channels", "bands"), ("num_classes", "classes"), ("preparation", "preparation")):
        new, old = state["data"].get(name), data.get(name)
        if new != old:
            raise BrokenPublication(f"model {sha256} has {words} {new}, but the served one {old}")
    names, before = state["data"].get("classes"), data.get("classes")
    if names and before and names != before:
        raise BrokenPublication(
            f"model {sha256} has classes {', '.join(names)}, but the served one {', '.join(before)}"
        )
    return state


def load(path: Location, sha256: str) -> ModelState:
    """Load a published model.

    Args:
        path: folder or URL of the models.
        sha256: sha256 of its file.

    Raises:
        NotWhole: if the file is missing, or its bytes are not those of its name.
        BrokenPublication: if no model can be built from it.
        OSError: if it cannot be read.
    """
    location = storage.join(path, name_of(sha256))
    try:
        data = storage.read_bytes(location)
    except FileNotFoundError as error:
        raise NotWhole(f"{location}, which {POINTER} names, is missing") from error
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise NotWhole(f"{location} is damaged or incomplete: {len(data)} bytes with sha256 {found}")
    try:
        return sound(cast(ModelState, weight_files.unpack(data)), location)
    except (weight_files.BrokenWeights, weight_files.TooNew) as error:
        raise BrokenPublication(f"{location} {error}") from error
    except (CheckpointError, ImportError) as error:
        raise BrokenPublication(str(error)) from error
