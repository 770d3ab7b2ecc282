"""Other tools read packed coins as docs/readers.md says: its blocks run, and DeepSkip's own reader is the oracle.

`make test-readers` runs this file in an environment of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepskip.data_shards.commands import pack_coins
from deepskip.data_shards.dataset import Shards
from tests.blocks import Block, blocks

pytestmark = pytest.mark.readers
ROOT = Path(__file__).parents[2]
BLOCKS = list(blocks(ROOT / "docs" / "readers.md"))
# Two shards of training samples.
COUNTS = {"train": 260, "val": 3, "test": 2}
# What is added to a block, to see what it read.
DUMP = """
import numpy
numpy.savez("found.npz", **{f"{key}/{kind}": array for key, pair in pairs.items() for kind, array in zip("im", pair)})
"""


def reading(tool: str) -> list[Block]:
    """Return the page's blocks that read the coins with a tool: those that import it and make `pairs`."""
    found = [block for block in BLOCKS if block.kind == "python" and re.search(rf"(import|from) {tool}\b", block.text)]
    found = [block for block in found if re.search(r"^pairs = ", block.text, re.MULTILINE)]
    assert found, f"docs/readers.md has no block that reads with {tool}"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("readers")
    pack_coins(home / "data" / "coins", COUNTS)
    assert len(list((home / "data" / "coins" / "train").glob("*.tar"))) == 2
    return home


def run(folder: Path, *words: str) -> None:
    """Run a command without a network, in the folder of the data."""
    variables = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }  # fmt: skip
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def compare(block: Block, text: str, folder: Path, split: str) -> None:
    """Run a block, and compare every sample that it read with DeepSkip's reader."""
    (folder / "found.npz").unlink(missing_ok=True)
    (folder / "block.py").write_text(text + DUMP)
    run(folder, sys.executable, "block.py")
    shards = Shards(folder / "data" / "coins" / split)
    entries = shards.index.entries(list(range(len(shards))))
    assert len(entries) == COUNTS[split]
    with np.load(folder / "found.npz") as found:
        assert set(found) == {f"{entry.key}/{kind}" for entry in entries for kind in "im"}, block.place
        for entry in entries:
            own = shards.whole(entry)
            for kind, array in (("i", own.image), ("m", own.mask)):
                theirs = found[f"{entry.key}/{kind}"]
                assert theirs.dtype == np.uint8, (block.place, theirs.dtype)
                np.testing.assert_array_equal(theirs, array, err_msg=f"{block.place}: {entry.key}")


@pytest.mark.parametrize("tool", ["webdataset", "datasets", "ray"])
def test_every_key_image_and_mask_is_the_same(folder: Path, tool: str) -> None:
    for block in reading(tool):
        compare(block, block.text, folder, "train")


def test_hugging_face_knows_the_splits(folder: Path) -> None:
    block = reading("datasets")[0]
    for split, named in (("val", "validation"), ("test", "test")):
        compare(block, block.text.replace('split="train"', f'split="{named}"'), folder, split)
    # streamed, from the folder
    compare(block, block.text.replace('split="train"', 'split="train", streaming=True'), folder, "train")


def test_energon_by_the_field_map_of_the_page(folder: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "data").rglob("*") if path.is_file()}
    prepare = next(block for block in BLOCKS if block.text.startswith("energon prepare"))
    run(folder, "bash", "-c", f"{prepare.text} --no-progress --num-workers 1")
    kind = next(block for block in BLOCKS if "class Segmentation" in block.text)
    (folder / "segmentation.py").write_text(kind.text)
    field_map = next(block for block in BLOCKS if block.kind == "yaml" and "field_map" in block.text)
    (folder / "data" / "coins" / ".nv-meta" / "dataset.yaml").write_text(field_map.text)
    (block,) = reading("megatron.energon")
    for split in COUNTS:
        compare(block, block.text.replace('split_part="train"', f'split_part="{split}"'), folder, split)
    # our files are as they were
    assert before == {path: path.read_bytes() for path in before}
