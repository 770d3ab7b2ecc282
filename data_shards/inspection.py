"""What a person asks of shards: are they whole, what is in them, how do they look, who takes which sample when."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from deepskip.data_shards import storage
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import Index
from deepskip.data_shards.order import EpochOrder, rank_slots, steps_per_epoch
from deepskip.data_shards.progress import Progress, no_progress
from deepskip.data_shards.sample import BadSample
from deepskip.data_shards.scan import BrokenShard

# upper ends of the object-size histogram, as shares of the image
SIZE_EDGES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)


def verify(folder: str | Path, cache: storage.Cache | None = None, progress: Progress = no_progress) -> Iterator[str]:
    """Reads all of a split and gives a line for each fault, so none when all is well.

    A shard is compared with the index by size and sha256; then every sample is decoded and its labels are checked, in a
    shard that has changed as well.
    """
    shards = Shards(folder, normalize="none", cache=cache)
    index = shards.index
    for number in progress(range(len(index.shards)), len(index.shards)):
        shard = index.shards[number]
        try:
            shards.open_shard(number)
            if storage.file_sha256(shards.local_path(number)) != shard.sha256:
                yield (
                    f"{index.shard_location(number)} has the right size but other contents than when it was indexed "
                    "(sha256 differs)"
                )
        except BrokenShard as error:
            yield str(error)
            continue
        for entry in index.entries(list(index.shard_range(number))):
            try:
                shards.read(entry)
            except BadSample as error:
                yield str(error)


@dataclass
class Contents:
    """What is in a split. pixels: of each label. objects: of each share of the image up to SIZE_EDGES. bad: unreadable."""

    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    objects: np.ndarray = field(default_factory=lambda: np.zeros(len(SIZE_EDGES), np.int64))
    shares: list[float] = field(default_factory=list)
    empty: int = 0
    bad: int = 0


def contents(folder: str | Path, cache: storage.Cache | None = None, progress: Progress = no_progress) -> Contents:
    """Reads every mask of a split and counts; objects are 8-connected regions of one label."""
    shards = Shards(folder, normalize="none", cache=cache)
    found = Contents()
    everywhere = np.ones((3, 3), bool)
    for sample in progress(range(len(shards)), len(shards)):
        try:
            _, mask = shards.read(shards.index.entries([sample])[0])
        except (BadSample, BrokenShard):
            found.bad += 1
            continue
        found.heights.append(mask.shape[0])
        found.widths.append(mask.shape[1])
        counts = np.bincount(mask.ravel(), minlength=256)
        found.pixels += counts
        labels = [label for label in np.flatnonzero(counts) if label not in (0, shards.index.ignore_index)]
        found.empty += not labels
        for label in labels:
            regions, _ = ndimage.label(mask == label, structure=everywhere)
            shares = np.bincount(regions.ravel())[1:] / mask.size
            found.shares += shares.tolist()
            found.objects += np.bincount(np.searchsorted(SIZE_EDGES, shares), minlength=len(SIZE_EDGES))
    return found


def describe(index: Index, found: Contents) -> str:
    """Says in some lines what is in a split."""
    size = sum(shard.bytes for shard in index.shards) / 1e6
    classes = "binary" if index.num_classes == 1 else f"{index.num_classes} classes"
    lines = [
        f"{index.location}: {index.num_samples} samples in {len(index.shards)} shards, {size:.1f} MB, "
        f"{index.bands} bands, {index.dtype}, {classes}"
    ]
    if found.bad:
        lines.append(f"  {found.bad} samples cannot be read; deepskip verify says why")
    if not found.heights:
        return "\n".join(lines)
    low, high = (f"{fold(found.heights)} x {fold(found.widths)}" for fold in (min, max))
    lines.append(f"  size       {low}" + (f" to {high}" if high != low else "") + " pixels (height x width)")
    total = found.pixels.sum()
    balance = ", ".join(
        f"{'ignored' if label == index.ignore_index else f'label {label}'} {found.pixels[label] / total:.2%}"
        for label in np.flatnonzero(found.pixels)
    )
    lines.append(f"  pixels     {balance}")
    lines.append(f"  objects    {len(found.shares)}, {found.empty} images without any")
    if found.shares:
        lines[-1] += f"; median {np.median(found.shares):.3%} of the image"
        most = found.objects.max()
        for edge, below, count in zip(SIZE_EDGES, (0.0, *SIZE_EDGES), found.objects, strict=False):
            bar = "#" * round(40 * count / most)
            # what is not there is not told
            if count:
                lines.append(f"    {below:>7.2%} to {edge:<7.2%} {count:>8}  {bar}")
    return "\n".join(lines)


def plan(
    index: Index, *, seed: int, window: int, global_batch_size: int, world_size: int, rank: int,
    epoch: int, from_step: int, steps: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Gives what a rank takes in each step, from the index alone: {"epoch", "step", "keys", "repeats"}.

    step: counted within the epoch; where the epoch ends, the next begins at 0. keys: of samples of weight 1. repeats: keys of
    weight 0 that only fill the batch. Raises ValueError for a step, rank or size that is not there.
    """
    for name, value, low, high in (
        ("global-batch-size", global_batch_size, 1, None),
        ("world-size", world_size, 1, None),
        ("rank", rank, 0, world_size - 1),
        ("epoch", epoch, 0, None),
        ("from-step", from_step, 0, steps_per_epoch(index.num_samples, max(global_batch_size, 1)) - 1),
        ("steps", steps, 0, None),
    ):
        if value < low or (high is not None and value > high):
            allowed = f"{low} to {high}" if high is not None else f"{low} or more"
            raise ValueError(f"--{name} is {value}; it must be {allowed}")
    per_epoch = steps_per_epoch(index.num_samples, global_batch_size)
    order = EpochOrder(seed, epoch, index.shard_sizes, window)
    for number in range(from_step, from_step + steps):
        ahead, step = divmod(number, per_epoch)
        if order.epoch != epoch + ahead:
            order = EpochOrder(seed, epoch + ahead, index.shard_sizes, window)
        slots = rank_slots(order, step, global_batch_size, rank, world_size)
        keys, repeats = (index.keys([s.sample for s in slots if s.weight == weight]) for weight in (1, 0))
        yield {"epoch": order.epoch, "step": step, "keys": keys, "repeats": repeats}


