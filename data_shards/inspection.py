"""Inspect shards: verify them, describe their contents, draw samples, and list which rank takes which sample."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from deepskip.data_shards import storage
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import Index
from deepskip.data_shards.manifest import advance_of
from deepskip.data_shards.order import EpochOrder, rank_slots, steps_per_epoch
from deepskip.data_shards.progress import Progress, no_progress
from deepskip.data_shards.sample import BadSample
from deepskip.data_shards.scan import BrokenShard

# First area of each bin of the object-size histogram but the first, in pixels, as in the report of `deepskip evaluate`.
SIZE_EDGES = (16, 64, 256, 1024)


def verify(folder: str | Path, cache: storage.Cache | None = None, progress: Progress = no_progress) -> Iterator[str]:
    """Read all of a split and yield a line for each fault, so none if all is well.

    A shard is compared with the index by size and sha256. Then every sample is decoded and its labels are checked, even in a
    shard whose contents have changed.

    Args:
        folder: Path or URL of the split.
        cache: Where copies of remote shards are kept.
        progress: Wraps the shards' numbers.

    Yields:
        One message for each fault.
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
    """What is in a split.

    Attributes:
        heights: Height of each image in pixels.
        widths: Width of each image in pixels.
        pixels: Number of pixels of each label, (256,) int64.
        areas: Area of each object in pixels.
        empty: Number of images without objects.
        bad: Number of samples that cannot be read.
    """

    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    areas: list[int] = field(default_factory=list)
    empty: int = 0
    bad: int = 0


def contents(folder: str | Path, cache: storage.Cache | None = None, progress: Progress = no_progress) -> Contents:
    """Read every mask of a split and count pixels and objects; objects are 8-connected regions of one label.

    Args:
        folder: Path or URL of the split.
        cache: Where copies of remote shards are kept.
        progress: Wraps the samples' numbers.
    """
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
            found.areas += np.bincount(regions.ravel())[1:].tolist()
    return found


def describe(index: Index, found: Contents) -> str:
    """Return a summary of a split as a few lines of text."""
    size = sum(shard.bytes for shard in index.shards) / 1e6
    classes = "binary" if index.num_classes == 1 else f"{index.num_classes} classes"
    lines = [
        f"{index.location}: {index.num_samples} samples in {len(index.shards)} shards, {size:.1f} MB, "
        f"{index.bands} bands, {index.dtype}, {classes}"
    ]
    if len(index.generations) > 1:
        counts = [each.samples for each in index.generations]
        told = ", ".join(map(str, counts)) if len(counts) < 9 else f"{min(counts)} to {max(counts)}"
        lines.append(f"  chain      {len(counts)} generations of {told} samples{said_of_advance(index)}")
    if found.bad:
        lines.append(f"  {found.bad} samples cannot be read; deepskip verify gives the reasons")
    if not found.heights:
        return "\n".join(lines)
    low, high = (f"{fold(found.heights)} x {fold(found.widths)}" for fold in (min, max))
    lines.append(f"  size       {low}" + (f" to {high}" if high != low else "") + " pixels (height x width)")
    total = found.pixels.sum()
    names = dict(enumerate(index.classes, 1)) | {index.ignore_index: "ignored"}
    balance = ", ".join(
        f"{names.get(label, f'label {label}')} {found.pixels[label] / total:.2%}"
        for label in np.flatnonzero(found.pixels).tolist()
    )
    lines.append(f"  pixels     {balance}")
    lines.append(f"  objects    {len(found.areas)}, {found.empty} images without any")
    if found.areas:
        lines[-1] += f"; median {np.median(found.areas):g} pixels"
        bins = np.bincount(np.searchsorted(SIZE_EDGES, found.areas, side="right"), minlength=len(SIZE_EDGES) + 1)
        for begin, edge, count in zip((1, *SIZE_EDGES), (*SIZE_EDGES, None), bins.tolist(), strict=True):
            bounds = f"{begin} to {edge - 1}" if edge else f"{begin} and more"
            # Empty bins are not listed.
            if count:
                lines.append(f"    {bounds:<14} {count:>8}  {'#' * round(40 * count / bins.max())}".rstrip())
    return "\n".join(lines)


