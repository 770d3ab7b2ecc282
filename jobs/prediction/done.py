"""Track finished images with one note per image, written before its outputs get their final names.

The note lists the outputs with their sizes and times. An image is done if all of them exist under their final names. This
holds wherever the program was killed.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from deepskip.data_shards import storage
from deepskip.data_shards.storage import PART
from deepskip.jobs.prediction import features
from deepskip.jobs.prediction.features import COCO_FILE, Features
from deepskip.jobs.prediction.inputs import Item
from deepskip.jobs.prediction.writers import Sink, remove

FOLDER = "done"
FOLDERS = (FOLDER, "masks", "overlays", features.FOLDER, "probabilities")


def note_path(out: Path, item: Item) -> Path:
    """Return the path of an image's note."""
    return out / FOLDER / f"{item.name}.json"


def is_done(out: Path, item: Item, made_by: str) -> bool:
    """Return whether all outputs of an image exist, made from this image by this model with these settings.

    Args:
        out: Folder of all outputs.
        item: The image.
        made_by: Fingerprint of the model and of the settings that decide the outputs.
    """
    try:
        note = json.loads(note_path(out, item).read_text())
        return (
            note["made_by"] == made_by
            and note["image"] == item.stamp
            and all(stamp(out / name) == known for name, known in note["outputs"].items())
        )
    # The note is missing or incomplete, or an output is missing.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def forget(out: Path, item: Item) -> None:
    """Remove what an earlier prediction left of an image, as its note lists it, and the note.

    Args:
        out: Folder of all outputs.
        item: The image.
    """
    path = note_path(out, item)
    try:
        names = [str(name) for name in json.loads(path.read_text())["outputs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in names:
        # A note could name any file.
        if (out / name).resolve().is_relative_to(out.resolve()):
            remove(out / name)
    remove(path)


def place(out: Path, item: Item, made_by: str, sinks: Sequence[Sink | Features]) -> None:
    """Write an image's note, then rename its finished outputs to their final names.

    Args:
        out: Folder of all outputs.
        item: The image.
        made_by: Fingerprint of the model and of the settings that decide the outputs.
        sinks: All outputs of the image, finished.
    """
    # Renaming a file keeps its size and modification time.
    outputs = {sink.path.relative_to(out).as_posix(): stamp(sink.temporary) for sink in sinks}
    note = {"made_by": made_by, "image": item.stamp, "outputs": outputs}
    storage.write_bytes(note_path(out, item), json.dumps(note).encode())
    for sink in sinks:
        sink.place()


def stamp(path: Path) -> list[int]:
    """Return size (bytes) and modification time (ns) of a file, or of the zarr.json in a Zarr array's folder."""
    status = (path / "zarr.json" if path.is_dir() else path).stat()
    return [status.st_size, status.st_mtime_ns]


def remove_leftovers(out: Path) -> None:
    """Remove partial outputs of killed runs; no other process may be writing to the folder."""
    # List them all first: the contents of a removed folder must not be searched. Files of others may end in .part too.
    found = [part for folder in FOLDERS for part in (out / folder).rglob(f".*{PART}")]
    for part in [*found, *out.glob(f".{COCO_FILE}.*{PART}")]:
        if re.fullmatch(rf"\..*\.[0-9a-f]{{8}}{re.escape(PART)}", part.name, re.DOTALL):
            remove(part)


def of_others(out: Path) -> Path | None:
    """Return a file that stands where outputs go in a folder that no prediction wrote to, or None."""
    if (out / FOLDER).is_dir():
        return None
    files = (path for folder in FOLDERS for path in (out / folder).rglob("*"))
    return next((path for path in (out / COCO_FILE, *files) if path.is_file() and not path.name.endswith(PART)), None)
