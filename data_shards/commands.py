"""The data commands: pack, index, verify, describe, preview and plan shards."""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from braceexpand import braceexpand
from tqdm import tqdm

from deepskip.data_shards import storage
from deepskip.data_shards.appending import Appended, append_split, look_for, pack_shards, staging
from deepskip.data_shards.card import write_card
from deepskip.data_shards.command_line import COINS_DEFAULT, COINS_SEED
from deepskip.data_shards.compacting import compact
from deepskip.data_shards.index import FILE, BrokenIndex, Index, MissingIndex, load_first, load_index, refuse_chain
from deepskip.data_shards.indexing import BAD_SAMPLES, index_shards
from deepskip.data_shards.ingest.start import ingest
from deepskip.data_shards.inspection import contents, describe, plan, preview, verify
from deepskip.data_shards.labels import AS_LABELS, Values, listed
from deepskip.data_shards.manifest import read_chain
from deepskip.data_shards.origin import Origin
from deepskip.data_shards.pictures import Reading
from deepskip.data_shards.progress import Progress
from deepskip.data_shards.sample import Sample
from deepskip.data_shards.sources.arrays import pack_arrays
from deepskip.data_shards.sources.coco import pack_coco
from deepskip.data_shards.sources.coins import coins
from deepskip.data_shards.sources.folder import pack_folder
from deepskip.data_shards.sources.split import SPLITS, PackError, read_colours
from deepskip.data_shards.strays import Stray, remove, strays
from deepskip.data_shards.upgrading import can_upgrade, upgrade
from deepskip.data_shards.writer import write_shards

CACHE_GB = 50
# Options of `index` with which an older index is upgraded; others ask for a new one.
NEW_INDEX = {
    "out": None, "shards": None, "image": None, "mask": None, "labels": "auto", "num_classes": None, "ignore_label": None,
    "alpha": "auto", "orientation": "auto", "nodata": None, "threshold": None, "colors": None, "white_is_zero": "ask",
    "bands": None, "on_bad_sample": "error",
}  # fmt: skip

# Sources of `append` that options belong to.
APPEND_OPTIONS = {
    "masks": ("folder", "arrays"), "annotations": ("coco",), "mask_suffix": ("folder",), "channel_suffix": ("folder",),
    "layout": ("arrays",), "key_prefix": ("arrays",), "categories": ("coco",), "binary": ("coco",), "by_basename": ("coco",),
    "image": ("shards",), "mask": ("shards",), "labels": ("folder", "arrays"), "ignore_label": ("folder", "arrays"),
    "threshold": ("folder", "arrays"), "colors": ("folder", "arrays"), "tile": ("folder", "coco", "arrays"),
}  # fmt: skip


def pack_coins(out: Path, counts: dict[str, int] = COINS_DEFAULT, seed: int = COINS_SEED) -> None:
    """Pack the built-in coins into out/train, out/val and out/test.

    Args:
        out: Folder to make.
        counts: Number of images by split.
        seed: Seed of the coins' images.
    """
    for split, count in counts.items():
        samples = (Sample(key, image, mask) for key, image, mask in coins(split, count, seed))
        write_shards(
            progress("samples")(samples, count), out / split, num_classes=1, source=f"coins {split} {count} {seed}"
        )
    write_card(out)


def run_pack_coins(arguments: argparse.Namespace) -> None:
    """Pack the built-in data and report what is in it."""
    pack_coins(arguments.out, {split: getattr(arguments, split) for split in COINS_DEFAULT}, arguments.seed)
    show(arguments.out)


def run_pack_folder(arguments: argparse.Namespace) -> None:
    """Pack a folder of images and masks, and print what each split holds."""
    options = options_of(
        arguments, "labels", "num_classes", "ignore_label", "bands", "longest_side", "mask_suffix", "channel_suffix"
    )
    options |= {"reading": reading_of(arguments), "values": values_of(arguments)}
    pack_folder(arguments.images, arguments.masks or arguments.images, arguments.out, **options)
    show(arguments.out)


