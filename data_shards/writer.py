"""Write samples into WebDataset shards with their index; a split appears whole or not at all."""

import contextlib
import dataclasses
import fcntl
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from deepskip.data_shards import storage, tiles
from deepskip.data_shards.entries import SampleEntry, sample_table, with_statistics
from deepskip.data_shards.index import BrokenIndex, Index, MissingIndex, ShardEntry, load_index, save_index
from deepskip.data_shards.index_check import CONTROL
from deepskip.data_shards.labels import IGNORE_INDEX, listed
from deepskip.data_shards.origin import Origin
from deepskip.data_shards.percentiles import PixelSample, finite_or_none
from deepskip.data_shards.pictures import AS_IT_COMES, Reading
from deepskip.data_shards.preparation import band_statistics
from deepskip.data_shards.sample import Sample, encode_image, encode_mask
from deepskip.data_shards.scan import MAX_NAME, sample_entry, scan_tar

LOCK = ".lock"
# What the names of half-written folders have that those of users do not.
HALF = ".deepskip-half-"
# Characters of a key, whose files in a shard have longer names.
MAX_KEY = MAX_NAME - 16
# Side in pixels of the tiles of large masks.
MASK_TILE = 1024


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    num_classes: int,
    ignore_index: int = IGNORE_INDEX,
    preparation: dict[str, Any] | None = None,
    origin: Origin | None = None,
    samples_per_shard: int = 256,
    source: str | None = None,
    tile: int | None = None,
) -> Index:
    """Write the shards and the index of a split.

    The same samples give shards of the same bytes. A split that a killed process left half-written is removed. Pixels of images
    that are nan have no value.

    Args:
        samples: The samples.
        folder: Folder of the split, which must not exist yet, unless it was made of the same source.
        num_classes: 1 for binary, else the number of classes with background.
        ignore_index: Label of ignored pixels.
        preparation: What was done to the source images, for the index.
        origin: How their files were read, for the index.
        samples_per_shard: Number of samples in a shard.
        tile: Side in pixels of the tiles in which larger images and those of many bands are stored (`tiles`); None stores
            every image in one piece.
        source: Fingerprint of what the shards are made of. If `folder` has the same one, it is not changed.

    Returns:
        The index of the split.

    Raises:
        ValueError: If there are no samples, sizes or numbers of bands differ, a label is too large, or a key occurs twice or
            holds a dot or slash.
        FileExistsError: If the folder exists and was made of another source.
    """
    folder = storage.local(folder)
    if folder.exists():
        return made_of_the_same(folder, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with half_written(folder) as temporary:
        index = _write(
            iter(samples), temporary, num_classes, ignore_index, preparation, samples_per_shard, source, tile
        )
        index = dataclasses.replace(index, origin=origin)
        save_index(index, temporary)
        try:
            publish(temporary, folder)
        except OSError:
            # Another process packed it meanwhile.
            if not folder.exists():
                raise
            return made_of_the_same(folder, source)
    return dataclasses.replace(index, location=str(folder))


def made_of_the_same(folder: Path, source: str | None) -> Index:
    """Return the index of a split that exists already.

    Args:
        folder: Folder of the split.
        source: Fingerprint of what it must be made of.

    Raises:
        FileExistsError: If it was made of something else, or is not whole.
    """
    with contextlib.suppress(MissingIndex, BrokenIndex):
        index = load_index(folder)
        if source is not None and index.source == source:
            sizes = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
            if changed := [shard.name for shard in index.shards if sizes.get(shard.name) != shard.bytes]:
                raise FileExistsError(
                    f"{folder} is made of the same files, but these shards changed: {listed(changed)}; remove it and pack again"
                )
            return index
    raise FileExistsError(f"{folder} exists already; remove it or pack to another folder")


@contextlib.contextmanager
def half_written(folder: Path) -> Iterator[Path]:
    """Make a temporary folder next to `folder`, and remove those that killed processes left.

    Yields:
        The temporary folder, which is removed at the end unless it was renamed.
    """
    for stale in folder.parent.glob(f".{folder.name}{HALF}*"):
        # A process that writes holds the lock, which ends with the process.
        with contextlib.suppress(OSError), storage.lock_file(stale / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}{HALF}", dir=folder.parent))
    try:
        with storage.lock_file(temporary / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Rename the folder of `half_written`, once all its files are synced to disk.

    Args:
        temporary: The folder.
        folder: Its final path.

    Raises:
        OSError: If a file cannot be synced, or the folder renamed.
    """
    (temporary / LOCK).unlink()
    temporary.chmod(0o755)
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    storage.sync_folder(temporary)
    temporary.rename(folder)
    storage.sync_folder(folder.parent)


def _write(
    samples: Iterable[Sample],
    folder: Path,
    num_classes: int,
    ignore_index: int,
    preparation: dict[str, Any] | None,
    samples_per_shard: int,
    source: str | None,
    tile: int | None,
) -> Index:
    paths: list[Path] = []
    keys: set[str] = set()
    bands, dtypes, missing = 0, set(), False
    pixels, total, squares = np.zeros(0), np.zeros(0), np.zeros(0)
    statistics: list[tuple[np.ndarray, np.ndarray]] = []
    kept = PixelSample()
    writer: webdataset.TarWriter | None = None
    try:
        for number, sample in enumerate(samples):
            image, mask = sample.image_HWC, sample.mask_HW
            check_sample(sample, keys, bands, num_classes, ignore_index)
            if number == 0:
                bands = image.shape[2]
                pixels, total, squares = np.zeros(bands), np.zeros(bands), np.zeros(bands)
            keys.add(sample.key)
            dtypes.add(image.dtype)
            flat = image.reshape(-1, bands).astype(np.float64)
            pixels += len(flat)
            if image.dtype.kind == "f" and (nowhere := np.isnan(flat)).any():
                missing = True
                pixels -= nowhere.sum(0)
                flat[nowhere] = 0
            total += flat.sum(0)
            squares += (flat**2).sum(0)
            statistics.append(band_statistics(image))
            kept.add(image)
            if number % samples_per_shard == 0:
                if writer is not None:
                    writer.close()
                paths.append(folder / f"shard-{len(paths):06d}.tar")
                # Plain headers without time stamps: the same samples give the same bytes.
                writer = webdataset.TarWriter(str(paths[-1]), mtime=0, encoder=False)
            assert writer is not None
            image_extension, image_bytes = encoded(sample, tile)
            mask_extension, mask_bytes = encoded_mask(mask, tile)
            writer.write(
                {"__key__": sample.key, f"image.{image_extension}": image_bytes, f"mask.{mask_extension}": mask_bytes}
            )
    finally:
        if writer is not None:
            writer.close()
    if not keys:
        raise ValueError("there are no samples to write")
    pixels = np.maximum(pixels, 1)
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    entries: list[SampleEntry] = []
    shards = []
    for path in paths:
        found = own_entries(path)
        shards.append(ShardEntry(path.name, path.stat().st_size, storage.file_sha256(path), len(found)))
        entries += found
    return Index(
        shards=tuple(shards),
        samples=with_statistics(sample_table(entries), *map(np.stack, zip(*statistics, strict=True))),
        bands=bands,
        dtype="uint8" if dtypes == {np.dtype(np.uint8)} else "float32",
        num_classes=num_classes,
        ignore_index=ignore_index,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        preparation=preparation or {"bands": None, "longest_side": None},
        source=source,
        percentiles=finite_or_none(kept.percentiles()),
        reading=Reading(missing=True, nodata=math.nan) if missing else AS_IT_COMES,
    )


def encoded(sample: Sample, tile: int | None) -> tuple[str, bytes]:
    """Return the extension and contents of a sample's image, as it goes into the shard.

    Args:
        sample: The sample.
        tile: Side in pixels of the tiles in which larger images, and those of many bands, are stored; None for none.
    """
    image = sample.image_HWC
    if tile is not None and tiles.can_tile(image):
        H, W, bands = image.shape
        if max(H, W) > tile or bands > tiles.MOST_TOGETHER:
            return "tif", tiles.encode(image, tile)
    return sample.stored_image or encode_image(image)


def encoded_mask(mask_HW: np.ndarray, tile: int | None) -> tuple[str, bytes]:
    """Return the extension and contents of a mask, as it goes into the shard.

    A mask is read whole. Large ones are stored as images in tiles are, since PNG takes several times as long to decode.

    Args:
        mask_HW: Integer labels (H, W).
        tile: Side of tiles in pixels, or None for none.

    Raises:
        ValueError: If a label is not 0 to 255.
    """
    if tile is None or max(mask_HW.shape) <= tile or mask_HW.min() < 0 or mask_HW.max() > 255:
        return encode_mask(mask_HW)
    return "tif", tiles.encode(mask_HW.astype(np.uint8)[..., None], MASK_TILE)


def own_entries(path: Path) -> list[SampleEntry]:
    """Return where each sample lies in a shard that `write_shards` wrote, as read from the shard."""
    with path.open("rb") as file:
        return [
            sample_entry(key, members, ("image", "mask"), file.fileno())[0]
            for key, members in scan_tar(path, path.name).samples.items()
        ]


def is_utf8(text: str) -> bool:
    """Return whether a text has no surrogates, as which Python reads bytes of a file name that are not UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_sample(sample: Sample, keys: set[str], bands: int, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError if a sample does not fit those before it.

    Args:
        sample: The sample.
        keys: Keys of the samples before it.
        bands: Number of bands of the samples before it; 0 for the first.
        num_classes: 1 for binary, else the number of classes with background.
        ignore_index: Label of ignored pixels.

    Raises:
        ValueError: If its key, size, number of bands or a label is not valid; names the sample.
    """
    image, mask = sample.image_HWC, sample.mask_HW
    if not sample.key or any(c in sample.key for c in "./\\\0"):
        raise ValueError(f"key {sample.key!r} is empty or has a dot or slash, which have a meaning in tar shards")
    if CONTROL.search(sample.key) or len(sample.key) > MAX_KEY or not is_utf8(sample.key):
        raise ValueError(
            f"key {sample.key!r} has control characters, bytes that are not UTF-8, or more than {MAX_KEY} characters"
        )
    if sample.key in keys:
        raise ValueError(f"key {sample.key} occurs twice")
    if image.shape[:2] != mask.shape:
        raise ValueError(f"sample {sample.key}: the image is {image.shape[:2]}, its mask {mask.shape} (height, width)")
    if bands and image.shape[2] != bands:
        raise ValueError(f"sample {sample.key} has {image.shape[2]} bands, but those before it have {bands}")
    labels = mask[mask != ignore_index]
    highest = 1 if num_classes == 1 else num_classes - 1
    if labels.size and labels.max() > highest:
        raise ValueError(
            f"sample {sample.key} has label {labels.max()}; with num_classes {num_classes} the highest is {highest}"
        )
