"""Write the table of attacks into docs/security.md: `python -m tests.attacks.table`."""

import sys
import tempfile
from pathlib import Path

from deepskip.data_shards.commands import pack_coins
from tests.attacks import images, indexes, tars
from tests.attacks.test_checkpoints import FORGED
from tests.attacks.test_configs import TRAININGS
from tests.attacks.test_data import DAMAGES
from tests.attacks.test_run_files import GARBAGE
from tests.attacks.test_zarr import BOMBS, STRANGE
from tests.jobs.bad_requests import BAD
from tests.jobs.test_serve_front import NO_HTTP, SITES

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- made by tests.attacks.table -->", "<!-- end -->"


def rows() -> list[tuple[str, int, str]]:
    """Return (kind, number tried, what happens) of each attack."""
    with tempfile.TemporaryDirectory() as folder:
        pack_coins(Path(folder), {"train": 6, "val": 2})
        index = indexes.Folder(Path(folder) / "train")
        fields, lies = len(list(indexes.changed(index.raw))), len(list(index.lying()))
    named = "error with file name"
    return [
        ("images with false sizes or slow to decode", len(images.CASES), f"{named}, or image as declared"),
        ("damaged png, jpg, tif, npy, npz, bmp and gif, each", DAMAGES, f"{named}, or an image"),
        ("Zarr chunks larger than their shape", len(BOMBS), f"{named}, after one chunk at most"),
        ("Zarr codecs that run code or are unknown", len(STRANGE), "refused by name before data is read"),
        (
            "tar files with false sizes or without an end",
            len(tars.CASES),
            "error with shard and byte, or skipped sample",
        ),
        ("damaged tar files", DAMAGES, "error with shard and byte, or samples"),
        ("index.json with wrong fields", fields, "error with field and remedy"),
        ("sample files with false columns", 2 * lies, "error with remedy; no other memory is read"),
        ("damaged sample files", DAMAGES, "error with remedy, or samples"),
        (
            "settings that run code or expand without limit",
            3 * len(TRAININGS),
            "refused in one line; nothing is imported",
        ),
        (
            "checkpoints with impossible contents",
            len(FORGED),
            "error with file name; nothing is built, no pickle runs",
        ),
        (
            "damaged checkpoints with a valid checksum; damaged safetensors",
            2 * DAMAGES,
            "error with file name, or a model",
        ),
        ("run files full of garbage", 4 * (len(GARBAGE) + 1), "one error with remedy, which works"),
        ("wrong requests", len(BAD), "status and reason in JSON; nothing is kept"),
        ("bytes that are not HTTP", len(NO_HTTP), "400 and reason in JSON, without version"),
        ("requests from pages of other sites; from its own", 2 * len(SITES), "403; 200"),
    ]


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| what | tried | what happens |", "| --- | ---: | --- |"]
    return "\n".join([*lines, *(f"| {kind} | {number:,} | {happens} |" for kind, number, happens in rows())])


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
