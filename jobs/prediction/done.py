"""Which images are done: a note beside the outputs, written before they get their names, that says what they must be.

So an image all of whose outputs have their names is done, wherever the program was killed, and any other is not.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from deepskip.data_shards import storage
from deepskip.jobs.prediction.features import Features
from deepskip.jobs.prediction.inputs import Item
from deepskip.jobs.prediction.writers import PART, Sink, remove

FOLDER = "done"


def note_path(out: Path, item: Item) -> Path:
    """Names an image's note."""
    return out / FOLDER / f"{item.name}.json"


def is_done(out: Path, item: Item, made_by: str) -> bool:
    """Says whether all outputs of an image are there, made of this image by this model with these settings."""
    try:
        note = json.loads(note_path(out, item).read_text())
        return (
            note["made_by"] == made_by
            and note["image"] == item.stamp
            and all(stamp(out / name) == known for name, known in note["outputs"].items())
        )
    # no note, half a note, outputs that are gone
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def place(out: Path, item: Item, made_by: str, sinks: Sequence[Sink | Features]) -> None:
    """Gives finished outputs their names."""
    # size and time of change stay when a file is renamed
    outputs = {sink.path.relative_to(out).as_posix(): stamp(sink.temporary) for sink in sinks}
    note = {"made_by": made_by, "image": item.stamp, "outputs": outputs}
    storage.write_bytes(note_path(out, item), json.dumps(note).encode())
    for sink in sinks:
        sink.place()


def stamp(path: Path) -> list[int]:
    """Gives the size and time of change of a file, or of the description in a Zarr array's folder."""
    status = (path / "zarr.json" if path.is_dir() else path).stat()
    return [status.st_size, status.st_mtime_ns]


def remove_leftovers(out: Path) -> None:
    """Removes what killed runs left half written; nobody else may be writing there."""
    # all are listed first: what is in a folder that goes is not looked for
    for part in list(out.rglob(f".*{PART}")):
        remove(part)
