"""Writes samples into WebDataset shards with their index; a split appears whole or not at all."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import webdataset

from data_shards.index import Index, Member, SampleEntry, ShardEntry, file_sha256, save_index
from data_shards.sample import Sample, encode_image, encode_mask


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    num_classes: int,
    ignore_index: int = 255,
    preparation: dict[str, int | None] | None = None,
    samples_per_shard: int = 256,
) -> Index:
    """Writes a split's shards and index into `folder`, which must not exist, and returns the index.

    Shards are the same bytes for the same samples. Raises ValueError for samples of different bands, labels that
    num_classes does not have, keys that occur twice or hold a dot or slash; FileExistsError when the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it or pack to another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        index = _write(iter(samples), temporary, num_classes, ignore_index, preparation, samples_per_shard)
        save_index(index, temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def _write(
    samples: Iterable[Sample],
    folder: Path,
    num_classes: int,
    ignore_index: int,
    preparation: dict[str, int | None] | None,
    samples_per_shard: int,
) -> Index:
    paths: list[Path] = []
    keys: set[str] = set()
    bands, dtypes = 0, set()
    pixels, total, squares = 0, np.zeros(0), np.zeros(0)
    writer: webdataset.TarWriter | None = None
    try:
        for number, sample in enumerate(samples):
            image, mask = sample.image_HWC, sample.mask_HW
            check_sample(sample, keys, bands, num_classes, ignore_index)
            if number == 0:
                bands = image.shape[2]
                total, squares = np.zeros(bands), np.zeros(bands)
            keys.add(sample.key)
            dtypes.add(image.dtype)
            flat = image.reshape(-1, bands).astype(np.float64)
            pixels += len(flat)
            total += flat.sum(0)
            squares += (flat**2).sum(0)
            if number % samples_per_shard == 0:
                if writer is not None:
                    writer.close()
                paths.append(folder / f"shard-{len(paths):06d}.tar")
                # plain headers, no time stamps: the same samples give the same bytes
                writer = webdataset.TarWriter(str(paths[-1]), mtime=0, encoder=False)
            assert writer is not None
            image_extension, image_bytes = sample.stored_image or encode_image(image)
            mask_extension, mask_bytes = encode_mask(mask)
            writer.write(
                {"__key__": sample.key, f"image.{image_extension}": image_bytes, f"mask.{mask_extension}": mask_bytes}
            )
    finally:
        if writer is not None:
            writer.close()
    if not keys:
        raise ValueError("there are no samples to write")
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    return Index(
        shards=tuple(scan_shard(path) for path in paths),
        bands=bands,
        dtype="uint8" if dtypes == {np.dtype(np.uint8)} else "float32",
        num_classes=num_classes,
        ignore_index=ignore_index,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        preparation=preparation or {"bands": None, "longest_side": None},
    )


def check_sample(sample: Sample, keys: set[str], bands: int, num_classes: int, ignore_index: int) -> None:
    """Raises ValueError where a sample does not fit those before it; bands is 0 before the first."""
    image, mask = sample.image_HWC, sample.mask_HW
    if not sample.key or any(c in sample.key for c in "./\\\0"):
        raise ValueError(f"key {sample.key!r} is empty or has a dot or slash, which tar shards give a meaning")
    if sample.key in keys:
        raise ValueError(f"key {sample.key} occurs twice")
    if image.shape[:2] != mask.shape:
        raise ValueError(f"sample {sample.key}: the image is {image.shape[:2]}, its mask {mask.shape} (height, width)")
    if bands and image.shape[2] != bands:
        raise ValueError(f"sample {sample.key} has {image.shape[2]} bands, those before it {bands}")
    labels = mask[mask != ignore_index]
    highest = 1 if num_classes == 1 else num_classes - 1
    if labels.size and labels.max() > highest:
        raise ValueError(
            f"sample {sample.key} has label {labels.max()}; with num_classes {num_classes} the highest is {highest}"
        )


def scan_shard(path: Path) -> ShardEntry:
    """Reads where each sample lies in a shard that write_shards wrote."""
    members: dict[str, dict[str, Member]] = {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            key, kind, extension = info.name.split(".")
            members.setdefault(key, {})[kind] = Member(extension, info.offset_data, info.size)
    samples = tuple(SampleEntry(key, found["image"], found["mask"]) for key, found in members.items())
    return ShardEntry(path.name, path.stat().st_size, file_sha256(path), samples)