def preview(folder: str | Path, out: Path, count: int, cache: storage.Cache | None = None) -> None:
    """Draws samples side by side, the mask's outline in red, into a picture file."""
    shards = Shards(folder, cache=cache)
    count = min(count, len(shards))
    side, columns = 192, max(1, min(8, count))
    sheet = Image.new("RGB", (columns * side, max(1, -(-count // columns)) * (side + 14)), "white")
    for i in range(count):
        entry = shards.index.entries([i * len(shards) // count])[0]
        image, mask, *_ = shards.whole(entry)
        place = (i % columns) * side, (i // columns) * (side + 14)
        picture = Image.fromarray(outlined(image, mask, shards.index.ignore_index)).resize((side - 4, side - 4))
        sheet.paste(picture, place)
        ImageDraw.Draw(sheet).text((place[0], place[1] + side - 3), entry.key[-28:], fill="black")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)


def outlined(image_HWC: np.ndarray, mask_HW: np.ndarray, ignore_index: int) -> np.ndarray:
    """Gives an RGB picture (H, W, 3) uint8 of an image's first, middle and last band with the mask's outline in red."""
    bands = [0, image_HWC.shape[2] // 2, image_HWC.shape[2] - 1]
    shown = image_HWC[..., bands].astype(np.float32)
    low, high = np.percentile(shown, (1, 99), axis=(0, 1))
    shown = np.clip((shown - low) / np.maximum(high - low, 1e-6), 0, 1) * 255
    foreground = np.pad((mask_HW != 0) & (mask_HW != ignore_index), 1)
    inside = foreground[2:, 1:-1] & foreground[:-2, 1:-1] & foreground[1:-1, 2:] & foreground[1:-1, :-2]
    shown[foreground[1:-1, 1:-1] & ~inside] = (255, 0, 0)
    return shown.astype(np.uint8)
