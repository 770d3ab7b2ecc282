"""Pack NUDT-SIRST and SIRST-v1 by their official splits."""

import csv
from collections.abc import Sequence
from pathlib import Path

from deepskip.data_shards.labels import AS_LABELS, listed
from deepskip.data_shards.origin import Origin
from deepskip.data_shards.pictures import Reading
from deepskip.data_shards.progress import no_progress, no_word
from deepskip.data_shards.sources.folder import Pair, examine, pair_files, read_samples
from deepskip.data_shards.sources.packing import write_splits
from deepskip.data_shards.sources.split import PackError, draw_split

# images of the official training and test splits
SETS = {"nudt_sirst": (663, 664), "sirst_v1": (213, 214)}
# search: train and val, for choices. official: all training images, and test. distinct: the same without near-duplicates.
PARTS = ("search", "official", "distinct")
BANDS = 1
SAMPLES_PER_SHARD = 64


def pack(
    name: str,
    folders: Sequence[Path],
    split: Path,
    out: Path,
    *,
    val_share: float = 0.1,
    seed: int = 0,
    near_duplicates: Path | None = None,
) -> dict[str, dict[str, int]]:
    """Pack a set into out/search, out/official and, with a list of near-duplicates, out/distinct.

    `search` has no test images. In the other two parts the validation images are training images too, so that all are
    trained on; a run must not be chosen by them.

    Args:
        name: a key of SETS.
        folders: folders that hold images/ and masks/.
        split: CSV with columns stem,split, or a folder of lists. Images that the CSV marks val are training images, and
            the validation images of `search`.
        out: folder to make.
        val_share: share of the training images drawn for validation, if the split marks none.
        seed: seed of that draw.
        near_duplicates: text file with a stem in each line: training images of a test image's scene.

    Returns:
        Number of images by part and split.

    Raises:
        PackError: images or masks are missing or cannot be packed, or the split is not the official one.
    """
    train, val, test = read_official(split)
    if (len(train), len(test)) != SETS[name]:
        raise PackError(
            f"{split} has {len(train)} training and {len(test)} test images; {name} has {' and '.join(map(str, SETS[name]))}"
        )
    if both := set(train) & set(test):
        raise PackError(f"{split} has images in both splits: {listed(sorted(both))}")
    pairs: dict[str, Pair] = {}
    for folder in folders:
        found, _ = pair_files(folder / "images", folder / "masks")
        pairs |= {pair.stem: pair for pair in found}
    if missing := sorted({*train, *test} - pairs.keys()):
        raise PackError(f"{len(missing)} images of {split} are not in the folders: {listed(missing)}")
    val = val or draw_split(train, val_share, seed)["val"]
    parts = {
        "search": {"train": [stem for stem in train if stem not in set(val)], "val": val},
        "official": {"train": train, "val": val, "test": test},
    }
    if near_duplicates is not None:
        omitted = set(near_duplicates.read_text().split())
        if unknown := sorted(omitted - set(train)):
            raise PackError(f"{near_duplicates} has stems that are not training images: {listed(unknown)}")
        kept = [stem for stem in train if stem not in omitted]
        parts["distinct"] = {"train": kept, "val": [stem for stem in val if stem in kept], "test": test}
    every = [pairs[stem] for stem in sorted({*train, *test})]
    how, reading, _ = examine(every, "binary", None, None, BANDS, Reading(missing=True), AS_LABELS)
    return {
        part: write_splits(
            {each: [pairs[stem] for stem in stems] for each, stems in splits.items()},
            out / part,
            lambda members: read_samples(members, how, reading, BANDS, None),
            lambda members: [path for pair in members for path in (*pair.images, pair.mask)],
            (how, reading),
            num_classes=how.num_classes,
            origin=Origin("binary"),
            bands=BANDS,
            longest_side=None,
            samples_per_shard=SAMPLES_PER_SHARD,
            progress=no_progress,
            say=no_word,
        )
        for part, splits in parts.items()
    }


def read_official(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Read an official split.

    Args:
        path: CSV with columns stem,split (train, val or test), or a folder that holds one train*.txt and one test*.txt.

    Returns:
        Sorted stems of the training images, those of them that are marked for validation, and stems of the test images.

    Raises:
        PackError: the files are missing, or have other columns or splits.
    """
    by_split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    if path.is_dir():
        for split in ("train", "test"):
            lists = sorted(path.glob(f"{split}*.txt"))
            if len(lists) != 1:
                raise PackError(f"{path} has {len(lists)} files {split}*.txt; it must have one")
            by_split[split] = lists[0].read_text().split()
    elif path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("split") not in by_split or not row.get("stem"):
                    raise PackError(f"{path} has a row {row}; it needs stem,split with train, val or test")
                by_split[row["split"]].append(row["stem"])
    else:
        raise PackError(f"the split {path} does not exist")
    return sorted([*by_split["train"], *by_split["val"]]), sorted(by_split["val"]), sorted(by_split["test"])
