"""The README.md of a data set, by which Hugging Face datasets finds the shards among the other files."""

from pathlib import Path

from deepskip.data_shards import storage
from deepskip.data_shards.index import FILE
from deepskip.data_shards.sources.split import SPLITS

CARD = "README.md"
# A card without this line belongs to somebody else.
MARK = "# written by deepskip pack"
# Hugging Face's names of splits.
NAMES = {"val": "validation"}


def write_card(folder: Path) -> None:
    """Write the README.md of a data set, unless one is there that somebody else wrote.

    Without it `datasets.load_dataset(folder)` may take the rows of the index for the samples.

    Args:
        folder: The data set; its splits are those that have an index.
    """
    path = folder / CARD
    there = path.read_text(errors="replace") if path.is_file() else None
    if there is None and (path.exists() or path.is_symlink()):
        return
    text = card([split for split in SPLITS if (folder / split / FILE).is_file()])
    if there is None or (MARK in there and there != text):
        storage.write_bytes(path, text.encode())


def card(splits: list[str]) -> str:
    """Return the text of a data set's README.md.

    Args:
        splits: Names of its splits, as folders: train, val, test.
    """
    files = "\n".join(f"  - split: {NAMES.get(split, split)}\n    path: {split}/*.tar" for split in splits)
    return f"""---
{MARK}
task_categories:
- image-segmentation
configs:
- config_name: default
  data_files:
{files}
---

WebDataset shards: `KEY.image.*` is an image, `KEY.mask.*` its labels.

```python
from datasets import load_dataset

samples = load_dataset("THIS FOLDER")
```
"""