def said_of_advance(index: Index) -> str:
    """Return the watermark of a chain and its offsets as text; empty without any."""
    advance = advance_of(index.generations)
    mark, offsets = advance["watermark"], advance["offsets"]
    text = "" if mark is None else f"; watermark {datetime.fromtimestamp(mark, UTC).isoformat(timespec='seconds')}"
    return text + ("; offsets " + ", ".join(f"{name} {value}" for name, value in offsets.items()) if offsets else "")


def plan(
    index: Index, *, seed: int, window: int, global_batch_size: int, world_size: int, rank: int,
    epoch: int, from_step: int, steps: int, lanes: int = 1, fixed_lanes: bool = False,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield what a rank takes in each step, from the index alone.

    Args:
        index: The index of the split.
        seed: Seed of the order.
        window: Number of shards of a lane that are shuffled together.
        global_batch_size: Number of samples in a step over all ranks.
        world_size: Number of ranks.
        rank: Rank, 0 to world_size - 1.
        epoch: Epoch of the first step, counted from 0.
        from_step: First step, counted within the epoch from 0.
        steps: Number of steps; after the last step of an epoch comes step 0 of the next.
        lanes: Number of lanes.
        fixed_lanes: Whether a lane has the same samples in every epoch.

    Yields:
        {"epoch", "step", "keys", "repeats", "shards"}: keys of samples of weight 1, repeats of weight 0 that only fill the
        batch, and the names of the shards that the rank reads for both.

    Raises:
        ValueError: If a number is out of range; names the option.
    """
    for name, value, low, high in (
        ("global-batch-size", global_batch_size, 1, None),
        ("world-size", world_size, 1, None),
        ("rank", rank, 0, world_size - 1),
        ("epoch", epoch, 0, None),
        ("from-step", from_step, 0, steps_per_epoch(index.num_samples, max(global_batch_size, 1)) - 1),
        ("steps", steps, 0, None),
        ("seed", seed, 0, None),
        ("window", window, 1, None),
        # Ranks would read all lanes in turn.
        ("lanes", lanes, 1, max(global_batch_size, 1)),
    ):
        if value < low or (high is not None and value > high):
            allowed = f"{low} to {high}" if high is not None else f"{low} or more"
            raise ValueError(f"--{name} is {value}; it must be {allowed}")
    per_epoch = steps_per_epoch(index.num_samples, global_batch_size)
    order = EpochOrder(seed, epoch, index.shard_sizes, window, lanes, fixed_lanes)
    for number in range(from_step, from_step + steps):
        ahead, step = divmod(number, per_epoch)
        if order.epoch != epoch + ahead:
            order = EpochOrder(seed, epoch + ahead, index.shard_sizes, window, lanes, fixed_lanes)
        slots = rank_slots(order, step, global_batch_size, rank, world_size)
        keys, repeats = (index.keys([s.sample for s in slots if s.weight == weight]) for weight in (1, 0))
        shards = [index.shards[number].name for number in index.shards_of([s.sample for s in slots])]
        yield {"epoch": order.epoch, "step": step, "keys": keys, "repeats": repeats, "shards": shards}


def preview(folder: str | Path, out: Path, count: int, cache: storage.Cache | None = None) -> None:
    """Draw samples in a grid, with their masks outlined in red, and write them as a picture.

    Args:
        folder: Path or URL of the split.
        out: Picture file to write.
        count: Number of samples, spread evenly over the split.
        cache: Where copies of remote shards are kept.

    Raises:
        BadSample: If a sample cannot be used.
        BrokenShard: If a shard cannot be opened.
    """
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
    """Return an RGB picture of an image with the mask's outline in red.

    Args:
        image_HWC: Image (H, W, bands); its first, middle and last band become red, green and blue.
        mask_HW: Labels (H, W).
        ignore_index: Label of ignored pixels, which are not outlined.

    Returns:
        Picture (H, W, 3) uint8.
    """
    bands = [0, image_HWC.shape[2] // 2, image_HWC.shape[2] - 1]
    some = image_HWC[..., bands].astype(np.float32)
    low, high = np.percentile(some, (1, 99), axis=(0, 1))
    shown: np.ndarray = np.clip((some - low) / np.maximum(high - low, 1e-6), 0, 1) * 255
    foreground = np.pad((mask_HW != 0) & (mask_HW != ignore_index), 1)
    inside = foreground[2:, 1:-1] & foreground[:-2, 1:-1] & foreground[1:-1, 2:] & foreground[1:-1, :-2]
    shown[foreground[1:-1, 1:-1] & ~inside] = (255, 0, 0)
    return shown.astype(np.uint8)
