"""What was tried against what strangers can send, as the table of docs/security.md: `python -m tests.attacks.table`."""

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
    """Gives (kind, number tried, what happens)."""
    with tempfile.TemporaryDirectory() as folder:
        pack_coins(Path(folder), {"train": 6, "val": 2})
        index = indexes.Folder(Path(folder) / "train")
        fields, lies = len(list(indexes.changed(index.raw))), len(list(index.lying()))
    named = "an error that names the file"
    return [
        ("images that claim to be small, or take long", len(images.CASES), f"{named}, or the image that it says to be"),
        ("damaged images, of png, jpg, tif, npy, npz, bmp and gif each", DAMAGES, f"{named}, or an image"),
        ("Zarr chunks that unpack to more than their shape", len(BOMBS), f"{named}, read no further than a chunk"),
        ("Zarr codecs that run code, or are not known", len(STRANGE), "refused by name, before anything is read"),
        (
            "tar files that claim too much, or have no end",
            len(tars.CASES),
            "an error with shard and byte, or a sample left out",
        ),
        ("damaged tar files", DAMAGES, "an error with shard and byte, or samples"),
        ("index.json of wrong fields", fields, "an error that names the field and says what to do"),
        ("samples files whose columns lie", 2 * lies, "an error that says what to do; no other memory is read"),
        ("damaged samples files", DAMAGES, "an error that says what to do, or samples"),
        ("settings that would run code, or unfold", 3 * len(TRAININGS), "refused in one line; nothing is imported"),
        (
            "checkpoints that say what cannot be",
            len(FORGED),
            "an error that names the file; nothing is built, no pickle run",
        ),
        ("damaged checkpoints with a right checksum", DAMAGES, "an error that names the file, or a model"),
        ("files of a run full of garbage", 4 * (len(GARBAGE) + 1), "one error with the cure, and the cure cures"),
        ("requests that are wrong", len(BAD), "a status and a reason in JSON; nothing stays"),
        ("bytes that are no HTTP", len(NO_HTTP), "400 and a reason in JSON, without a version"),
        ("requests of other sites' pages, and of its own", 2 * len(SITES), "403, and 200"),
    ]


def table() -> str:
    """Gives the table as Markdown."""
    lines = ["| what | tried | what happens |", "| --- | ---: | --- |"]
    return "\n".join([*lines, *(f"| {kind} | {number:,} | {happens} |" for kind, number, happens in rows())])


def main() -> None:
    """Writes the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