def run_pack_coco(arguments: argparse.Namespace) -> None:
    """Pack a COCO file with its images, and print what each split holds."""
    options = options_of(arguments, "categories", "binary", "bands", "longest_side", "by_basename")
    options |= {"on_bad_annotation": arguments.on_bad_annotation, "reading": reading_of(arguments)}
    pack_coco(arguments.images, arguments.annotations, arguments.out, **options)
    show(arguments.out)


def run_pack_arrays(arguments: argparse.Namespace) -> None:
    """Pack two arrays, and print what each split holds."""
    options = options_of(arguments, "layout", "labels", "num_classes", "ignore_label", "bands")
    options |= {"reading": Reading(nodata=arguments.nodata), "values": values_of(arguments)}
    pack_arrays(arguments.images, arguments.masks, arguments.out, **options)
    show(arguments.out)


def options_of(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the named options together with those that all sources share."""
    common = ("split", "split_name", "val_share", "seed", "samples_per_shard", "tile")
    return {name: getattr(arguments, name) for name in (*common, *names)} | {
        "progress": progress("samples"),
        "say": print,
    }


def reading_of(arguments: argparse.Namespace) -> Reading:
    """Return how image files are read, from the command line."""
    return Reading(arguments.alpha, arguments.orientation, nodata=arguments.nodata)


def values_of(arguments: argparse.Namespace, before: Values = AS_LABELS) -> Values:
    """Return how mask files are read, from the command line.

    Args:
        arguments: The command line.
        before: What holds where it says nothing.

    Raises:
        PackError: If --threshold is not finite or comes with --colors, or the colour file is not valid.
    """
    colours = read_colours(arguments.colors) if arguments.colors else ()
    threshold: float | None = arguments.threshold
    if threshold is not None and (not math.isfinite(threshold) or colours):
        raise PackError("--threshold must be a number, and cannot be combined with --colors")
    if threshold is None and not colours:
        threshold, colours = before.threshold, before.colours
    return Values(arguments.white_is_zero or before.white_is_zero, threshold, colours)


def show(path: Path | str, cache: storage.Cache | None = None) -> None:
    """Print what is in each split of a data set.

    Args:
        path: The data set, or one split of it: folder or URL.
        cache: Where copies of remote shards are kept.
    """
    indexes: list[tuple[str, Index]] = []
    for folder in splits_of(str(path)):
        index = load_index(folder, cache)
        print(describe(index, contents(folder, cache, progress("samples"))))
        for before, other in indexes:
            if told := said_of_both(folder, index, before, other):
                print(told)
        indexes.append((folder, index))


def said_of_both(split: str, index: Index, before: str, other: Index) -> str | None:
    """Return a warning if samples of two splits have the same bytes, in image and mask; None if there are none.

    Args:
        split: Path or URL of a split.
        index: Its index.
        before: Path or URL of the other split.
        other: Its index.
    """
    found = index.samples.filter(pc.is_in(index.samples["digest"], value_set=other.samples["digest"].combine_chunks()))
    if not len(found):
        return None
    return (
        f"warning: {len(found)} samples of {split} are also in {before}, byte by byte: {listed(found['key'].to_pylist())}. "
        "A model that saw them in training is not tested by them"
    )


def run_index(arguments: argparse.Namespace) -> None:
    """Make an index of shards that another program wrote, or upgrade an older index, and print a summary."""
    refuse_chain(arguments.out or arguments.path)
    names = ("image", "mask", "labels", "num_classes", "ignore_label", "bands", "on_bad_sample", "workers")
    options = {name: getattr(arguments, name) for name in names}
    shards = list(braceexpand(arguments.shards)) if arguments.shards else None
    options |= {"reading": reading_of(arguments), "values": values_of(arguments), "say": print}
    told = {name: value for name, value in vars(arguments).items() if name not in ("run", "path", "workers")}
    is_plain = all(value == NEW_INDEX[name] for name, value in told.items())
    if is_packed(split := arguments.out or arguments.path) and not can_upgrade(split):
        if not is_plain:
            raise PackError(
                f"{storage.join(split, FILE)} was made by pack or append, and holds what the shards do not: how images were "
                "prepared, and the number of classes. Pack again to change them"
            )
        print(f"{storage.join(split, FILE)} was made by pack or append: it is kept")
        return
    if is_plain and can_upgrade(arguments.path):
        print(f"{storage.join(arguments.path, FILE)} is of an earlier version: adding the statistics of each image")
        index = upgrade(arguments.path, cache_of(arguments), arguments.workers, progress("shards"))
    else:
        index = index_shards(arguments.path, arguments.out, shards=shards, progress=progress("shards"), **options)
    print(
        f"{storage.join(index.location, FILE)}: {index.num_samples} samples in {len(index.shards)} shards, "
        f"{index.bands} bands, {index.dtype}, {'binary' if index.num_classes == 1 else f'{index.num_classes} classes'}"
    )
    if storage.exists(storage.join(index.location, BAD_SAMPLES)):
        print(f"skipped samples are listed in {storage.join(index.location, BAD_SAMPLES)}")


def is_packed(split: str) -> bool:
    """Return whether a split was packed by DeepSkip: its shards alone do not tell how, so its index cannot be made again.

    Args:
        split: Path or URL of the split.
    """
    with contextlib.suppress(MissingIndex, BrokenIndex):
        return load_index(split).source is not None
    return False


def run_append(arguments: argparse.Namespace) -> None:
    """Append samples to a split as its next generation, and print which it is."""
    path = arguments.path
    split = path if storage.exists(storage.join(path, FILE)) else split_of(path, arguments.split_name)
    appended = append_source(split, arguments)
    made = appended.generation
    total = sum(each.samples for each in appended.chain)
    if appended.repeated:
        print(f"{split}: generation {made.number} was made of the same source; nothing is appended")
    else:
        print(f"{split}: generation {made.number} with {made.samples} samples; {total} samples in all")


def append_source(split: str, arguments: argparse.Namespace) -> Appended:
    """Pack the source that the command line names, and append it to a split.

    Args:
        split: Path or URL of the split.
        arguments: The command line.
    """
    source = check_source(arguments)
    cache = cache_of(arguments)
    _, first = load_first(split, cache)
    with staging(split) as folder:
        if source == "shards":
            names = ("image", "mask")
            options: dict[str, Any] = {name: getattr(arguments, name) for name in names} | {"say": print}
            pack_shards(arguments.shards, folder, first, progress=progress("shards"), **options)
        else:
            pack_like(first, source, folder, arguments)
            folder = folder / "train"
        if not arguments.repeated_keys:
            require_in_no_other(split, folder, cache)
        watermark = arguments.watermark
        if watermark is None and source != "shards":
            watermark = min(time.time(), newest(arguments.images))
        return append_split(
            split,
            folder,
            watermark=watermark,
            offsets=arguments.offsets,
            repeated_keys=arguments.repeated_keys,
            cache=cache,
        )


def require_in_no_other(split: str, folder: Path, cache: storage.Cache) -> None:
    """Raise AppendError if samples have keys of another split of the data set: a model would be validated on what it trained.

    Args:
        split: Path or URL of the split to append to.
        folder: The packed samples.
        cache: Where the samples files of a remote split are kept.
    """
    root, _, name = split.rstrip("/").rpartition("/")
    for other in SPLITS:
        place = storage.join(root or ".", other)
        if name in SPLITS and other != name and storage.exists(storage.join(place, FILE)):
            chain = read_chain(place, [load_first(place, cache)[0]])
            look_for(place, chain, None, load_index(folder).samples["key"], cache)


def check_source(arguments: argparse.Namespace) -> str:
    """Return which source `append` takes: "folder", "coco", "arrays" or "shards".

    Raises:
        PackError: If the options name none or several, or one that belongs to another source.
    """
    if (arguments.shards is None) == (arguments.images is None):
        raise PackError("give either --images, with --masks or --annotations, or --shards")
    source = "shards" if arguments.shards else "coco" if arguments.annotations else "folder"
    if source == "folder" and arguments.images.is_file():
        source = "arrays"
    for name, others in APPEND_OPTIONS.items():
        if getattr(arguments, name) and source not in others:
            raise PackError(f"--{name} belongs to {' or '.join(others)}, but the source is {source}")
    if source == "arrays" and arguments.masks is None:
        raise PackError("give the array of the masks: --masks")
    return source


def pack_like(first: Index, source: str, out: Path, arguments: argparse.Namespace) -> None:
    """Pack the source of an append into out/train, as the samples of a split were packed.

    Args:
        first: Generation 0 of the split.
        source: "folder", "coco" or "arrays".
        out: Folder to make.
        arguments: The command line.

    Raises:
        PackError: If it cannot be packed.
    """
    prepared = first.preparation
    nodata = prepared.get("nodata")
    how = like_before(first, arguments)
    reading = Reading(how.alpha, how.orientation, nodata=None if nodata is None else float(nodata))
    names = ("samples_per_shard", "tile")
    options = {name: getattr(arguments, name) for name in names} | {"split_name": "train", "bands": prepared["bands"]}
    options |= {"reading": reading, "progress": progress("samples"), "say": print}
    if source == "coco":
        if first.num_classes > 1 and not arguments.categories and not (first.origin and first.origin.classes):
            raise PackError(
                "the classes of a COCO file are numbered in its own order; name them in that of the data set: "
                "--categories car,person"
            )
        options |= {"binary": arguments.binary, "by_basename": arguments.by_basename}
        options["categories"] = arguments.categories.split(",") if arguments.categories else None
        options["like"] = first
        pack_coco(arguments.images, arguments.annotations, out, longest_side=prepared["longest_side"], **options)
        return
    options |= {
        "labels": how.labels,
        "num_classes": first.num_classes,
        "ignore_label": how.ignore_label,
        "values": how.values,
    }
    if how.options:
        print(f"masks are read with {how.options}")
    if source == "arrays":
        prefix = f"{arguments.images.stem.replace('.', '_')}_" if arguments.key_prefix is None else arguments.key_prefix
        options |= {"layout": arguments.layout or "NHWC", "key_prefix": prefix}
        pack_arrays(arguments.images, arguments.masks, out, **options)
        return
    options |= {"mask_suffix": arguments.mask_suffix or "", "channel_suffix": arguments.channel_suffix or ""}
    masks = arguments.masks or arguments.images
    pack_folder(arguments.images, masks, out, longest_side=prepared["longest_side"], **options)


def like_before(first: Index, arguments: argparse.Namespace) -> Origin:
    """Return how new files of a split are read: as those before, unless the command line says otherwise.

    Args:
        first: Generation 0 of the split.
        arguments: The command line of `append` or `ingest`.

    Raises:
        PackError: As `values_of`.
    """
    before = first.origin or Origin()
    return Origin(
        arguments.labels or before.labels,
        before.ignore_label if arguments.ignore_label is None else arguments.ignore_label,
        values_of(arguments, before.values),
        arguments.alpha or before.alpha,
        arguments.orientation or before.orientation,
    )


def newest(path: Path) -> float:
    """Return when a file, or the newest one in a folder, was last written, in seconds since 1970."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((each.stat().st_mtime for each in files if each.is_file()), default=path.stat().st_mtime)


def report(line: str) -> None:
    """Print a line, in which names of files may have bytes that are not UTF-8."""
    print(line.encode(errors="backslashreplace").decode(), flush=True)


def run_ingest(arguments: argparse.Namespace) -> None:
    """Append what arrives at a source to a split until the process is stopped, and print how much that was."""
    path = arguments.to
    split = path if storage.exists(storage.join(path, FILE)) else split_of(path, arguments.split_name)
    names = (
        "name", "mask_suffix", "paths_under", "journal", "settle_seconds", "poll_seconds", "samples", "seconds", "idle_seconds",
        "samples_per_shard", "tile", "kafka_settings", "wait_for", "behind",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    how = like_before(load_first(split, cache_of(arguments))[1], arguments)
    options |= {name: getattr(how, name) for name in ("labels", "ignore_label", "values")}
    options["reading"] = Reading(how.alpha, how.orientation)
    if how.options:
        report(f"masks are read with {how.options}")
    committed = ingest(arguments.origin, split, cache=cache_of(arguments), say=report, **options)
    print(f"{split}: {committed} samples committed")


def run_compact(arguments: argparse.Namespace) -> None:
    """Join the generations of each split to a new closed set, and print what is in it."""
    for folder in splits_of(arguments.path):
        out = arguments.out if folder == arguments.path else arguments.out / storage.name(folder)
        index = compact(folder, out, cache_of(arguments), arguments.samples_per_shard, progress("shards"))
        print(f"{out}: {index.num_samples} samples in {len(index.shards)} shards")


def splits_of(path: str) -> list[str]:
    """Return the splits of a data set, or the path itself if it is a split.

    Raises:
        MissingIndex: If the path is neither.
        BrokenIndex: If the path has an index that cannot be read.
    """
    found = [folder for name in ("", *SPLITS) if storage.exists(storage.join(folder := split_of(path, name), FILE))]
    # With no split found, load_index raises the error that explains it.
    if not found:
        load_index(path)
    return found


def split_of(path: str, name: str) -> str:
    """Return the location of a split in a data set, or of the data set itself for an empty name."""
    return storage.join(path, name) if name else path


def run_verify(arguments: argparse.Namespace) -> None:
    """Verify each split, and exit with status 1 if anything is wrong."""
    faults = 0
    for folder in splits_of(arguments.path):
        for fault in verify(folder, cache_of(arguments), progress("shards")):
            faults += 1
            print(fault)
        if found := strays(folder):
            removed = remove(found, arguments.older_than) if arguments.remove_strays else None
            print(said_of_strays(folder, found, removed))
    if faults:
        print(f"{arguments.path}: {faults} faults")
        sys.exit(1)
    print(f"{arguments.path}: every shard matches its index, every sample can be read")


def said_of_strays(folder: str, found: list[Stray], removed: list[Stray] | None) -> str:
    """Return in words which files are not part of a split, and which of them were removed.

    Args:
        folder: The split.
        found: The files.
        removed: Those that were removed; None if that was not asked for.
    """
    names = listed([storage.name(each.location) for each in found])
    text = f"{folder}: {len(found)} files are not part of it, of appends in progress or of dead writers: {names}"
    if removed is not None:
        return f"{text}; {len(removed)} are removed"
    return f"{text}. To remove those that are older than a day: --remove_strays"


def run_info(arguments: argparse.Namespace) -> None:
    """Print what is in each split."""
    show(arguments.path, cache_of(arguments))


def run_preview(arguments: argparse.Namespace) -> None:
    """Draw a contact sheet of samples."""
    preview(arguments.path, arguments.out, arguments.count, cache_of(arguments))
    print(f"wrote {arguments.out}")


def run_plan(arguments: argparse.Namespace) -> None:
    """Print the samples of a rank as one JSON line for each step."""
    folder = arguments.path.removesuffix(f"/{FILE}") if arguments.path != FILE else "."
    names = (
        "seed",
        "window",
        "global_batch_size",
        "world_size",
        "rank",
        "epoch",
        "from_step",
        "steps",
        "lanes",
        "fixed_lanes",
    )
    index = load_index(folder, generations=arguments.generations)
    for line in plan(index, **{name: getattr(arguments, name) for name in names}):
        print(json.dumps(line))


def cache_of(arguments: argparse.Namespace) -> storage.Cache:
    """Return the cache that the command line names, or the default one."""
    return storage.Cache(Path(getattr(arguments, "cache", None) or storage.DEFAULT_CACHE), int(CACHE_GB * 1e9))


def progress(unit: str) -> Progress:
    """Return a function that wraps items in a progress bar, which shows only on a terminal.

    Args:
        unit: What one item is, such as "samples".
    """
    return lambda items, total: tqdm(items, total=total, unit=f" {unit}", disable=None, leave=False)
